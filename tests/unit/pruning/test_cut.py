"""Cut: its file, which may hold anything; how it fits its plan; and the report."""

import json

import pytest
import torch

from conftest import build_batch, build_model
from stillroom.errors import DataError, MismatchError
from stillroom.pruning.config import BestLayers, PruningConfig, Width
from stillroom.pruning.plan import plan_pruning
from stillroom.pruning.prune import CUT_FILE, PruneMask, choose_mask, prune_model, read_mask, report, write_mask

CUT = PruneMask(
    (0, 2), (0, 3, 5), ((1,), (0,)), ((2, 3), (0, 1)), ((0, 1), (2, 3)), {"layers": {"values": [0.5, 0.25]}}, "sha256 x"
)


def test_its_file_is_read_as_it_was_written(tmp_path):
    assert read_mask(tmp_path) is None
    write_mask(tmp_path, CUT)
    assert read_mask(tmp_path) == CUT
    written = (
        '{"format": 1, "layers": [0, 2], "channels": [0, 3, 5], "groups": [[1], [0]], '
        '"heads": [[2, 3], [0, 1]], "mlp": [[0, 1], [2, 3]], '
        '"scores": {"layers": {"values": [0.5, 0.25]}}, "teacher": "sha256 x"}\n'
    )
    assert (tmp_path / CUT_FILE).read_text() == written
    whole = PruneMask((0,), None, None, None, None, {}, "")
    write_mask(tmp_path, whole)
    assert read_mask(tmp_path) == whole


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"[1]", b"null", b'{"format": NaN}', b"1" * 5000],
    ids=lambda text: repr(text[:12]),
)
def test_a_file_that_is_something_else_is_refused(tmp_path, text):
    (tmp_path / CUT_FILE).write_bytes(text)
    with pytest.raises(DataError, match="does not tell what was kept of a model") as caught:
        read_mask(tmp_path)
    assert str(tmp_path / CUT_FILE) in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"format": True},
        {"layers": []},
        {"layers": [1, 0]},
        {"layers": [0, 0]},
        {"layers": [-1, 0]},
        {"layers": [False, True]},
        {"layers": [0.0, 1.0]},
        {"layers": "01"},
        {"layers": None},
        {"channels": []},
        {"channels": {"0": 1}},
        {"groups": [[1]]},
        {"groups": [[1], [0, 1]]},
        {"groups": [[1], None]},
        {"mlp": [[0, 1], [3, 2]]},
        {"scores": []},
        {"teacher": 5},
        {"more": 1},
    ],
    ids=str,
)
def test_values_that_are_no_cut_are_refused(change):
    with pytest.raises(DataError, match="does not tell what was kept"):
        PruneMask.from_json({**CUT.to_json(), **change})


@pytest.mark.parametrize("name", ["format", "layers", "channels", "scores", "teacher"])
def test_values_that_lack_one_are_refused(name):
    values = CUT.to_json()
    del values[name]
    with pytest.raises(DataError, match="does not tell what was kept"):
        PruneMask.from_json(values)


@pytest.fixture(scope="module")
def model():
    return build_model("llama", num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2)


SMALL = Width(hidden_size=12, num_attention_heads=2, intermediate_size=10)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"layers": (0, 1, 2)}, "layers"),
        ({"layers": (0, 4)}, "layers"),
        ({"channels": None}, "channels"),
        ({"channels": (*range(11), 16)}, "channels"),
        ({"groups": ((0,), (2,))}, "groups"),
        ({"heads": ((0, 1), (2, 4))}, "heads"),
        ({"mlp": ((0,), (1,))}, "mlp"),
    ],
)
def test_a_cut_of_another_plan_is_refused(model, change, what):
    plan = plan_pruning(PruningConfig(layers=2, width=SMALL), model.config)
    cut = choose_mask(plan, model, [build_batch(20, 9, 30)], teacher="it")
    with pytest.raises(MismatchError, match=f"the cut's {what} are not those of the plan"):
        prune_model(model, PruneMask(**{**vars(cut), **change}), plan)


def test_each_number_of_the_smaller_model_is_the_one_that_was_chosen(model):
    plan = plan_pruning(PruningConfig(layers=(1, 3), width=SMALL), model.config)
    channels, mlp = tuple(range(2, 14)), (tuple(range(10)), tuple(range(14, 24)))
    smaller = prune_model(model, PruneMask((1, 3), channels, ((1,), (0,)), ((2, 3), (0, 1)), mlp, {}, "it"), plan)
    size = plan.config.head_dim
    q = model.model.layers[1].self_attn.q_proj.weight
    assert torch.equal(smaller.model.layers[0].self_attn.q_proj.weight, q[2 * size :, 2:14])
    o = model.model.layers[3].self_attn.o_proj.weight
    assert torch.equal(smaller.model.layers[1].self_attn.o_proj.weight, o[2:14, : 2 * size])
    k = model.model.layers[1].self_attn.k_proj.weight
    assert torch.equal(smaller.model.layers[0].self_attn.k_proj.weight, k[size:, 2:14])
    assert torch.equal(
        smaller.model.layers[1].mlp.down_proj.weight, model.model.layers[3].mlp.down_proj.weight[2:14, 14:]
    )
    assert torch.equal(smaller.lm_head.weight, model.lm_head.weight[:, 2:14])


def test_the_smaller_model_generates_as_the_bigger_one_is_set_to(model):
    plan = plan_pruning(PruningConfig(layers=2), model.config)
    model.generation_config.top_k = 7
    smaller = prune_model(model, choose_mask(plan, model, (), teacher="it"), plan)
    model.generation_config.top_k = 50
    assert smaller.generation_config.top_k == 7


def test_the_report_tells_what_was_kept_and_why(model):
    plan = plan_pruning(PruningConfig(layers=BestLayers(kind="best", count=2), width=SMALL), model.config)
    scores = {
        "layers": {"by": "block_influence", "contiguous": False, "values": [0.5, 0.25, 0.125, 0.75], "dropped": [2, 1]},
        "channels": {"kept_share": 0.875, "values": []},
        "heads": {"kept_share": [0.5, 0.625], "values": []},
        "mlp": {"kept_share": [0.75, 0.8]},
    }
    heads = ((1,), (0,)), ((2, 3), (0, 1))
    cut = PruneMask((0, 3), tuple(range(12)), *heads, (tuple(range(10)),) * 2, json.loads(json.dumps(scores)), "it")
    assert report(cut, plan, 1000, 250).splitlines() == [
        "layers          2 of 4: 0, 3",
        "                         layer  block influence",
        "                             0           0.5000  kept",
        "                             1           0.2500  dropped 2nd",
        "                             2           0.1250  dropped 1st",
        "                             3           0.7500  kept",
        "hidden channels 12 of 16, which hold 87.5% of what was measured",
        "heads           2 of 4, which hold 50.0% to 62.5% of what was measured in a layer",
        "                of each layer 2 3; 0 1",
        "MLP channels    10 of 24, which hold 75.0% to 80.0% of what was measured in a layer",
        "parameters      250 of 1,000 (25.0%)",
    ]


def test_the_report_of_a_stretch_and_of_nothing(model):
    rule = BestLayers(kind="best", count=2, by="loss_increase", contiguous=True)
    plan = plan_pruning(PruningConfig(layers=rule), model.config)
    scores = {"by": "loss_increase", "contiguous": True, "values": [3.0, 1.0, 2.0], "dropped": [1, 2], "loss_nats": 1.0}
    text = report(PruneMask((0, 3), None, None, None, None, {"layers": scores}, "it"), plan, 10, 5)
    assert [line.split() for line in text.splitlines()[1:5]] == [
        ["2", "layers", "from", "loss", "increase,", "nats"],
        ["0", "3.0000"],
        ["1", "1.0000", "dropped"],
        ["2", "2.0000"],
    ]
    nothing = report(
        PruneMask((0, 1, 2, 3), None, None, None, None, {}, "it"), plan_pruning(PruningConfig(), model.config), 10, 10
    )
    assert nothing.splitlines() == [
        "layers          all 4",
        "hidden channels all 16",
        "heads           all 4",
        "MLP channels    all 24",
        "parameters      10 of 10 (100.0%)",
    ]

"""Students that start as a part of their teacher: what a run leaves, that it resumes, and what does not fit."""

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from conftest import SaveModel
from stillroom.config import load
from stillroom.distill.config import DistillConfig
from stillroom.distill.plan import make_plan
from stillroom.distill.run import run
from stillroom.errors import ConfigError, Interrupted, MismatchError
from stillroom.pruning.prune import read_mask
from stillroom.recipe import from_yaml
from stillroom.runs import read_json, read_metrics

# peft itself still asks for the old name
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.* is deprecated:FutureWarning")

WIDTH = "{hidden_size: 12, num_attention_heads: 2, intermediate_size: 20}"
BEST = f"{{kind: from_teacher, layers: {{kind: best, count: 2, by: loss_increase}}, width: {WIDTH}, documents: 6}}"


@pytest.fixture
def teacher(saved_model: SaveModel) -> Path:
    return saved_model("llama", seed=2, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2)


@pytest.fixture
def settings(recipe: Path, tmp_path: Path, teacher: Path) -> Callable[..., DistillConfig]:
    def make(out: str, init: str, *words: str) -> DistillConfig:
        base = [f"out={tmp_path / out}", f"teacher.model={teacher}", "student.model=null", f"student.init={init}"]
        return load(DistillConfig, recipe, [*base, "checkpoints.every=2", *words])

    return make


def metrics(folder: Path) -> list[dict[str, Any]]:
    volatile = ("time_s", "tokens_per_s")
    return [{k: v for k, v in line.items() if k not in volatile} for line in read_metrics(folder / "metrics.jsonl")]


def test_a_run_is_measured_before_it_trains_and_leaves_an_ordinary_model(settings, tmp_path):
    notes: list[str] = []
    config = settings("run", BEST, "objectives=[{kind: forward_kl}, {kind: hidden}]")
    record = run(config, report=lambda event, values: notes.append(values["text"]) if event == "note" else None)
    lines = metrics(tmp_path / "run")
    assert lines[0] == {"step": 0, "held_out": record["held_out_before"]}
    assert record["held_out"]["forward_kl_nats"] < record["held_out_before"]["forward_kl_nats"]
    cut = read_mask(tmp_path / "run" / "model")
    assert cut == read_mask(tmp_path / "run")
    assert record["student"]["cut"] == {"from": cut.teacher, "layers": list(cut.layers)}
    assert record["config"]["objectives"][1]["layers"] == {"kind": "kept"}
    model = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert (model["num_hidden_layers"], model["hidden_size"], model["head_dim"]) == (2, 12, 4)
    (report,) = [note for note in notes if note.startswith("the student is a part of")]
    assert f"layers          2 of 4: {cut.layers[0]}, {cut.layers[1]}" in report
    assert "loss increase" in report


def test_nothing_removed_and_nothing_learnt_is_the_teacher_bit_for_bit(settings, tmp_path, teacher):
    run(settings("run", "{kind: from_teacher}", "optimizer.learning_rate=1e-30", "optimizer.weight_decay=0"))
    there, here = (load_file(folder / "model.safetensors") for folder in (teacher, tmp_path / "run" / "model"))
    assert there.keys() == here.keys()
    assert all(torch.equal(there[name], here[name]) for name in there)
    before = metrics(tmp_path / "run")[0]["held_out"]
    assert before["forward_kl_nats"] == 0
    assert before["top1_agreement"] == 1


def test_an_interrupted_run_keeps_what_it_chose(settings, tmp_path, monkeypatch):
    run(settings("whole", BEST))

    def report(event: str, values: Any) -> None:
        if event == "step" and values["step"] == 3:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted):
        run(settings("halves", BEST), report=report)
    monkeypatch.setattr("stillroom.distill.build.choose_mask", lambda *_, **__: pytest.fail("it was chosen already"))
    run(settings("halves", BEST), resume=True)
    assert metrics(tmp_path / "halves") == metrics(tmp_path / "whole")
    one, other = (load_file(tmp_path / n / "model" / "model.safetensors") for n in ("whole", "halves"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_adapters_on_a_part_of_the_teacher_resume_too(settings, tmp_path):
    lora = "student.lora={rank: 2}"
    run(settings("whole", BEST, lora))

    def report(event: str, values: Any) -> None:
        if event == "step" and values["step"] == 3:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted):
        run(settings("halves", BEST, lora), report=report)
    run(settings("halves", BEST, lora), resume=True)
    one, other = (load_file(tmp_path / n / "model" / "model.safetensors") for n in ("whole", "halves"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_another_teacher_under_the_same_name_is_told_when_it_resumes(settings, tmp_path, teacher, saved_model):
    here = Path(shutil.copytree(teacher, tmp_path / "teacher"))
    base = settings("run", BEST, f"teacher.model={here}", "steps=1")
    run(base)
    record = read_json(tmp_path / "run" / "run.json")
    record["status"] = "interrupted"
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    other = saved_model("llama", seed=5, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2)
    shutil.copy(other / "model.safetensors", here / "model.safetensors")
    with pytest.raises(MismatchError, match="began with another model to cut the student from"):
        run(base, resume=True)


def test_it_is_exported_in_the_type_of_the_model_that_it_is_cut_from(settings, teacher, tmp_path):
    half = Path(shutil.copytree(teacher, tmp_path / "half"))
    AutoModelForCausalLM.from_pretrained(teacher).bfloat16().save_pretrained(half)
    for model, dtype in ((teacher, "float32"), (half, "bfloat16")):
        plan = make_plan(settings("run", "{kind: from_teacher, layers: 2}", f"teacher.model={model}"))
        assert plan.config.export.dtype == dtype


def test_a_student_that_was_cut_before_is_known_by_its_file(settings, tmp_path, teacher, recipe):
    run(settings("run", "{kind: from_teacher, layers: [1, 3]}", "steps=1"))
    words = [f"teacher.model={teacher}", f"student.model={tmp_path / 'run' / 'model'}", f"out={tmp_path}/next"]
    objectives = "objectives=[{kind: forward_kl}, {kind: hidden}]"
    plan = make_plan(load(DistillConfig, recipe, [*words, objectives]))
    assert plan.hidden.texts() == {"hidden": "0 → 1, 1 → 3; no projector"}
    another = [f"teacher.model={Path(shutil.copytree(teacher, tmp_path / 'other'))}"]
    weights = load_file(teacher / "model.safetensors")
    from safetensors.torch import save_file

    save_file({k: v + 1 for k, v in weights.items()}, tmp_path / "other" / "model.safetensors", {"format": "pt"})
    plan = make_plan(load(DistillConfig, recipe, [*words, objectives, *another]))
    assert plan.hidden.texts() == {"hidden": "0 → 0, 1 → 3; no projector"}  # uniform


def test_the_identity_puts_kept_channels_where_they_were(settings, tmp_path):
    objective = "{kind: hidden, weight: 0, distance: mse, projector: {kind: linear, start: identity}, layers: [[0, 0]]}"
    run(settings("run", BEST, f"objectives=[{{kind: forward_kl}}, {objective}]", "steps=2"))
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load as load_tensors

    matrix = {"model": {"hidden.hidden.projectors.0": torch.zeros(16, 12)}}
    folder = tmp_path / "run" / "checkpoints" / "step-00000002"
    load_tensors(matrix, storage_reader=FileSystemReader(folder), no_dist=True)
    rows = matrix["model"]["hidden.hidden.projectors.0"].argmax(0).tolist()
    assert tuple(rows) == read_mask(tmp_path / "run").channels


def test_the_plan_tells_what_is_cut_before_anything_is_loaded(settings, monkeypatch):
    monkeypatch.setattr("stillroom.models.loading.load_model", lambda *_, **__: pytest.fail("it was loaded"))
    told = from_yaml(str(make_plan(settings("run", BEST, "objectives=[{kind: hidden}]"))))
    assert told["cut"]["layers"].startswith("2 of 4: those that matter most by loss increase")
    assert told["cut"]["hidden_size"] == "12 of 16"
    assert told["layers"] == {
        "hidden": "each layer with the one that it was; which, is measured first; a projector each from 12 to 16"
    }
    listed = settings("run", "{kind: from_teacher, layers: [0, 3]}", "objectives=[{kind: hidden}]")
    assert make_plan(listed).hidden.texts() == {"hidden": "0 → 0, 1 → 3; no projector"}


@pytest.mark.parametrize(
    ("init", "error", "told"),
    [
        ("{kind: from_teacher, layers: 5}", MismatchError, "4 layers, 0 to 3"),
        ("{kind: from_teacher, layers: [0, 4]}", MismatchError, "4 layers, 0 to 3"),
        ("{kind: from_teacher, width: 20}", MismatchError, "width is more than the teacher has"),
        ("{kind: from_teacher, width: {num_attention_heads: 3}}", ConfigError, "not a whole number of head groups"),
        ("{kind: from_teacher, width: {hidden_size: 10}}", ConfigError, "does not divide by the heads"),
    ],
)
def test_what_does_not_fit_is_told_from_the_configs_alone(settings, monkeypatch, init, error, told):
    monkeypatch.setattr("stillroom.models.loading.load_model", lambda *_, **__: pytest.fail("it was loaded"))
    with pytest.raises(error) as raised:
        make_plan(settings("run", init))
    assert told in str(raised.value)


def test_a_family_that_is_not_described_says_what_to_describe(settings, saved_model):
    with pytest.raises(MismatchError, match="no smaller model can be cut out of the family gpt2") as raised:
        make_plan(settings("run", "{kind: from_teacher, layers: 1}", f"teacher.model={saved_model('gpt2')}"))
    assert "Describe the axes of each of its tensors" in str(raised.value)


def test_without_a_live_teacher_it_needs_a_model_to_be_cut_from(recipe, tmp_path):
    words = ["student.model=null", "student.init={kind: from_teacher, layers: 1}", "teacher=null", f"out={tmp_path}/x"]
    with pytest.raises(ConfigError) as raised:
        load(DistillConfig, recipe, [*words, "objectives=[{kind: cross_entropy}]"])
    assert "student.init needs `model`" in str(raised.value)


def test_without_a_teacher_a_part_of_a_model_learns_from_labels(recipe, tmp_path, teacher):
    init = f"student.init={{kind: from_teacher, layers: 1, model: {teacher}}}"
    words = ["student.model=null", init, "teacher=null", f"out={tmp_path}/x", "steps=1"]
    record = run(load(DistillConfig, recipe, [*words, "objectives=[{kind: cross_entropy}]"]))
    assert record["student"]["cut"]["layers"] == [0]

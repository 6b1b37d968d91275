"""Costs of a cut: the passes are those that a cut makes, memory by hand, and the smaller model's size on the disk."""

import pytest
from transformers import AutoConfig

from published import PUBLISHED
from stillroom.config import load
from stillroom.errors import ConfigError, MismatchError
from stillroom.estimates.flops import forward_flops
from stillroom.estimates.hardware import Hardware
from stillroom.estimates.headers import Headers, numbers_of
from stillroom.estimates.model_size import model_size
from stillroom.prune.config import PruneConfig
from stillroom.prune.estimate import Pass, costs, passes, read_headers
from stillroom.prune.plan import make_plan
from stillroom.prune.run import run
from stillroom.pruning import importance
from stillroom.pruning.config import BestLayers, PruningConfig
from stillroom.pruning.plan import plan_pruning
from stillroom.recipe import from_yaml

QWEN = PUBLISHED["Qwen2 7B"][0]
TEXT = "data={path: nowhere.jsonl, format: text, length: 1024}"


def planned(*words, **hardware):
    config = load(PruneConfig, None, ["model=m", "out=x", *words])
    smaller = plan_pruning(config, AutoConfig.for_model(**QWEN), "model").config
    known = Headers({"model": model_size(QWEN), "smaller model": model_size(smaller)}, itemsize=2)
    report = costs(config, known, Hardware(**hardware))
    return report, {section: {n: f.value for n, f in found.items()} for section, found in report.sections.items()}


@pytest.mark.parametrize("shape", ["contiguous: false", "contiguous: true"])
def test_the_passes_are_those_that_a_cut_makes(saved_model, text_files, tmp_path, monkeypatch, shape):
    model = saved_model("llama", seed=2, num_hidden_layers=4)
    words = [f"model={model}", f"layers={{kind: best, count: 2, by: loss_increase, {shape}}}", f"out={tmp_path}/x",
             f"data.path={text_files}/train.jsonl", "data.format=text", "data.length=32"]  # fmt: skip
    config, made = load(PruneConfig, None, words), []
    real = importance.loss_nats
    monkeypatch.setattr(
        importance,
        "loss_nats",
        lambda model, text: (made.append(model.config.num_hidden_layers), real(model, text))[1],
    )
    run(config)
    assert [Pass(number, True) for number in made] == list(passes(config.layers, read_headers(config)))


def test_memory_and_time_by_hand():
    _, found = planned("layers={kind: best, count: 14}", "width={intermediate_size: 9472}", TEXT, "batch_tokens=262144")
    memory, whole = found["memory of a device"], model_size(QWEN)
    assert memory["model's weights"] == 2 * whole.total
    assert memory["what each layer gives out"] == 262144 * 29 * 3584 * 2
    assert memory["the same in float32"] == 262144 * 29 * 3584 * 4
    half = model_size({**QWEN, "num_hidden_layers": 14})
    head = 2 * 3584 * 152064
    each = forward_flops(whole, 1024) - head + forward_flops(half, 1024) - head
    assert found["arithmetic of a token"] == {"measuring": pytest.approx(each)}
    assert found["time on H100"]["tokens measured on"] == 64 * 1024
    assert found["time on H100"]["arithmetic"] == pytest.approx(64 * 1024 * each)


def test_a_cut_that_measures_nothing_holds_both_models():
    report, found = planned("layers=14")
    smaller = model_size({**QWEN, "num_hidden_layers": 14}).total
    assert found["memory of a device"]["smaller model's weights"] == 2 * smaller == found["written"]["smaller model"]
    assert not any(section.startswith("time") for section in found)
    assert report.advice[0].startswith("fits")


def test_what_does_not_fit_is_told_with_a_batch_that_does():
    rule = "layers={kind: best, count: 14}"
    report, _ = planned(rule, TEXT, "batch_tokens=262144", memory_gb=30)
    assert report.advice[0].startswith("does not fit")
    smaller = report.advice[1].split("with ")[1].split(":")[0]
    assert planned(rule, TEXT, smaller, memory_gb=30)[0].advice[0].startswith("fits")
    assert "no smaller batch" in planned(rule, TEXT, memory_gb=10)[0].advice[1]


def test_a_dry_run_tells_what_the_run_writes(saved_model, text_files, tmp_path):
    model = saved_model("llama", seed=2, num_hidden_layers=4)
    words = [f"model={model}", "layers=2", "width={intermediate_size: 10}", "documents=12", "device=cpu",
             f"data.path={text_files}/train.jsonl", "data.format=text", "data.length=32",
             f"data.cache={tmp_path}/cache", f"out={tmp_path}/x"]  # fmt: skip
    config = load(PruneConfig, None, words)
    before = from_yaml(str(make_plan(config)))["costs"]
    assert before["time on CPU"]["tokens measured on"] == "384 (at most: 12 documents of up to 32)"
    run(config)
    after = from_yaml(str(make_plan(config)))["costs"]
    assert after["time on CPU"]["tokens measured on"].endswith("(in the first 12 documents)")
    written = sum(numbers_of(tmp_path / "x" / "model" / "model.safetensors").values())
    assert after["parameters"]["smaller model"].startswith(f"{written:,} ")


def test_a_cut_model_has_the_sizes_of_its_part():
    half = plan_pruning(PruningConfig(layers=14, width=1792), AutoConfig.for_model(**QWEN)).config
    assert (half.num_hidden_layers, half.hidden_size, half.num_attention_heads, half.head_dim) == (14, 1792, 14, 128)


@pytest.mark.parametrize(
    ("cut", "error", "message"),
    [
        (PruningConfig(layers=29), MismatchError, "28 layers"),
        (PruningConfig(layers=BestLayers(kind="best", count=29)), MismatchError, "layers.count"),
        (PruningConfig(width=3585), MismatchError, "width is more than the model has"),
        (PruningConfig(width=1793), ConfigError, "whole share"),
    ],
)
def test_what_the_model_does_not_have_is_no_plan(cut, error, message):
    with pytest.raises(error, match=message):
        plan_pruning(cut, AutoConfig.for_model(**QWEN), "model")

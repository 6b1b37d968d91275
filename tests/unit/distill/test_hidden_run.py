"""Whole runs with hidden-state objectives: what they leave; they resume bit for bit, with adapters and schedules."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from conftest import SaveModel
from stillroom.config import load
from stillroom.distill.config import DistillConfig
from stillroom.distill.run import run
from stillroom.errors import Interrupted
from stillroom.runs import read_metrics

# peft itself still asks for the old name
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.* is deprecated:FutureWarning")

Distil = Callable[..., dict[str, Any]]
LEAST_SQUARES = "{kind: hidden, projector: {kind: linear, start: least_squares}, distance: channel_scaled_mse}"


@pytest.fixture
def distil(recipe: Path, tmp_path: Path, saved_model: SaveModel) -> Distil:
    """Runs the tiny recipe with a wider and deeper teacher: ``distil("out=x", OBJECTIVE…, resume=True)``."""
    teacher = saved_model("llama", seed=2, num_hidden_layers=4, hidden_size=24)

    def go(out: str, *objectives: str, settings: tuple[str, ...] = (), **flags: Any) -> dict[str, Any]:
        words = [f"out={tmp_path / out}", f"teacher.model={teacher}", "checkpoints.every=2"]
        words.append(f"objectives=[{', '.join(objectives)}]")
        return run(load(DistillConfig, recipe, [*words, *settings]), **flags)

    return go


def metrics(folder: Path) -> list[dict[str, Any]]:
    volatile = ("time_s", "tokens_per_s")
    return [{k: v for k, v in line.items() if k not in volatile} for line in read_metrics(folder / "metrics.jsonl")]


def test_a_run_tells_the_distance_and_exports_a_plain_model(distil, tmp_path):
    record = distil("run", "{kind: forward_kl}", "{kind: hidden, weight: 0.5}")
    lines = [line for line in metrics(tmp_path / "run") if "held_out" not in line]
    for line in lines:
        assert line["loss_nats"] == pytest.approx(line["forward_kl_nats"] + 0.5 * line["hidden_distance"], rel=1e-5)
    assert lines[-1]["hidden_distance"] < lines[0]["hidden_distance"]
    held_out = record["held_out"]
    assert held_out["loss_nats"] == pytest.approx(held_out["forward_kl_nats"] + 0.5 * held_out["hidden_distance"])
    names = load_file(tmp_path / "run" / "model" / "model.safetensors").keys()
    assert not any("projector" in name or "hidden" in name for name in names)
    assert record["config"]["objectives"][1]["layers"] == {"kind": "uniform", "one_in": 1}


def test_a_weight_that_follows_a_schedule_is_told(distil, tmp_path):
    distil("run", "{kind: cross_entropy}", "{kind: hidden, weight: {kind: linear, start: 1.0, stop: 0.0}}")
    lines = [line for line in metrics(tmp_path / "run") if "held_out" not in line]
    assert [line["hidden_weight"] for line in lines] == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2, 0.0])
    for line in lines:
        expected = line["cross_entropy_nats"] + line["hidden_weight"] * line["hidden_distance"]
        assert line["loss_nats"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "objective",
    ["{kind: hidden, distance: cosine}", LEAST_SQUARES, "{kind: hidden, distance: attention_relation}"],
)
def test_an_interrupted_run_ends_as_if_it_had_never_been(distil, tmp_path, objective):
    distil("whole", "{kind: forward_kl}", objective)

    def report(event: str, values: Any) -> None:
        if event == "step" and values["step"] == 3:
            import signal

            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted):
        distil("halves", "{kind: forward_kl}", objective, report=report)
    distil("halves", "{kind: forward_kl}", objective, resume=True)
    assert metrics(tmp_path / "halves") == metrics(tmp_path / "whole")
    one, other = (load_file(tmp_path / n / "model" / "model.safetensors") for n in ("whole", "halves"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_fit_leaves_the_run_as_it_found_it(distil, tmp_path):
    """The first step's batch is seen for the fit and trained on all the same."""
    distil("plain", "{kind: forward_kl}", "{kind: hidden, weight: 0, projector: {kind: linear, start: identity}}")
    distil("fitted", "{kind: forward_kl}", "{kind: hidden, weight: 0, projector: {kind: linear, start: least_squares}}")
    plain, fitted = (metrics(tmp_path / name) for name in ("plain", "fitted"))
    assert [line.get("forward_kl_nats") for line in plain] == [line.get("forward_kl_nats") for line in fitted]
    assert plain[0]["hidden_distance"] > fitted[0]["hidden_distance"]


def test_adapters_learn_hidden_states_too(distil, tmp_path):
    record = distil("run", "{kind: hidden}", settings=("student.lora={rank: 2}", "student.gradient_checkpointing=true"))
    lines = [line for line in metrics(tmp_path / "run") if "held_out" not in line]
    assert lines[-1]["hidden_distance"] < lines[0]["hidden_distance"]
    assert record["student"]["num_trained"] < record["student"]["num_parameters"]
    config = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert config["hidden_size"] == 16

"""Distillation from a store: equal to live distillation where it holds all, and refused where it does not fit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from stillroom.capture.config import CaptureConfig
from stillroom.capture.run import run as capture
from stillroom.config import load
from stillroom.distill.config import DistillConfig
from stillroom.distill.plan import make_plan
from stillroom.distill.run import run
from stillroom.errors import ConfigError, DataError, Interrupted, MismatchError
from stillroom.runs import read_metrics

KINDS = {
    "full": "{kind: full}",
    "top_k": "{kind: top_k, k: 12, label: true, temperatures: [2.0]}",
    "sampled": "{kind: sampled, draws: 20}",
    "head_and_sample": "{kind: head_and_sample, head: 6, draws: 4}",
}


@pytest.fixture(scope="module")
def stores(saved_model, text_files: Path, tmp_path_factory) -> Callable[[str, str], Path]:
    """A store of each kind of the training or the held-out text."""
    made: dict[tuple[str, str], Path] = {}

    def make(kind: str, text: str = "train") -> Path:
        if (kind, text) not in made:
            folder = tmp_path_factory.mktemp(f"{kind}-{text}")
            words = [f"teacher.model={saved_model('llama', seed=2)}", f"data.path={text_files}/{text}.jsonl",
                     "data.format=text", "data.length=32", f"data.cache={folder}/cache", f"signal={KINDS[kind]}",
                     "teacher.columns=320" if kind == "wide" else "seed=0", f"out={folder}/run"]  # fmt: skip
            capture(load(CaptureConfig, None, words))
            made[kind, text] = folder / "run" / "store"
        return made[kind, text]

    return make


@pytest.fixture
def distil(recipe: Path, tmp_path: Path, stores) -> Callable[..., Path]:
    def go(out: str, kind: str | None, *settings: str, **flags: Any) -> Path:
        words = [f"out={tmp_path / out}"]
        if kind is not None:
            words += [f"teacher={{kind: store, path: {stores(kind)}}}", "data={format: store}",
                      f"held_out.path={stores(kind, 'valid')}"]  # fmt: skip
        run(load(DistillConfig, recipe, [*words, *settings]), **flags)
        return tmp_path / out

    return go


def measured(folder: Path) -> list[dict[str, Any]]:
    lines = read_metrics(folder / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k not in ("time_s", "tokens_per_s")} for line in lines]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


@pytest.mark.parametrize("kind", ["top_k", "sampled", "head_and_sample"])
def test_a_run_from_a_store_resumes_bit_for_bit(distil, tmp_path, kind, monkeypatch):
    whole = distil("whole", kind, "steps=6")
    from stillroom.training import loop

    steps, step = [], loop.optimizer_step

    def interrupt(*arguments: Any) -> Any:
        import signal

        steps.append(1)
        if len(steps) == 3:
            signal.raise_signal(signal.SIGINT)
        return step(*arguments)

    monkeypatch.setattr(loop, "optimizer_step", interrupt)
    with pytest.raises(Interrupted):
        distil("a", kind, "steps=6")
    monkeypatch.setattr(loop, "optimizer_step", step)
    distil("a", kind, "steps=6", resume=True)
    assert measured(tmp_path / "a") == measured(whole)
    for name, tensor in weights(whole).items():
        assert torch.equal(weights(tmp_path / "a")[name], tensor)


def test_what_is_measured_is_what_the_store_tells(distil):
    keys = {"loss_nats", "cross_entropy_nats", "forward_kl_nats", "student_entropy_nats", "num_tokens"}
    told = {kind: set(measured(distil(kind, kind, "steps=1"))[-1]["held_out"]) for kind in KINDS}
    assert told["sampled"] == told["head_and_sample"] == keys
    assert told["top_k"] == told["full"] == keys | {"top1_agreement", "accepted_mass", "teacher_cross_entropy_nats"}


def test_a_truncated_store_measures_less_than_the_whole_and_nearly_as_much(distil):
    full = measured(distil("full", "full", "steps=1"))[-1]["held_out"]
    some = measured(distil("some", "top_k", "steps=1", "objectives=[{kind: reverse_kl, temperature: 2}]"))[-1]
    top = measured(distil("top", "top_k", "steps=1"))[-1]["held_out"]
    assert top["teacher_cross_entropy_nats"] == pytest.approx(full["teacher_cross_entropy_nats"], abs=2e-3)
    assert 0 < top["forward_kl_nats"] < full["forward_kl_nats"]
    assert some["held_out"]["loss_nats"] > 0


def test_a_store_and_other_data_do_not_go_together(recipe, stores):
    teacher = f"teacher={{kind: store, path: {stores('top_k')}}}"
    with pytest.raises(ConfigError, match="settings"):
        load(DistillConfig, recipe, [teacher, "out=x"])
    with pytest.raises(ConfigError, match="settings"):
        load(DistillConfig, recipe, ["data={format: store}", "out=x"])


def test_the_held_out_store_is_not_the_training_store(recipe, stores, tmp_path):
    path = stores("top_k")
    words = [f"teacher={{kind: store, path: {path}}}", "data={format: store}", f"out={tmp_path}/x"]
    with pytest.raises(ConfigError, match="settings"):
        load(DistillConfig, recipe, [*words, f"held_out.path={path}"])
    with pytest.raises(MismatchError, match="holds the data that are trained on"):
        make_plan(load(DistillConfig, recipe, [*words, f"held_out.path={path}/../store"]))


def test_a_damaged_row_stops_the_run_when_its_turn_comes(distil, stores, tmp_path):
    import shutil

    broken = Path(shutil.copytree(stores("top_k"), tmp_path / "store"))
    arrow = broken / "00000.arrow"
    data = bytearray(arrow.read_bytes())
    data[len(data) // 2] ^= 1
    arrow.write_bytes(data)
    with pytest.raises(DataError, match="damaged"):
        distil("a", None, f"teacher={{kind: store, path: {broken}}}", "data={format: store}", "steps=20",
               "held_out=null")  # fmt: skip

"""Hidden states from a store: a run learns from them as from the live teacher; what a store lacks is told at once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import SaveModel
from stillroom.capture.config import CaptureConfig
from stillroom.capture.run import run as capture
from stillroom.config import load
from stillroom.distill.config import DistillConfig
from stillroom.distill.plan import make_plan
from stillroom.distill.run import run
from stillroom.errors import MismatchError
from stillroom.recipe import from_yaml
from stillroom.runs import read_metrics

BOTH = "objectives=[{kind: forward_kl}, {kind: hidden}]"
ALL = "hidden={layers: [0, 1, 2, 3], format: bfloat16}"
Store = Callable[..., str]


@pytest.fixture(scope="module")
def teacher(saved_model: SaveModel) -> Path:
    return saved_model("llama", seed=2, num_hidden_layers=4, hidden_size=24)


@pytest.fixture(scope="module")
def store(teacher: Path, text_files: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    made: dict[tuple[str, ...], str] = {}

    def make(name: str, *settings: str) -> str:
        if (name, *settings) not in made:
            folder = tmp_path_factory.mktemp("store")
            words = [f"teacher.model={teacher}", f"data.path={text_files}/{name}.jsonl", "data.format=text",
                     "data.length=32", f"data.cache={folder}/cache", f"out={folder}/run", *settings]  # fmt: skip
            capture(load(CaptureConfig, None, words))
            made[name, *settings] = f"{folder}/run/store"
        return made[name, *settings]

    return make


@pytest.fixture
def config(saved_model: SaveModel, tmp_path: Path) -> Callable[..., DistillConfig]:
    def make(out: str, path: str, *settings: str) -> DistillConfig:
        words = [f"student.model={saved_model('llama', seed=1)}", f"teacher={{kind: store, path: {path}}}",
                 "data={format: store}", "steps=6", "batch={tokens: 64, micro_tokens: 32}",
                 "optimizer={learning_rate: 1e-2, warmup: 0.2}", f"out={tmp_path / out}", *settings]  # fmt: skip
        return load(DistillConfig, None, words)

    return make


def lines(folder: Path) -> list[dict[str, Any]]:
    return [line for line in read_metrics(folder / "metrics.jsonl") if "held_out" not in line]


def test_a_run_follows_that_of_the_live_teacher(config, store, teacher, recipe, tmp_path):
    full = ("signal={kind: full}", ALL)
    run(config("stored", store("train", *full), BOTH, f"held_out.path={store('valid', *full)}"))
    run(load(DistillConfig, recipe, [f"out={tmp_path}/live", f"teacher.model={teacher}", "teacher.columns=300", BOTH]))
    stored, live = lines(tmp_path / "stored"), lines(tmp_path / "live")
    assert [line["num_kept"] for line in stored] == [line["num_kept"] for line in live]
    assert stored[0]["forward_kl_nats"] == pytest.approx(live[0]["forward_kl_nats"], rel=1e-6)
    for one, other in zip(stored, live, strict=True):  # states in bfloat16, and every step goes on from the one before
        assert one["hidden_distance"] == pytest.approx(other["hidden_distance"], rel=1e-2)
        assert one["forward_kl_nats"] == pytest.approx(other["forward_kl_nats"], rel=1e-2)
    held = [read_metrics(tmp_path / name / "metrics.jsonl")[-1]["held_out"] for name in ("stored", "live")]
    assert held[0]["hidden_distance"] == pytest.approx(held[1]["hidden_distance"], rel=1e-2)


def test_the_default_signal_and_int8_serve_too(config, store, tmp_path):
    path = store("train", "hidden={layers: [0, 1, 2, 3]}")
    run(config("run", path, BOTH))
    found = lines(tmp_path / "run")
    assert found[-1]["hidden_distance"] < found[0]["hidden_distance"]


def test_no_signal_is_read_where_none_is_needed(config, store, tmp_path, monkeypatch):
    from stillroom.store.reader import Store as Reader

    path = store("train", ALL)
    monkeypatch.setattr(Reader, "levels", lambda *_: pytest.fail("signals were read"))
    run(config("run", path, "objectives=[{kind: hidden}]", "steps=1"))
    assert lines(tmp_path / "run")[0]["hidden_distance"] > 0


def test_the_map_is_printed(config, store):
    told = from_yaml(str(make_plan(config("x", store("train", ALL), BOTH))))
    assert told["layers"] == {"hidden": "0 → 0, 1 → 3; a projector each from 16 to 24"}


@pytest.mark.parametrize(
    ("captured", "objective", "what", "told"),
    [
        ((), "{kind: hidden}", "holds no hidden states", "Capture anew with hidden.layers"),
        (("hidden={layers: [1, 3]}",), "{kind: hidden}", "needs layers that the store does not hold", "needed: 0, 3"),
        (("hidden={layers: [1, 3]}",), "{kind: hidden, layers: [[1, 4]]}", "names a layer that is not there", "0 to 3"),
        ((ALL,), "{kind: hidden, distance: attention_relation}", "a store does not hold", "Use a live teacher"),
        ((ALL,), "{kind: hidden, projector: null}", "different widths, and has no projector", "24 channels"),
        ((ALL,), "{kind: hidden, layers: kept}", "the student was not cut from this teacher", "uniform"),
    ],
)
def test_what_a_store_lacks_is_told_before_anything_is_loaded(config, store, captured, objective, what, told):
    with pytest.raises(MismatchError) as raised:
        make_plan(config("x", store("train", *captured), f"objectives=[{objective}]"))
    assert what in str(raised.value)
    assert told in str(raised.value)


def test_what_is_held_out_needs_them_too(config, store):
    plain = f"held_out.path={store('valid')}"
    with pytest.raises(MismatchError, match="holds no hidden states"):
        make_plan(config("x", store("train", ALL), BOTH, plain))


def test_a_student_cut_from_the_model_that_was_asked_keeps_its_layers(config, store, teacher):
    init = f"student.init={{kind: from_teacher, model: {teacher}, layers: [0, 3]}}"
    made = config("run", store("train", ALL), "student.model=null", init, BOTH)
    assert make_plan(made).hidden.texts() == {"hidden": "0 → 0, 1 → 3; no projector"}
    record = run(made)
    assert record["student"]["cut"]["layers"] == [0, 3]

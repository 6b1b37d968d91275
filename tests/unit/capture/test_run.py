"""Whole captures: what the store says, and that an interrupted one ends as if it had never been."""

import json
import shutil
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from stillroom.capture import run as module
from stillroom.capture import signals
from stillroom.capture.config import CaptureConfig
from stillroom.capture.run import run
from stillroom.capture.signals import SignalCapture
from stillroom.config import load
from stillroom.errors import (
    ConfigError,
    DataError,
    Interrupted,
    MismatchError,
    NonFiniteError,
    StillroomError,
    StorageError,
)
from stillroom.models import hidden_states
from stillroom.store.quantize import to_sparse
from stillroom.store.reader import Store
from stillroom.store.writer import StoreWriter

Capture = Callable[..., dict[str, Any]]
KINDS = (
    "signal={kind: top_k, k: 5, label: true, entropy: true, temperatures: [2.0]}",
    "signal={kind: top_p, mass: 0.9, most: 8}",
    "signal={kind: sampled, draws: 6}",
    "signal={kind: head_and_sample, head: 4, draws: 3, label: true}",
)


@pytest.fixture
def capture(saved_model, text_files: Path, tmp_path: Path) -> Capture:
    """Runs a tiny capture: ``capture("x", "signal={kind: full}", resume=True)``; ``x`` is in tmp_path."""

    def go(out: str, *settings: str, **flags: Any) -> dict[str, Any]:
        words = [f"teacher.model={saved_model('llama', seed=2)}", f"data.path={text_files}/train.jsonl",
                 "data.format=text", "data.length=32", f"out={tmp_path / out}", *settings]  # fmt: skip
        return run(load(CaptureConfig, None, words), **flags)

    return go


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "WINDOW_DOCUMENTS", 8)


@pytest.fixture
def power_out(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """``power_out(3)``: the third question to the teacher fails, once."""
    say = SignalCapture.capture

    def at(number: int) -> None:
        calls = count(1)

        def fail(self: SignalCapture, documents: Any) -> Any:
            if next(calls) == number:
                raise OSError("the power is out")
            return say(self, documents)

        monkeypatch.setattr(SignalCapture, "capture", fail)

    return at


def contents(path: Path) -> list[tuple[Any, ...]]:
    """All that a store says of each document. The order of draws means nothing, and depends on the shard."""
    store = Store(path)
    found = []
    for i in range(len(store)):
        levels = store.levels([i])
        places = np.repeat(np.arange(len(levels)), levels.sample_counts).tolist()
        draws = sorted(zip(places, levels.sample_ids.tolist(), levels.sample_repeats.tolist(), strict=True))
        exact = [getattr(levels, name).tolist() for name in ("counts", "ids", "levels", "side")]
        found.append((store.document(i), store.tokens(i).tolist(), store.loss_mask(i).tolist(), draws, *exact))
    return found


@pytest.mark.parametrize("pack", ["true", "false"])
def test_a_truncated_signal_is_what_a_plain_forward_pass_says(capture, saved_model, tmp_path, pack):
    capture("a", KINDS[0], f"data.pack={pack}", "teacher.engine={kind: transformers, logits_bytes: 9000}")
    store = Store(tmp_path / "a" / "store")
    model = AutoModelForCausalLM.from_pretrained(saved_model("llama", seed=2))
    assert len(store) > 24  # some texts are split
    for i in range(len(store)):
        tokens = torch.from_numpy(store.tokens(i).astype(np.int64))
        with torch.no_grad():
            logits = model(tokens[None]).logits[0, :-1, : store.manifest.num_columns].double()
        log_p = logits.log_softmax(-1)
        read = to_sparse(store.levels([i]), store.signal_config)
        wanted, ids = log_p.topk(5)
        assert torch.equal(read.ids, ids)
        assert (read.log_probs - wanted).abs().max() < 0.051
        assert read.label_log_probs is not None
        label = log_p.gather(1, tokens[1:, None]).squeeze(1)
        assert (read.label_log_probs - label).abs().max() < 0.0051
        assert read.entropy is not None
        assert (read.entropy - torch.special.entr(log_p.exp()).sum(-1)).abs().max() < 1 / 127
        for temperature in (1.0, 2.0):
            tempered = (logits / temperature).log_softmax(-1)
            rest = tempered.scatter(1, ids, -torch.inf).logsumexp(-1)
            assert (read.log_rests[temperature] - rest).abs().max() < 0.0051


@pytest.mark.parametrize("signal", KINDS, ids=lambda text: text.split()[1])
def test_what_is_said_does_not_depend_on_how_it_is_batched(capture, tmp_path, signal):
    capture("a", signal)
    capture("b", signal, "data.pack=false", "shard_positions=100",
            "teacher.engine={kind: transformers, batch_tokens: 40, logits_bytes: 5000}")  # fmt: skip
    one, other = contents(tmp_path / "a" / "store"), contents(tmp_path / "b" / "store")
    same = sum(a == b for a, b in zip(one, other, strict=True))
    assert [a[:3] for a in one] == [b[:3] for b in other]
    assert same >= len(one) - 2  # a logit that is rounded otherwise may fall on another level


def test_a_teacher_that_says_nothing_stops_a_capture_that_goes_on_when_it_speaks_again(capture, tmp_path, monkeypatch):
    small, run, calls = "shard_positions=150", hidden_states.last_hidden_states, count()
    capture("whole", KINDS[3], small)
    with monkeypatch.context() as patch:
        nan = lambda *of: run(*of) * (torch.nan if next(calls) == 3 else 1)  # noqa: E731
        patch.setattr(hidden_states, "last_hidden_states", nan)
        with pytest.raises(NonFiniteError, match=r"not finite in document \d+\n") as raised:
            capture("a", KINDS[3], small)
    assert {"position", "columns"} == raised.value.values.keys()
    assert 0 < len(Store(tmp_path / "a" / "store", partial=True)) < len(Store(tmp_path / "whole" / "store"))
    capture("a", KINDS[3], small, resume=True)
    assert contents(tmp_path / "a" / "store") == contents(tmp_path / "whole" / "store")


@pytest.mark.parametrize(("signal", "last"), list(zip(KINDS, (1, 2, 3, 2), strict=True)))
def test_a_capture_that_failed_goes_on_and_ends_the_same(capture, tmp_path, power_out, signal, last):
    small = ("shard_positions=150",)
    capture("whole", signal, *small)
    power_out(last + 1)
    with pytest.raises(OSError, match="the power is out"):
        capture("a", signal, *small)
    with pytest.raises(DataError, match="not complete"):
        Store(tmp_path / "a" / "store")
    assert json.loads((tmp_path / "a" / "run.json").read_text())["status"] == "failed"
    capture("a", signal, *small, resume=True)
    assert contents(tmp_path / "a" / "store") == contents(tmp_path / "whole" / "store")


def test_an_interrupted_capture_saves_what_it_has(capture, tmp_path, monkeypatch):
    import signal

    say = SignalCapture.capture

    def interrupt(self: SignalCapture, documents: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return say(self, documents)

    monkeypatch.setattr(SignalCapture, "capture", interrupt)
    with pytest.raises(Interrupted, match="interrupted after 8 of"):
        capture("a")
    monkeypatch.setattr(SignalCapture, "capture", say)
    assert len(Store(tmp_path / "a" / "store", partial=True)) == 8
    capture("a", resume=True)
    capture("whole")
    assert contents(tmp_path / "a" / "store") == contents(tmp_path / "whole" / "store")


def test_a_capture_that_is_done_is_left_as_it_is(capture, tmp_path):
    record = capture("a")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "a" / "store").iterdir()}
    assert capture("a", resume=True) == record
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "a" / "store").iterdir()} == before
    with pytest.raises(StorageError, match="exists"):
        capture("a")
    assert capture("a", "seed=1", overwrite=True)["store"] != record["store"]


def test_another_teacher_is_not_gone_on_with(capture, saved_model, power_out):
    power_out(2)
    with pytest.raises(OSError, match="power"):
        capture("a", "shard_positions=50")
    with pytest.raises(ConfigError, match="other settings"):
        capture("a", "shard_positions=50", f"teacher.model={saved_model('llama', seed=5)}", resume=True)


def test_the_teacher_answers_and_says_what_it_thinks_of_its_answers(capture, tmp_path):
    settings = ("signal={kind: top_k, k: 4, label: true}", "data.length=48", "data.max_documents=5",
                "data.overlong=cut", "generate={max_tokens: 6, answers: 2, prompt_tokens: 4}")  # fmt: skip
    capture("a", *settings)
    capture("b", *settings)
    assert contents(tmp_path / "a" / "store") == contents(tmp_path / "b" / "store")
    store = Store(tmp_path / "a" / "store")
    assert [store.document(i) for i in range(len(store))] == list(range(len(store)))
    assert len(store) % 2 == 0
    for i in range(len(store)):
        loss_mask = store.loss_mask(i)
        assert 1 <= loss_mask.sum() <= 6
        assert not loss_mask[:3].any()
        assert loss_mask[3:-1].all()
    assert {tuple(store.tokens(i)[:4]) for i in (0, 1)} == {tuple(store.tokens(0)[:4])}
    capture("greedy", "signal={kind: top_k, k: 4}", "data.length=48", "data.max_documents=5",
            "data.overlong=cut", "generate={max_tokens: 6, temperature: 0, prompt_tokens: 4}")  # fmt: skip
    store = Store(tmp_path / "greedy" / "store")
    for i in range(len(store)):
        kept = store.tokens(i)[1:][store.loss_mask(i)[:-1]]
        assert to_sparse(store.levels([i]), store.signal_config).ids[:, 0].tolist() == kept.tolist()


# --- what goes wrong, and going on -----------------------------------------------------------------------------------

SMALL = "shard_positions=150"


def saved(tmp_path: Path, name: str) -> dict[str, bytes]:
    """Every file of a store but its lock."""
    return {p.name: p.read_bytes() for p in (tmp_path / name / "store").glob("*.*") if p.name != ".lock"}


@pytest.mark.parametrize("at", [1, 2, 4])
def test_a_shard_that_could_not_be_written_leaves_no_gap(capture, tmp_path, monkeypatch, at):
    """The disk is full for a moment only, so what comes after the shard that failed could be written."""
    capture("whole", SMALL)
    flush, calls = StoreWriter.flush, []

    def fail(self: StoreWriter) -> None:
        calls.append(1)
        if len(calls) == at:
            raise StorageError("the disk is full", why="It is a test.", fix="Nothing.")
        flush(self)

    monkeypatch.setattr(StoreWriter, "flush", fail)
    with pytest.raises(StorageError, match="the disk is full"):
        capture("a", SMALL)
    monkeypatch.setattr(StoreWriter, "flush", flush)
    there = Store(tmp_path / "a" / "store", partial=True)
    assert [there.document(i) for i in range(len(there))] == list(range(len(there)))
    capture("a", SMALL, resume=True)
    assert contents(tmp_path / "a" / "store") == contents(tmp_path / "whole" / "store")


@pytest.mark.parametrize("last", [1, 2, 3])
def test_a_full_capture_that_failed_ends_with_the_same_bytes(capture, tmp_path, power_out, last):
    capture("whole", "signal={kind: full}", SMALL)
    power_out(last + 1)
    with pytest.raises(OSError, match="the power is out"):
        capture("a", "signal={kind: full}", SMALL)
    capture("a", "signal={kind: full}", SMALL, resume=True)
    whole = saved(tmp_path, "whole")
    assert len(whole) > 5
    assert saved(tmp_path, "a") == whole


def test_the_same_settings_make_the_same_bytes(capture, tmp_path):
    for name in ("a", "b"):
        capture(name, KINDS[3], SMALL)
    assert saved(tmp_path, "a") == saved(tmp_path, "b")


def test_a_capture_killed_after_its_last_shard_goes_on_to_the_end(capture, tmp_path, monkeypatch):
    record = capture("whole", SMALL)
    results = module._results

    def kill(*_: Any) -> Any:
        raise SystemExit

    monkeypatch.setattr(module, "_results", kill)
    with pytest.raises(SystemExit):
        capture("a", SMALL)
    monkeypatch.setattr(module, "_results", results)
    before = saved(tmp_path, "a")
    assert json.loads((tmp_path / "a" / "run.json").read_text())["status"] != "done"
    assert capture("a", SMALL, resume=True)["store"] == record["store"]
    assert saved(tmp_path, "a") == before


def test_data_that_changed_meanwhile_are_refused(capture, text_files, tmp_path, power_out):
    path = Path(shutil.copy(text_files / "train.jsonl", tmp_path / "data.jsonl"))
    power_out(2)
    with pytest.raises(OSError, match="the power is out"):
        capture("a", f"data.path={path}", "shard_positions=50")
    path.write_text(path.read_text().replace("teacher", "preacher"))
    before = saved(tmp_path, "a")
    with pytest.raises(MismatchError, match="has another data"):
        capture("a", f"data.path={path}", "shard_positions=50", resume=True)
    assert saved(tmp_path, "a") == before


def test_weights_that_changed_meanwhile_are_refused(capture, saved_model, tmp_path, power_out):
    model = Path(shutil.copytree(saved_model("llama", seed=2), tmp_path / "model"))
    power_out(2)
    with pytest.raises(OSError, match="the power is out"):
        capture("a", f"teacher.model={model}", "shard_positions=50")
    shutil.copy(saved_model("llama", seed=5) / "model.safetensors", model / "model.safetensors")
    with pytest.raises(MismatchError, match="has another teacher"):
        capture("a", f"teacher.model={model}", "shard_positions=50", resume=True)


@pytest.mark.parametrize(
    ("setting", "key"),
    [
        ("seed=1", "seed"),
        ("data.length=30", "data.length"),
        ("signal={kind: top_k, k: 6}", "signal.k"),
        ("teacher.columns=302", "teacher.columns"),
        ("teacher.engine={kind: transformers, dtype: bfloat16}", "teacher.engine.dtype"),
        ("generate={max_tokens: 4, prompt_tokens: 3}", "generate"),
    ],
)
def test_a_capture_is_not_gone_on_with_by_other_settings(capture, monkeypatch, setting, key):
    def fail(*_: Any) -> Any:
        raise OSError("the power is out")

    monkeypatch.setattr(SignalCapture, "capture", fail)
    with pytest.raises(OSError, match="the power is out"):
        capture("a", "signal={kind: top_k, k: 5}", "data.overlong=cut")
    with pytest.raises(ConfigError, match="other settings") as raised:
        capture("a", "signal={kind: top_k, k: 5}", "data.overlong=cut", setting, resume=True)
    assert any(found.startswith(key) for found in raised.value.values)


@pytest.mark.parametrize("setting", ["teacher.engine={kind: transformers, batch_tokens: 64, logits_bytes: 5000}",
                                     "shard_positions=70"])  # fmt: skip
def test_a_setting_that_may_change_changes_nothing_of_what_is_said(capture, tmp_path, power_out, setting):
    capture("whole", SMALL)
    power_out(3)
    with pytest.raises(OSError, match="the power is out"):
        capture("a", SMALL)
    capture("a", SMALL, setting, resume=True)
    one, other = (contents(tmp_path / name / "store") for name in ("a", "whole"))
    assert [document[:3] for document in one] == [document[:3] for document in other]
    assert sum(a != b for a, b in zip(one, other, strict=True)) <= 2  # which are rounded otherwise


def test_answers_are_not_gone_on_with_in_other_batches(capture, monkeypatch):
    words = (
        "signal={kind: top_k, k: 4}",
        "data.length=48",
        "data.overlong=cut",
        "generate={max_tokens: 6, prompt_tokens: 4}",
    )

    def fail(*_: Any) -> Any:
        raise OSError("the power is out")

    monkeypatch.setattr(SignalCapture, "capture", fail)
    with pytest.raises(OSError, match="the power is out"):
        capture("a", *words)
    with pytest.raises(ConfigError, match="other settings"):
        capture("a", *words, "teacher.engine={kind: transformers, batch_tokens: 48}", resume=True)


def test_answers_go_on_after_a_failure_as_if_there_had_been_none(capture, tmp_path, power_out):
    words = (
        "signal={kind: top_k, k: 4}",
        "data.length=48",
        "data.overlong=cut",
        "generate={max_tokens: 6, answers: 3, prompt_tokens: 4}",
    )
    capture("whole", *words, "shard_positions=50")
    power_out(3)
    with pytest.raises(OSError, match="the power is out"):
        capture("a", *words, "shard_positions=50")
    there = len(Store(tmp_path / "a" / "store", partial=True))
    assert 0 < there < len(Store(tmp_path / "whole" / "store"))
    capture("a", *words, "shard_positions=50", resume=True)
    assert contents(tmp_path / "a" / "store") == contents(tmp_path / "whole" / "store")


# --- whole folders ---------------------------------------------------------------------------------------------------


def test_overwriting_leaves_nothing_of_what_was_there(capture, tmp_path):
    capture("a", SMALL, KINDS[0])
    capture("a", KINDS[1], overwrite=True)
    capture("b", KINDS[1])
    assert saved(tmp_path, "a") == saved(tmp_path, "b")


def test_a_folder_of_something_else_is_never_overwritten(capture, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "thesis.txt").write_text("x")
    for flags in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(StorageError):
            capture("a", **flags)
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["thesis.txt"]


def test_two_captures_into_one_folder_are_refused(capture, tmp_path, monkeypatch):
    say, inside = SignalCapture.capture, []

    def nested(self: SignalCapture, documents: Any) -> Any:
        if not inside:
            inside.append(1)
            for flags in ({"resume": True}, {"overwrite": True}):
                with pytest.raises(StorageError, match="another run is at work"):
                    capture("a", **flags)
        return say(self, documents)

    monkeypatch.setattr(SignalCapture, "capture", nested)
    capture("a")
    assert inside
    capture("b")
    assert contents(tmp_path / "a" / "store") == contents(tmp_path / "b" / "store")


def test_it_tells_how_far_it_is(capture):
    told: list[tuple[str, dict[str, Any]]] = []
    record = capture("a", report=lambda event, values: told.append((event, dict(values))))
    found = [values for event, values in told if event == "capture"]
    assert len(found) == -(-record["store"]["documents"] // 8)
    assert [values["done"] for values in found] == sorted(values["done"] for values in found)
    assert found[-1]["done"] == found[-1]["total"] == record["store"]["documents"]
    assert record["status"] == "done"
    assert {"fingerprint", "documents"} <= record["data"].keys()


# --- secrets ---------------------------------------------------------------------------------------------------------


def test_secrets_are_not_written_down(capture, tmp_path, tokenizer_folder, monkeypatch):
    """An address with a password, and a key in a variable, stay out of every file, though nobody is at home there."""
    monkeypatch.setenv("MY_KEY", "k3y-of-mine")
    engine = "{kind: vllm, url: 'http://me:hunter2@127.0.0.1:9/v1?token=s3cret', key_variable: MY_KEY, retries: 0}"
    (tmp_path / "a").mkdir()  # a folder that the run made itself would be gone after the failure
    with pytest.raises(StillroomError) as raised:
        capture("a", "teacher.model=toy", f"teacher.tokenizer={tokenizer_folder}", f"teacher.engine={engine}",
                "signal={kind: top_k, k: 3}", overwrite=True)  # fmt: skip
    files = [p for p in (tmp_path / "a").rglob("*") if p.is_file()]
    assert json.loads((tmp_path / "a" / "run.json").read_text())["config"]["teacher"]["engine"]["key_variable"]
    for text in [str(raised.value), *(p.read_text(errors="replace") for p in files)]:
        assert not {word for word in ("hunter2", "s3cret", "k3y-of-mine") if word in text}


def test_a_resumed_capture_makes_the_same_windows(capture, monkeypatch):
    """A document that is batched with others is rounded otherwise, and its last levels with it."""
    say, asked, fails = SignalCapture.capture, [], [3]

    def watch(self: SignalCapture, documents: Any) -> Any:
        if len(asked) in fails:
            fails.clear()
            raise OSError("the power is out")
        asked.append([document.number for document in documents])
        return say(self, documents)

    monkeypatch.setattr(SignalCapture, "capture", watch)
    with pytest.raises(OSError, match="the power is out"):
        capture("a", SMALL)
    first = len(asked)
    capture("a", SMALL, resume=True)
    again = {window[0] // 8: window for window in asked[first:]}
    for window in asked[:first]:
        assert again.get(window[0] // 8, window) == window

"""Whole captures: what the store says, and that an interrupted one ends as if it had never been."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from stillroom.capture import run as module
from stillroom.capture import windows
from stillroom.capture.config import CaptureConfig
from stillroom.capture.model import ModelTeacher
from stillroom.capture.run import run
from stillroom.config import load
from stillroom.errors import ConfigError, DataError, Interrupted, StorageError
from stillroom.store.quantise import to_sparse
from stillroom.store.reader import Store

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
    for place in (module, windows):
        monkeypatch.setattr(place, "WINDOW_DOCUMENTS", 8)


def contents(path: Path) -> list[tuple[Any, ...]]:
    """All that a store says of each document. The order of draws means nothing, and depends on the shard."""
    store = Store(path)
    found = []
    for i in range(len(store)):
        levels = store.levels([i])
        places = np.repeat(np.arange(len(levels)), levels.draw_counts).tolist()
        draws = sorted(zip(places, levels.draw_ids.tolist(), levels.draw_times.tolist(), strict=True))
        exact = [getattr(levels, name).tolist() for name in ("counts", "ids", "levels", "side")]
        found.append((store.document(i), store.tokens(i).tolist(), store.keep(i).tolist(), draws, *exact))
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


@pytest.mark.parametrize("signal", KINDS, ids=lambda text: text.split()[1])
@pytest.mark.parametrize("last", [1, 2, 3])
def test_a_capture_that_failed_goes_on_and_ends_the_same(capture, tmp_path, monkeypatch, signal, last):
    small = ("shard_positions=150",)
    capture("whole", signal, *small)
    say, calls = ModelTeacher.say, []

    def fail(self: ModelTeacher, documents: Any) -> Any:
        calls.append(1)
        if len(calls) == last + 1:
            raise OSError("the power is out")
        return say(self, documents)

    monkeypatch.setattr(ModelTeacher, "say", fail)
    with pytest.raises(OSError, match="the power is out"):
        capture("a", signal, *small)
    monkeypatch.setattr(ModelTeacher, "say", say)
    with pytest.raises(DataError, match="not complete"):
        Store(tmp_path / "a" / "store")
    assert json.loads((tmp_path / "a" / "run.json").read_text())["status"] == "failed"
    capture("a", signal, *small, resume=True)
    assert contents(tmp_path / "a" / "store") == contents(tmp_path / "whole" / "store")


def test_an_interrupted_capture_saves_what_it_has(capture, tmp_path, monkeypatch):
    import signal

    say = ModelTeacher.say

    def interrupt(self: ModelTeacher, documents: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return say(self, documents)

    monkeypatch.setattr(ModelTeacher, "say", interrupt)
    with pytest.raises(Interrupted, match="interrupted after 8 of"):
        capture("a")
    monkeypatch.setattr(ModelTeacher, "say", say)
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


def test_parts_hold_every_document_once(capture, tmp_path):
    capture("whole", KINDS[3])
    found = []
    for index in range(3):
        capture(f"part-{index}", KINDS[3], f"part={{index: {index}, of: 3}}")
        found += contents(tmp_path / f"part-{index}" / "store")
    whole = contents(tmp_path / "whole" / "store")
    assert [document[:3] for document in found] == [document[:3] for document in whole]


def test_another_teacher_is_not_gone_on_with(capture, saved_model, monkeypatch):
    say, calls = ModelTeacher.say, []

    def fail(self: ModelTeacher, documents: Any) -> Any:
        calls.append(1)
        if len(calls) > 1:
            raise OSError("the power is out")
        return say(self, documents)

    monkeypatch.setattr(ModelTeacher, "say", fail)
    with pytest.raises(OSError, match="power"):
        capture("a", "shard_positions=50")
    with pytest.raises(ConfigError, match="other settings"):
        capture("a", "shard_positions=50", f"teacher.model={saved_model('llama', seed=5)}", resume=True)


def test_the_teacher_answers_and_says_what_it_thinks_of_its_answers(capture, tmp_path):
    settings = ("signal={kind: top_k, k: 4, label: true}", "data.length=48", "data.max_documents=5",
                "generate={max_tokens: 6, answers: 2, prompt_tokens: 4}")  # fmt: skip
    capture("a", *settings)
    capture("b", *settings)
    assert contents(tmp_path / "a" / "store") == contents(tmp_path / "b" / "store")
    store = Store(tmp_path / "a" / "store")
    assert [store.document(i) for i in range(len(store))] == list(range(len(store)))
    assert len(store) % 2 == 0
    for i in range(len(store)):
        keep = store.keep(i)
        assert 1 <= keep.sum() <= 6
        assert not keep[:3].any()
        assert keep[3:-1].all()
    assert {tuple(store.tokens(i)[:4]) for i in (0, 1)} == {tuple(store.tokens(0)[:4])}
    capture("greedy", "signal={kind: top_k, k: 4}", "data.length=48", "data.max_documents=5",
            "generate={max_tokens: 6, temperature: 0, prompt_tokens: 4}")  # fmt: skip
    store = Store(tmp_path / "greedy" / "store")
    for i in range(len(store)):
        kept = store.tokens(i)[1:][store.keep(i)[:-1]]
        assert to_sparse(store.levels([i]), store.signal_config).ids[:, 0].tolist() == kept.tolist()

"""Hidden states in a capture: those of a plain forward pass, whatever the batch; the size is told beforehand."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from stillroom.capture import signals
from stillroom.capture.config import CaptureConfig
from stillroom.capture.plan import make_plan
from stillroom.capture.run import run
from stillroom.capture.signals import SignalCapture
from stillroom.cli.capture import summary
from stillroom.config import load
from stillroom.errors import ConfigError, MismatchError, NonFiniteError
from stillroom.models import hidden_states
from stillroom.store.check import check
from stillroom.store.reader import Store

Settings = Callable[..., CaptureConfig]
INT8, BFLOAT16 = (f"hidden={{layers: [final_norm, 1, embeddings, 0], format: {name}}}" for name in ("int8", "bfloat16"))
PLACES = {"embeddings": 0, 0: 1, 1: 2, "final_norm": 3}
"""Where `output_hidden_states` has each of a model of three blocks: the last has gone through the final norm."""


@pytest.fixture
def settings(saved_model, text_files: Path, tmp_path: Path) -> Settings:
    def make(out: str, *words: str) -> CaptureConfig:
        model = saved_model("llama", seed=2, num_hidden_layers=3)
        given = [f"teacher.model={model}", f"data.path={text_files}/train.jsonl", "data.format=text",
                 "data.length=32", "signal={kind: full}", f"out={tmp_path / out}", *words]  # fmt: skip
        return load(CaptureConfig, None, given)

    return make


@pytest.fixture
def capture(settings: Settings, tmp_path: Path) -> Callable[..., Store]:
    def go(out: str, *words: str, **flags: Any) -> Store:
        run(settings(out, *words), **flags)
        return Store(tmp_path / out / "store")

    return go


def bytes_of(store: Store) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in Path(store.path).glob("0*.*")}


@pytest.mark.parametrize("words", [["data.pack=true", INT8], ["data.pack=false", BFLOAT16]])
def test_they_are_those_of_a_plain_forward_pass(capture, saved_model, words):
    batch = "teacher.engine={kind: transformers, batch_tokens: 50}"
    store = capture("a", "data.max_documents=9", batch, *words)
    model = AutoModelForCausalLM.from_pretrained(saved_model("llama", seed=2, num_hidden_layers=3))
    assert store.layers == ("embeddings", 0, 1, "final_norm")
    assert (store.manifest.hidden_width, store.manifest.num_layers) == (16, 3)
    for i in range(len(store)):
        tokens = torch.from_numpy(store.tokens(i).astype(np.int64))
        with torch.no_grad():
            out = model(tokens[None], output_hidden_states=True).hidden_states
        for layer, found in store.hidden([i]).items():
            wanted = out[PLACES[layer]][0].numpy()[store.loss_mask(i)]
            largest = np.abs(wanted).max(-1, keepdims=True)
            assert (np.abs(found - wanted) <= largest * (1 / 253 if INT8 in words else 1 / 255)).all()
    assert check(store.path).problems == []


def test_the_signals_are_those_of_a_capture_without_them(capture):
    plain, store = capture("plain", "shard_positions=500"), capture("a", "shard_positions=500", INT8)
    assert plain.manifest.format == 1
    assert [plain.logits([i]).tobytes() for i in range(len(plain))] == [
        store.logits([i]).tobytes() for i in range(len(store))
    ]


def test_a_capture_that_failed_goes_on_and_ends_with_the_same_bytes(capture, tmp_path, monkeypatch):
    """Also where few documents are asked about together, since their states are large."""
    each = 4 * (4 + 16)
    monkeypatch.setattr(signals, "WINDOW_BYTES", 3 * 32 * each)
    small = ("shard_positions=150", INT8)
    whole = capture("whole", *small)
    say, calls = SignalCapture.capture, []

    def fail(self: SignalCapture, documents: Any) -> Any:
        assert len(documents) <= 3
        calls.append(1)
        if len(calls) == 5:
            raise OSError("the power is out")
        return say(self, documents)

    monkeypatch.setattr(SignalCapture, "capture", fail)
    with pytest.raises(OSError, match="the power is out"):
        capture("a", *small)
    assert 0 < len(Store(tmp_path / "a" / "store", partial=True)) < len(whole)
    assert bytes_of(capture("a", *small, resume=True)) == bytes_of(whole)


def test_their_size_is_told_before_and_after(settings, tmp_path, monkeypatch):
    config, notes = settings("a", INT8), []
    assert "80 bytes a position; in all: not known before" in str(make_plan(config))
    record = run(config, report=lambda event, values: notes.append(values.get("text")) if event == "note" else None)
    positions = record["store"]["positions"]
    total = f"{record['store']['documents']:,} documents, {positions:,} positions: {80 * positions:,} bytes"
    (note,) = notes
    assert total in note
    assert " ".join(total.split()) in " ".join(str(make_plan(config)).split())
    store = Store(tmp_path / "a" / "store")
    assert sum(len(store.hidden_bytes(i)) for i in range(len(store))) == 80 * positions
    assert record["store"]["hidden_bytes_per_position"] == 80
    assert ", 80 of them hidden states" in summary(record)
    monkeypatch.setattr(signals, "WINDOW_DOCUMENTS", 4)
    part = settings("b", INT8, "part={index: 1, of: 3}")
    planned, there = str(make_plan(part)), run(part)["store"]
    assert 0 < there["documents"] < len(store)
    assert f"{there['documents']:,} documents, {there['positions']:,} positions:" in " ".join(planned.split())
    assert "hidden_bytes_per_position" not in run(settings("c"))["store"]


def test_a_state_that_is_no_number_stops_it_and_is_named(capture, monkeypatch):
    taken = hidden_states.all_hidden_states

    def broken(model, batch, *layers):
        last, inner = taken(model, batch, *layers)
        inner.states[1][7, 3] = torch.inf
        return last, inner

    monkeypatch.setattr(hidden_states, "all_hidden_states", broken)
    with pytest.raises(NonFiniteError, match=r"hidden states are not finite in document \d+\n") as raised:
        capture("a", BFLOAT16)
    assert raised.value.values["layer"] == 1
    assert raised.value.values["position"] == "7 (from 0)"
    assert raised.value.values["channels"] == "1 of 16 are infinite or too large for bfloat16"


def test_bad_settings_are_refused_before_anything_is_loaded(settings):
    with pytest.raises(MismatchError, match=r"hidden\.layers names a layer that is not there"):
        make_plan(settings("a", "hidden={layers: [0, 3]}"))
    server = "teacher.engine={kind: vllm, url: 'http://x/v1'}"
    for words, said in (
        (["hidden={layers: [0, 0]}"], "a layer is named twice"),
        (["hidden={layers: []}"], "at least 1"),
        (["hidden={layers: [0], format: int4}"], "int8"),
        ([server, "signal={kind: top_k}", "hidden={layers: [0]}"], "no server tells its hidden states"),
    ):
        with pytest.raises(ConfigError) as raised:
            settings("a", *words)
        assert said in str(raised.value)

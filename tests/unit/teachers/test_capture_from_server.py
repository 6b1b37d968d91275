"""Whole captures from a server: what is stored, and that a server which fails loses nothing."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import fake_server as fake_server_module
import numpy as np
import pytest
from fake_server import FakeServer, fake_server, status, toy_log_probs
from transformers import PreTrainedTokenizerFast

from stillroom.capture.config import CaptureConfig
from stillroom.capture.run import run
from stillroom.config import load
from stillroom.errors import ConfigError, StillroomError
from stillroom.store.quantize import to_sparse
from stillroom.store.reader import Store

Capture = Callable[..., dict[str, Any]]


@pytest.fixture
def server(tiny_tokenizer: PreTrainedTokenizerFast) -> Iterator[FakeServer]:
    with ExitStack() as stack:
        yield stack.enter_context(fake_server(tiny_tokenizer))


@pytest.fixture
def capture(server: FakeServer, tokenizer_folder: Path, text_files: Path, tmp_path: Path) -> Capture:
    def go(out: str, *settings: str, dialect: str = "vllm", **flags: Any) -> dict[str, Any]:
        words = ["teacher.model=toy", f"teacher.tokenizer={tokenizer_folder}",
                 f"teacher.engine={{kind: {dialect}, url: '{server.url}', retries: 0, prompt_price: 1000000.0}}",
                 f"data.path={text_files}/train.jsonl", "data.format=text", "data.length=32", "data.max_documents=6",
                 f"out={tmp_path / out}", *settings]  # fmt: skip
        return run(load(CaptureConfig, None, words), **flags)

    return go


def said(store: Store, server: FakeServer, i: int) -> np.ndarray:
    tokens = store.tokens(i).tolist()
    return np.stack([toy_log_probs(tokens[: p + 1], server.vocabulary) for p in np.flatnonzero(store.loss_mask(i))])


@pytest.mark.parametrize("signal", ["{kind: top_k, k: 7, label: true}", "{kind: top_p, mass: 0.9, most: 9}"])
def test_what_a_server_says_is_stored(capture, server, tmp_path, signal):
    record = capture("a", f"signal={signal}")
    store = Store(tmp_path / "a" / "store")
    assert len(store) >= 6
    for i in range(len(store)):
        thought = said(store, server, i)
        read = to_sparse(store.levels([i]), store.signal_config)
        found = read.log_probs.numpy()
        there = np.isfinite(found)
        wanted = np.take_along_axis(thought, read.ids.numpy(), 1)
        assert np.abs(found - wanted)[there].max() < 0.051
        assert (np.diff(wanted, axis=1) <= 0)[there[:, 1:]].all()
        rest = np.log1p(-np.where(there, np.exp(wanted), 0).sum(1))
        known = rest > -12  # what a server's float32 tells
        assert np.abs(read.log_rests[1.0].numpy() - rest)[known].max() < 0.006
    assert record["usage"]["requests"] == len(server.asked)
    assert record["usage"]["cost"] == record["usage"]["prompt_tokens"] >= sum(store.lengths)
    assert store.manifest.engine == "vllm"


def test_a_servers_answers_are_stored_with_what_it_said_of_them(capture, server, tmp_path):
    capture(
        "a",
        "signal={kind: top_k, k: 5, label: true}",
        "data.overlong=cut",
        "generate={max_tokens: 4, answers: 2, prompt_tokens: 3}",
    )
    store = Store(tmp_path / "a" / "store")
    assert [store.document(i) for i in range(len(store))] == list(range(len(store)))
    for i in range(len(store)):
        assert not store.loss_mask(i)[:2].any()
        thought = said(store, server, i)
        read = to_sparse(store.levels([i]), store.signal_config)
        assert read.ids.tolist() == np.argsort(-thought, 1, kind="stable")[:, :5].tolist()
        assert read.label_log_probs is not None
        labels = store.tokens(i)[1:][store.loss_mask(i)[:-1]].astype(np.int64)
        assert np.abs(read.label_log_probs.numpy() - thought[np.arange(len(labels)), labels]).max() < 0.006


@pytest.mark.parametrize("code", [500, 429, 404])
def test_a_server_that_fails_loses_nothing(capture, server, tmp_path, code):
    capture("whole", "signal={kind: top_k, k: 7}")
    before = len(server.asked)
    server.faults.extend([None, None, None, status(code)])
    with pytest.raises(StillroomError):
        capture("a", "signal={kind: top_k, k: 7}")
    server.faults.clear()
    record = capture("a", "signal={kind: top_k, k: 7}", resume=True)
    # Those before the failure cost money too; one that was called off may not have been heard.
    assert record["usage"]["requests"] >= len(server.asked) - before > 0
    one, other = (Store(tmp_path / name / "store") for name in ("a", "whole"))
    assert [one.tokens(i).tolist() for i in range(len(one))] == [other.tokens(i).tolist() for i in range(len(other))]
    for name in ("ids", "levels", "side"):
        whole = range(len(one))
        assert np.array_equal(getattr(one.levels(whole), name), getattr(other.levels(whole), name))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["signal={kind: sampled}"], "needs the whole distribution"),
        (["signal={kind: full}"], "needs the whole distribution"),
        (["signal={kind: top_k, k: 5, temperatures: [2.0]}"], "does not tell the entropy"),
        (["signal={kind: top_k, k: 5, entropy: true}"], "does not tell the entropy"),
        (["part={index: 2, of: 2}"], "counts from 0"),
        (["data.overlong=cut", "generate={max_tokens: 4}"], "prompt_tokens"),
        (["data.overlong=cut", "generate={max_tokens: 4, temperature: 0, answers: 2, prompt_tokens: 2}"], "must be 1"),
        (["data.overlong=cut", "generate={max_tokens: 32, prompt_tokens: 2}"], "no room"),
    ],
)
def test_settings_that_do_not_go_together_are_refused_in_words(capture, settings, words):
    with pytest.raises(ConfigError) as caught:
        capture("x", "signal={kind: top_k, k: 5}", *settings)
    assert words in str(caught.value)


def test_openai_tells_twenty_at_the_most(capture):
    with pytest.raises(ConfigError) as caught:
        capture("x", "signal={kind: top_k, k: 21}", dialect="openai")
    assert "tells 20 tokens a position at the most" in str(caught.value)


def test_a_confident_server_leaves_something_out(capture, tmp_path, monkeypatch):
    """Its log-probabilities are float32, and of a confident token their mass comes to 1; yet there are other tokens."""

    def sure(tokens: list[int], vocabulary: Any) -> np.ndarray:
        logits = 30 * toy_log_probs(tokens, vocabulary)
        logits -= logits.max()
        return (logits - np.log(np.exp(logits).sum())).astype(np.float32).astype(float)

    monkeypatch.setattr(fake_server_module, "toy_log_probs", sure)
    capture("a", "signal={kind: top_k, k: 7}")
    store = Store(tmp_path / "a" / "store")
    for i in range(len(store)):
        rests = to_sparse(store.levels([i]), store.signal_config).log_rests[1.0]
        assert (rests >= np.log(7 * 2**-24) - 0.01).all()

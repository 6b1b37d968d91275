"""Tasks asked of a model behind an address."""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from fake_server import FakeServer, fake_server
from transformers import PreTrainedTokenizerFast

from benchmarks import run_task
from stillroom.evaluate.config import LocalTask
from stillroom.evaluate.tasks.lm import EvalModel, answers, likelihoods, served_model


@pytest.fixture
def serve(tiny_tokenizer: PreTrainedTokenizerFast) -> Iterator[Any]:
    with ExitStack() as stack:
        yield lambda **settings: stack.enter_context(fake_server(tiny_tokenizer, **settings))


def behind(server: FakeServer, tokenizer: PreTrainedTokenizerFast | None, folder: str = "toy") -> EvalModel:
    return EvalModel("api", None, tokenizer, server.url, folder)


@pytest.mark.parametrize("settings", [{}, {"takes_ids": False}], ids=["ids", "text"])
def test_likelihoods_are_those_of_the_model(
    serve: Any, tiny_tokenizer: PreTrainedTokenizerFast, settings: dict[str, Any]
):
    server = serve(**settings)
    pairs = [("The still", " runs slowly"), ("A teacher", " says")]
    found = likelihoods(behind(server, tiny_tokenizer), pairs, str, lambda _: None)
    for one, (context, continuation) in zip(found, pairs, strict=True):
        tokens = tiny_tokenizer(context + continuation)["input_ids"]
        start = len(tiny_tokenizer(context)["input_ids"])
        rows = [server.think(tokens[:i]) for i in range(start, len(tokens))]
        wanted = sum(row[token] for row, token in zip(rows, tokens[start:], strict=True))
        assert one.log_likelihood == pytest.approx(wanted, abs=1e-4)
        assert one.greedy == all(row.argmax() == token for row, token in zip(rows, tokens[start:], strict=True))


def test_answers_are_the_likeliest_tokens_up_to_a_stop(serve: Any, tiny_tokenizer: PreTrainedTokenizerFast):
    server = serve()
    (whole,) = answers(behind(server, None), ["The still"], until=(), max_tokens=6, done=lambda _: None)
    tokens = tiny_tokenizer("The still")["input_ids"]
    for _ in range(6):
        tokens.append(int(server.think(tokens).argmax()))
    assert whole.text == "".join(server.text(t) for t in tokens[-6:])
    stop = whole.text[2]
    (found,) = answers(behind(server, None), ["The still"], until=(stop,), max_tokens=6, done=lambda _: None)
    assert found.text == whole.text[: whole.text.index(stop)]
    assert server.asked[-1][1]["stop"] == [stop]
    assert server.asked[-1][1]["temperature"] == 0


def test_the_only_model_of_a_server_is_taken(serve: Any):
    assert served_model(behind(serve(), None, "another name")) == "toy"


def test_a_server_that_does_not_echo_fails_with_its_reason(
    serve: Any, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
):
    (tmp_path / "items.jsonl").write_text(json.dumps({"a": "The still", "b": "still The"}) + "\n")
    (tmp_path / "task.yaml").write_text("kind: minimal_pairs\nname: x\nitems: items.jsonl\ngood: a\nbad: b\n")
    task = LocalTask(kind="local", path=str(tmp_path / "task.yaml"))
    found = run_task(task, [behind(serve(echoes=False), tiny_tokenizer)], tmp_path, seed=0)
    assert found.scores == {}
    assert found.failed is not None
    assert found.failed.startswith("the server echoes no log-probabilities")

"""Servers that behave, and servers that do not: in both dialects, over real connections on loopback."""

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import count
from typing import Any

import numpy as np
import pytest
from fake_server import (
    FakeServer,
    Fault,
    fake_server,
    half,
    half_without_length,
    hang_up,
    nested,
    status,
    toy_log_probs,
)
from transformers import PreTrainedTokenizerFast

from stillroom.errors import ConfigError, DataError, MismatchError, MissingError, StillroomError
from stillroom.teachers.engine import Answer, ServerEngine, TopLogProbs

TEXTS = (
    "The still runs slowly",
    "A teacher says",
    "User: how many drops?",
    "the student listens.",
    "12 drops, no more",
)
DIALECTS = ("vllm", "openai")
Serve = Callable[..., FakeServer]
Row = tuple[int, np.ndarray, np.ndarray]


@pytest.fixture
def serve(tiny_tokenizer: PreTrainedTokenizerFast) -> Iterator[Serve]:
    with ExitStack() as stack:
        yield lambda **settings: stack.enter_context(fake_server(tiny_tokenizer, **settings))


@pytest.fixture
def documents(tiny_tokenizer: PreTrainedTokenizerFast) -> list[Row]:
    """Numbered from 7; the first two positions of each do not count."""
    rows = [np.array(tiny_tokenizer(text)["input_ids"], np.int32) for text in TEXTS]
    return [(7 + i, row, np.arange(len(row) - 1) >= 2) for i, row in enumerate(rows)]


def engine_for(server: FakeServer, dialect: str = "vllm", **settings: Any) -> tuple[ServerEngine, list[float]]:
    """An engine that waits for nothing, and the waits that it would have made."""
    waits: list[float] = []

    async def wait(seconds: float) -> None:
        waits.append(seconds)

    values: dict[str, Any] = {"model": "toy", "top": 4, "concurrency": 2, "timeout_s": 20.0, **settings}
    engine = ServerEngine(url=server.url, dialect=dialect, tokenizer=server.tokenizer, **values)  # pyright: ignore
    engine.endpoint.wait = wait
    return engine, waits


def expected(server: FakeServer, row: Row, top: int = 4) -> TopLogProbs:
    """What the toy model itself thinks."""
    _, tokens, loss_mask = row
    thoughts = [toy_log_probs(tokens[: p + 1].tolist(), server.vocabulary) for p in np.flatnonzero(loss_mask)]
    best = [np.argsort(-thought)[:top] for thought in thoughts]
    return TopLogProbs(
        np.full(len(thoughts), top, np.int32),
        np.concatenate(best).astype(np.int32),
        np.concatenate([thought[i] for thought, i in zip(thoughts, best, strict=True)]).astype(np.float32),
        np.array([t[tokens[p + 1]] for t, p in zip(thoughts, np.flatnonzero(loss_mask), strict=True)], np.float32),
    )


def assert_same(found: TopLogProbs, wanted: TopLogProbs) -> None:
    for name in ("counts", "ids", "log_probs", "label_log_probs"):
        np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name), err_msg=name)
        assert getattr(found, name).dtype == getattr(wanted, name).dtype


@pytest.mark.parametrize(
    ("dialect", "settings"),
    [("vllm", {}), ("openai", {}), ("openai", {"takes_ids": False})],
    ids=["vllm", "ids", "text"],
)
def test_scores_are_those_of_the_model_in_order(
    serve: Serve, documents: list[Row], dialect: str, settings: dict[str, Any]
) -> None:
    server = serve(**settings)
    engine, _ = engine_for(server, dialect)
    found = list(engine.score(documents))
    assert [number for number, _ in found] == [number for number, _, _ in documents]
    for (_, one), row in zip(found, documents, strict=True):
        assert_same(one, expected(server, row))
    assert engine.usage.prompt_tokens >= sum(len(tokens) for _, tokens, _ in documents)
    assert engine.usage.requests == len(server.asked)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_more_tokens_than_the_vocabulary_are_the_whole_distribution(
    serve: Serve, documents: list[Row], dialect: str
) -> None:
    server = serve()
    top = 20 if dialect == "openai" else 10_000
    engine, _ = engine_for(server, dialect, top=top)
    (_, found), *_ = engine.score(documents[:1])
    assert found.counts.tolist() == [min(top, server.vocabulary.vocab_size)] * len(found.counts)
    sums = [np.exp(part.astype(float)).sum() for part in np.split(found.log_probs, np.cumsum(found.counts)[:-1])]
    assert max(sums) < 1 + 1e-6
    assert dialect == "openai" or min(sums) > 1 - 1e-6


def test_what_does_not_count_is_not_asked(serve: Serve) -> None:
    server = serve()
    engine, _ = engine_for(server)
    list(engine.score([]))
    assert not server.asked
    tokens = np.array([5, 6, 7], np.int32)
    ((_, found),) = engine.score([(0, tokens, np.zeros(2, bool))])
    assert [len(part) for part in (found.counts, found.ids, found.log_probs, found.label_log_probs)] == [0, 0, 0, 0]
    assert [body["prompt"] for _, body, _ in server.asked if body["prompt"] == tokens.tolist()] == []


def test_documents_are_taken_as_they_are_needed(serve: Serve, documents: list[Row]) -> None:
    server = serve()
    engine, _ = engine_for(server)
    taken = []

    def endless() -> Iterator[Row]:
        for number in range(1000):
            taken.append(number)
            yield number, *documents[0][1:]

    scores = engine.score(endless())
    assert [next(scores)[0] for _ in range(3)] == [0, 1, 2]
    scores.close()  # pyright: ignore
    assert len(taken) <= 3 + 4 * engine.endpoint.concurrency
    assert 1 <= server.most_under_way <= engine.endpoint.concurrency
    assert "stillroom-http" not in [thread.name for thread in threading.enumerate()]


@pytest.mark.parametrize(
    "fault",
    [status(429), status(500), status(502), status(503), status(504), half, half_without_length, hang_up, nested],
    ids=["429", "500", "502", "503", "504", "half", "half-without-length", "hang-up", "nested"],
)
@pytest.mark.parametrize("dialect", DIALECTS)
def test_what_may_pass_is_tried_again(serve: Serve, documents: list[Row], dialect: str, fault: Fault) -> None:
    server = serve()
    engine, waits = engine_for(server, dialect)
    engine._as_text = False  # so the faults meet the documents
    engine._aligned = True
    server.faults.extend([None, fault, fault, None, fault])
    found = list(engine.score(documents))
    assert [number for number, _ in found] == [number for number, _, _ in documents]
    for (_, one), row in zip(found, documents, strict=True):
        assert_same(one, expected(server, row))
    assert engine.usage.retries == len(waits) == 3
    assert engine.usage.requests == len(documents) + 3


def test_an_answer_that_does_not_come_is_asked_for_again(serve: Serve, documents: list[Row]) -> None:
    server, done = serve(), threading.Event()
    engine, waits = engine_for(server, timeout_s=0.2)
    engine._aligned = True
    server.faults.append(lambda *_: done.wait(20) and None)
    try:
        ((_, found),) = engine.score(documents[:1])
    finally:
        done.set()
    assert_same(found, expected(server, documents[0]))
    assert len(waits) >= 1


def test_waits_double_with_jitter_and_end(serve: Serve, documents: list[Row]) -> None:
    server = serve()
    engine, waits = engine_for(server, retries=9, concurrency=1)
    engine._aligned = True
    server.faults.extend([status(503, "the engine is starting")] * 10)
    with pytest.raises(MissingError) as caught:
        list(engine.score(documents))
    limits = [min(0.5 * 2**i, 60) for i in range(9)]
    assert all(limit / 2 <= wait <= limit for wait, limit in zip(waits, limits, strict=True))
    assert len(set(waits)) == 9
    for part in ("document 7", "503", "the engine is starting", "tries: 10"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("told", "least", "most"),
    [("7", 7, 7), ("0", 0, 0.5), ("99999", 600, 600), ("Wed, 21 Oct 2015 07:28:00 GMT", 0, 0.5), ("soon", 0, 0.5)],
)
def test_a_server_says_how_long_to_wait(
    serve: Serve, documents: list[Row], told: str, least: float, most: float
) -> None:
    server = serve()
    engine, waits = engine_for(server)
    engine._aligned = True
    server.faults.append(status(429, Retry_After=told))
    list(engine.score(documents[:1]))
    (wait,) = waits
    assert least <= wait <= most


def test_a_date_to_wait_for_is_in_the_future(serve: Serve, documents: list[Row]) -> None:
    server = serve()
    engine, waits = engine_for(server)
    engine._aligned = True
    server.faults.append(status(503, Retry_After="Fri, 31 Dec 9999 23:59:59 GMT"))
    list(engine.score(documents[:1]))
    assert waits == [600]


@pytest.mark.parametrize("fault", [half_without_length, nested])
def test_half_an_answer_each_time_is_an_error(serve: Serve, documents: list[Row], fault: Fault) -> None:
    server = serve()
    engine, waits = engine_for(server, retries=2)
    engine._aligned = True
    server.faults.extend([fault] * 10)
    with pytest.raises(DataError, match=r"document 7 cannot be read[\s\S]*not whole JSON[\s\S]*tries: 3"):
        list(engine.score(documents))
    assert len(waits) >= 2


@pytest.mark.parametrize(
    ("code", "kind"), [(400, DataError), (404, MissingError), (413, DataError), (401, ConfigError), (307, DataError)]
)
def test_a_refusal_is_not_tried_again(
    serve: Serve, documents: list[Row], code: int, kind: type[StillroomError]
) -> None:
    server = serve()
    engine, waits = engine_for(server)
    engine._aligned = True
    server.faults.extend([status(code, "the text is too long", Location="http://127.0.0.1:1/")] * 10)
    with pytest.raises(kind, match="the text is too long"):
        list(engine.score(documents))
    assert waits == []


def test_the_key_is_sent_and_never_told(
    serve: Serve, documents: list[Row], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    monkeypatch.setenv("TOY_KEY", "sesame-1234\n")
    server = serve()
    engine, _ = engine_for(server, key_variable="TOY_KEY")
    list(engine.score(documents[:1]))
    assert {headers["Authorization"] for _, _, headers in server.asked} == {"Bearer sesame-1234"}
    server.faults.extend([status(401, "no such key: Bearer sesame-1234")] * 10)
    with pytest.raises(ConfigError) as caught:
        list(engine.score(documents))
    assert "TOY_KEY" in str(caught.value)
    assert "no such key: Bearer ***" in str(caught.value)
    everything = f"{caught.value}{caught.value!r}{engine.endpoint!r}{vars(engine)}{caplog.text}"
    assert "sesame" not in everything


@pytest.mark.parametrize(
    ("value", "kind"),
    [(None, MissingError), ("", MissingError), (" ", MissingError), ("a b", ConfigError), ("clé", ConfigError)],
)
def test_a_key_that_cannot_be_is_refused(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, value: str | None, kind: type[StillroomError]
) -> None:
    monkeypatch.delenv("TOY_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("TOY_KEY", value)
    with pytest.raises(kind, match="TOY_KEY") as caught:
        engine_for(serve(), key_variable="TOY_KEY")
    assert not (value or "").strip() or str(value) not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["127.0.0.1:8000", "ftp://host/v1", "http://", "http://me:secret@host/v1", "http://h/v1?key=secret"]
)
def test_an_address_that_cannot_be_is_refused(tiny_tokenizer: PreTrainedTokenizerFast, url: str) -> None:
    with pytest.raises(ConfigError, match="address") as caught:
        ServerEngine(url=url, model="toy", dialect="vllm", tokenizer=tiny_tokenizer, top=4)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(("dialect", "top"), [("openai", 21), ("openai", 0), ("vllm", 0)])
def test_a_number_of_tokens_that_cannot_be_is_refused(
    tiny_tokenizer: PreTrainedTokenizerFast, dialect: Any, top: int
) -> None:
    with pytest.raises(ConfigError, match="so many tokens"):
        ServerEngine(url="http://h", model="toy", dialect=dialect, tokenizer=tiny_tokenizer, top=top)


def test_documents_must_fit_what_counts(serve: Serve) -> None:
    engine, _ = engine_for(serve())
    with pytest.raises(MismatchError, match="document 3"):
        list(engine.score([(3, np.array([1, 2, 3], np.int32), np.ones(3, bool))]))


def told(payload: dict[str, Any]) -> list[Any]:
    return payload["choices"][0]["prompt_logprobs"]


def least_likely(entries: dict[str, Any]) -> str:
    return min(entries, key=lambda number: entries[number]["logprob"])


VLLM_LIES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "one position fewer": (lambda a: told(a).pop(), "another number of tokens than it was sent"),
    "one position more": (lambda a: told(a).append(told(a)[-1]), "another number of tokens than it was sent"),
    "cut off": (lambda a: told(a).__delitem__(slice(3, None)), "another number of tokens than it was sent"),
    "other prompt ids": (lambda a: a["choices"][0]["prompt_token_ids"].__setitem__(1, 3), "other tokens"),
    "own token missing": (lambda a: told(a).__setitem__(1, {"5": {"logprob": -1.0}}), "other tokens"),
    "null position": (lambda a: told(a).__setitem__(4, None), "other tokens"),
    "no prompt_logprobs": (lambda a: a["choices"][0].pop("prompt_logprobs"), "tells no log-probabilities"),
    "no choice": (lambda a: a["choices"].clear(), "other answers"),
    "two choices": (lambda a: a["choices"].append(a["choices"][0]), "other answers"),
    "no choices at all": (lambda a: a.pop("choices"), "other answers"),
    "id too large": (lambda a: told(a)[4].update({"900": {"logprob": -9.0}}), "does not have"),
    "negative id": (lambda a: told(a)[4].update({"-3": {"logprob": -9.0}}), "does not have"),
    "id with a zero": (lambda a: told(a)[4].update({"05": {"logprob": -9.0}}), "does not have"),
    "id of many digits": (lambda a: told(a)[4].update({"9" * 5000: {"logprob": -9.0}}), "does not have"),
    "not a number": (lambda a: told(a)[4][least_likely(told(a)[4])].update(logprob=float("nan")), "that is none"),
    "minus infinity": (lambda a: told(a)[4][least_likely(told(a)[4])].update(logprob=float("-inf")), "that is none"),
    "positive": (lambda a: told(a)[4][least_likely(told(a)[4])].update(logprob=0.01), "that is none"),
    "a truth value": (lambda a: told(a)[4][least_likely(told(a)[4])].update(logprob=False), "that is none"),
    "a text": (lambda a: told(a)[4][least_likely(told(a)[4])].update(logprob="-1"), "that is none"),
    "mass of two": (lambda a: [entry.update(logprob=-0.1) for entry in told(a)[4].values()], "exceed 1"),
    "too few entries": (lambda a: [told(a)[i].pop(best(told(a)[i])) for i in range(3, 7)], "another number of tokens"),
    "too many entries": (
        lambda a: told(a)[4].update({str(i): {"logprob": -20.0} for i in range(20, 26)}),
        "another number of tokens than it was asked for",
    ),
}


def best(entries: dict[str, Any]) -> str:
    return max(entries, key=lambda number: entries[number]["logprob"])


@pytest.mark.parametrize("lie", VLLM_LIES)
def test_what_vllm_cannot_mean_is_refused(serve: Serve, documents: list[Row], lie: str) -> None:
    change, message = VLLM_LIES[lie]
    server = serve()
    server.alter, server.alter_after = change, 2
    engine, waits = engine_for(server)
    with pytest.raises(DataError, match=message) as caught:
        list(engine.score(documents))
    assert "document 7" in str(caught.value)
    assert waits == []


def test_rounding_above_zero_counts_as_zero(serve: Serve, documents: list[Row]) -> None:
    def change(payload: dict[str, Any]) -> None:
        for entries in told(payload)[1:]:
            first = best(entries)
            for number, entry in entries.items():
                entry["logprob"] = 0.0009 if number == first else -30.0

    server = serve()
    server.alter, server.alter_after = change, 2
    engine, _ = engine_for(server)
    ((_, found),) = engine.score(documents[:1])
    assert sorted(set(found.log_probs.tolist())) == [-30.0, 0.0]


def logprobs(payload: dict[str, Any]) -> Any:
    return payload["choices"][0]["logprobs"]


OPENAI_LIES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "one token fewer": (lambda a: [part.pop() for part in logprobs(a).values()], "another number of tokens"),
    "two tokens more": (lambda a: [part.extend(part[-2:]) for part in logprobs(a).values()], "number of tokens"),
    "lists that differ": (lambda a: logprobs(a)["token_logprobs"].pop(), "not of the form"),
    "another token": (lambda a: logprobs(a)["tokens"].__setitem__(3, "zz"), "other tokens"),
    "another count": (lambda a: a["usage"].update(prompt_tokens=3), "another number of tokens"),
    "null position": (lambda a: logprobs(a)["top_logprobs"].__setitem__(4, None), "does not tell what it expects"),
    "a list": (lambda a: logprobs(a)["top_logprobs"].__setitem__(4, [3]), "not of the form"),
    "part of a character": (lambda a: logprobs(a)["top_logprobs"][4].update({"�": -9.0}), "several, or none"),
    "nothing": (lambda a: logprobs(a)["top_logprobs"][4].update({"": -9.0}), "several, or none"),
    "no token": (lambda a: logprobs(a)["top_logprobs"][4].update({"no such token": -9.0}), "several, or none"),
    "no logprobs": (lambda a: a["choices"][0].update(logprobs=None), "echoes no log-probabilities"),
    "only its own": (
        lambda a: [part.__delitem__(slice(1, None)) for part in logprobs(a).values()], "echoes no log-probabilities"
    ),
}  # fmt: skip


@pytest.mark.parametrize("lie", OPENAI_LIES)
def test_what_a_server_with_echo_cannot_mean_is_refused(serve: Serve, documents: list[Row], lie: str) -> None:
    change, message = OPENAI_LIES[lie]
    server = serve()
    server.alter, server.alter_after = change, 3
    engine, _ = engine_for(server, "openai")
    with pytest.raises(DataError, match=message) as caught:
        list(engine.score(documents))
    assert "document 7" in str(caught.value)


def test_a_token_that_is_told_twice_is_refused(serve: Serve, documents: list[Row]) -> None:
    def change(payload: dict[str, Any]) -> None:
        entries = logprobs(payload)["top_logprobs"][4]
        entries[f"token_id:{server.tokenizer.convert_tokens_to_ids('e')}"] = -9.0
        entries["e"] = -9.0

    server = serve()
    server.alter, server.alter_after = change, 3
    engine, _ = engine_for(server, "openai")
    with pytest.raises(DataError, match="several, or none"):
        list(engine.score(documents))


@pytest.mark.parametrize("takes_ids", [True, False])
@pytest.mark.parametrize("ends", [0.0, 40.0], ids=["not among the likeliest", "the likeliest"])
def test_a_document_may_end_with_a_token_that_the_server_shows_as_nothing(
    serve: Serve, documents: list[Row], takes_ids: bool, ends: float
) -> None:
    server = serve(takes_ids=takes_ids)
    engine, _ = engine_for(server, "openai")
    list(engine.score(documents[:1]))
    server.ends = ends
    number, tokens, _ = documents[0]
    tokens = np.append(tokens, np.int32(1))
    ((_, found),) = engine.score([(number, tokens, np.arange(len(tokens) - 1) == len(tokens) - 2)])
    row = server.think(tokens[:-1].tolist())
    assert found.label_log_probs.tolist() == [np.float32(row[1])]
    assert found.ids.tolist() == np.argsort(-row)[:4].tolist()
    assert (1 in found.ids.tolist()) == (ends > 0)


def test_another_token_that_is_shown_as_nothing_is_never_taken_for_the_own_one(
    serve: Serve, documents: list[Row]
) -> None:
    """The own token is not among the likeliest, and stands in the place of one that is and looks the same."""

    def change(payload: dict[str, Any]) -> None:
        entries = logprobs(payload)["top_logprobs"][len(tokens) - 1]
        del entries[max((text for text in entries if text), key=lambda text: entries[text])]

    server = serve()
    number, tokens, _ = documents[0]
    tokens = np.append(tokens, np.int32(1))
    server.alter, server.alter_after = change, 3
    engine, _ = engine_for(server, "openai")
    with pytest.raises(DataError, match="several, or none"):
        list(engine.score([(number, tokens, np.arange(len(tokens) - 1) == len(tokens) - 2)]))


def test_a_server_without_echo_says_so(serve: Serve, documents: list[Row]) -> None:
    engine, _ = engine_for(serve(echoes=False), "openai")
    with pytest.raises(DataError, match="echoes no log-probabilities"):
        list(engine.score(documents))


@pytest.mark.parametrize(("dialect", "takes_ids"), [("vllm", True), ("openai", True), ("openai", False)])
def test_a_server_that_is_one_position_off_is_refused(
    serve: Serve, documents: list[Row], dialect: str, takes_ids: bool
) -> None:
    engine, _ = engine_for(serve(shifted=True, takes_ids=takes_ids), dialect)
    with pytest.raises(DataError, match="depends on that token"):
        list(engine.score(documents))


def test_a_server_that_takes_text_does_not_tell_the_first_position(serve: Serve, documents: list[Row]) -> None:
    engine, _ = engine_for(serve(takes_ids=False), "openai")
    number, tokens, loss_mask = documents[0]
    with pytest.raises(DataError, match="at the start of document 7"):
        list(engine.score([(number, tokens, np.ones_like(loss_mask))]))


def test_a_text_that_would_be_tokenized_otherwise_is_not_sent(serve: Serve, documents: list[Row]) -> None:
    server = serve(takes_ids=False)
    engine, _ = engine_for(server, "openai")
    _, tokens, _ = documents[0]
    letters = server.tokenizer.convert_tokens_to_ids(list("Thestill"))
    apart = np.array([tokens[0], *letters], np.int32)
    with pytest.raises(DataError, match="document 0 cannot be sent"):
        list(engine.score([(0, apart, np.ones(len(apart) - 1, bool))]))


def test_a_busy_server_is_not_taken_for_one_that_wants_text(serve: Serve, documents: list[Row]) -> None:
    server = serve()
    engine, _ = engine_for(server, "openai")
    server.faults.extend([status(500), None])
    list(engine.score(documents[:1]))
    assert isinstance(server.asked[-1][1]["prompt"], list)


def test_bad_proxy_settings_leave_no_thread(
    serve: Serve, documents: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, _ = engine_for(serve())
    monkeypatch.setenv("HTTP_PROXY", "nonsense://x")
    with pytest.raises(ValueError, match="proxy"):
        list(engine.score(documents))
    assert "stillroom-http" not in [thread.name for thread in threading.enumerate()]


def test_check(serve: Serve) -> None:
    server = serve()
    assert engine_for(server)[0].check() == {"model": "toy", "server": "vllm 0.99", "max_length": 64}
    assert engine_for(server, "openai")[0].check() == {"model": "toy", "server": "openai", "max_length": 64}
    server.version = False
    assert engine_for(server)[0].check() == {"model": "toy", "server": "vllm", "max_length": 64}
    with pytest.raises(MissingError, match=r"asked for: other     served: toy"):
        engine_for(server, model="other")[0].check()


def test_nobody_there(serve: Serve) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        server = serve()
        engine, waits = engine_for(server, retries=2)
        engine.endpoint.root = f"http://127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(MissingError, match="ConnectError"):
            engine.check()
    assert len(waits) == 2


CHAT = [{"role": "user", "content": "how many drops?"}]


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize(
    "prompt", ["The still", CHAT, np.array([0, 5, 6, 7], np.int32)], ids=["text", "chat", "tokens"]
)
def test_answers_are_those_of_the_model(serve: Serve, dialect: str, prompt: Any) -> None:
    server = serve()
    engine, _ = engine_for(server, dialect)
    (found,) = engine.generate([(3, prompt)], max_tokens=5, temperature=1.0, num_answers=3, seed=1)
    number, answers = found
    assert number == 3
    assert len({answer.tokens.tobytes() for answer in answers}) == len(answers) == 3
    text = "user: how many drops?\n" if prompt is CHAT else prompt
    start = prompt.tolist() if isinstance(prompt, np.ndarray) else server.tokenizer(text)["input_ids"]
    for answer in answers:
        assert answer.finish_reason == "length"
        assert answer.text == "".join(server.text(token) for token in answer.tokens.tolist())
        row = (0, np.array([*start, *answer.tokens], np.int32), np.arange(len(start) + 4) >= len(start) - 1)
        assert answer.log_probs is not None
        assert_same(answer.log_probs, expected(server, row))
    assert engine.usage.completion_tokens >= 15


@pytest.mark.parametrize("dialect", DIALECTS)
def test_an_answer_does_not_depend_on_what_else_is_asked(serve: Serve, dialect: str) -> None:
    engine, _ = engine_for(serve(), dialect)

    def answers(*prompts: tuple[int, str], seed: int | None = 1) -> dict[int, list[list[int]]]:
        found = engine.generate(prompts, max_tokens=5, temperature=1.0, num_answers=2, seed=seed, log_probs=False)
        return {number: [answer.tokens.tolist() for answer in several] for number, several in found}

    everything = answers((0, "A teacher"), (1, "A teacher"), (2, "User:"))
    assert answers((1, "A teacher")) == {1: everything[1]}
    assert everything[0] != everything[1]
    assert answers((1, "A teacher"), seed=2) != {1: everything[1]}
    assert list(everything) == [0, 1, 2]


def test_answers_without_log_probs_have_the_same_tokens(serve: Serve) -> None:
    for dialect in DIALECTS:
        engine, _ = engine_for(serve(), dialect)

        def answer(log_probs: bool, engine: ServerEngine = engine) -> Answer:
            (found,) = engine.generate(
                [(0, "A teacher")], max_tokens=5, temperature=0.0, seed=None, log_probs=log_probs
            )
            return found[1][0]

        assert answer(False).log_probs is None
        assert answer(True).tokens.tolist() == answer(False).tokens.tolist()


def test_text_is_sent_where_tokens_are_not_taken(serve: Serve) -> None:
    server = serve(takes_ids=False)
    engine, _ = engine_for(server, "openai")
    tokens = np.array(server.tokenizer("The still")["input_ids"], np.int32)
    ((_, (one,)),) = engine.generate([(0, tokens)], max_tokens=5, temperature=0.0, seed=None)
    ((_, (other,)),) = engine.generate([(0, "The still")], max_tokens=5, temperature=0.0, seed=None)
    assert one.tokens.tolist() == other.tokens.tolist()


WRITTEN_LIES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no logprobs": (lambda a: a["choices"][0].update(logprobs=None), "does not tell the tokens"),
    "empty logprobs": (lambda a: a["choices"][0].update(logprobs={}), "does not tell the tokens"),
    "a hidden token": (lambda a: a["usage"].update(completion_tokens=6), "other tokens than it wrote"),
    "a token too many": (lambda a: a["usage"].update(completion_tokens=4), "other tokens than it wrote"),
    "broken off": (lambda a: a["choices"][0].update(finish_reason="abort"), "broke off"),
    "no reason": (lambda a: a["choices"][0].pop("finish_reason"), "no text, or no reason"),
    "a number for a text": (lambda a: a["choices"][0].update(text=3), "no text, or no reason"),
    "an unclear token": (lambda a: logprobs(a)["tokens"].__setitem__(2, "�"), "several, or none"),
    "tops of another length": (lambda a: logprobs(a)["top_logprobs"].pop(), "not of the form"),
    "other choices": (lambda a: a["choices"].append(a["choices"][0]), "other answers"),
}


@pytest.mark.parametrize("lie", WRITTEN_LIES)
def test_an_answer_that_cannot_be_is_refused(serve: Serve, lie: str) -> None:
    change, message = WRITTEN_LIES[lie]
    server = serve()
    server.alter = change
    engine, _ = engine_for(server, "openai")
    with pytest.raises(DataError, match=message) as caught:
        list(engine.generate([(4, "A teacher")], max_tokens=5, temperature=1.0, seed=0))
    assert "prompt 4" in str(caught.value)


def test_the_token_that_ends_an_answer_may_be_hidden(serve: Serve) -> None:
    def change(payload: dict[str, Any]) -> None:
        payload["choices"][0]["finish_reason"] = "stop"
        payload["usage"]["completion_tokens"] += 1

    server = serve()
    server.alter = change
    engine, _ = engine_for(server, "openai")
    ((_, (answer,)),) = engine.generate([(4, "A teacher")], max_tokens=5, temperature=1.0, seed=0)
    assert answer.finish_reason == "stop"
    assert len(answer.tokens) == 5


def test_other_token_ids_than_their_log_probs_are_refused(serve: Serve) -> None:
    server = serve()
    server.alter = lambda payload: payload["choices"][0]["token_ids"].reverse()
    engine, _ = engine_for(server)
    with pytest.raises(DataError, match="other tokens"):
        list(engine.generate([(4, "A teacher")], max_tokens=5, temperature=1.0, seed=0))


def test_ctrl_c_stops_at_once_and_leaves_nothing(
    serve: Serve, documents: list[Row], capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    server, done = serve(), threading.Event()
    engine, _ = engine_for(server)
    engine._aligned = True
    numbers = count(1)

    def interrupt() -> None:
        if next(numbers) == engine.endpoint.concurrency:
            os.kill(os.getpid(), signal.SIGINT)
        done.wait(20)

    server.before = interrupt
    try:
        with pytest.raises(KeyboardInterrupt):
            list(engine.score(documents))
    finally:
        done.set()
    assert "stillroom-http" not in [thread.name for thread in threading.enumerate()]
    assert capsys.readouterr().err == ""
    assert "destroyed" not in caplog.text
    assert "never retrieved" not in caplog.text

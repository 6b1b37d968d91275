"""Asking: the likelihood of answers, and answers themselves, from a model in this process or behind an address."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stillroom.errors import DataError, MissingError
from stillroom.evaluate.tasks.generation import Written, cut, write
from stillroom.evaluate.tasks.likelihood import Likelihood, encode, log_likelihoods
from stillroom.teachers.http.client import Connection, Endpoint, connected, in_order
from stillroom.teachers.http.engine import ServerEngine

Report = Callable[[str, Mapping[str, Any]], None]
"""Is told of the answers so far: "task" with task, model, done and total; "note" with text."""

Done = Callable[[int], object]
"""Is told of the number of questions to a model that are answered."""

MOST_STOPS = 4
"""Strings at which OpenAI's interface ends an answer, at the most."""


class EvalModel(NamedTuple):
    """A model as tasks see it."""

    name: str
    model: PreTrainedModel | None
    """None for one behind an address."""
    tokenizer: PreTrainedTokenizerBase | None
    """Of one behind an address, where it is known."""
    url: str | None
    """The address of an OpenAI-compatible server."""
    folder: str
    """Its folder or hub name; of one behind an address, the name that it is served under."""


def likelihoods(
    asked: EvalModel, pairs: Sequence[tuple[str, str]], name: Callable[[int], str], done: Done
) -> list[Likelihood]:
    """The likelihood of each continuation after its context.

    Args:
        name: says what pair i is, for errors.

    Raises:
        MissingError: the tokenizer of a model behind an address is not known.
        StillroomError: a pair cannot be asked; the server does not say what it thinks of a given text.
    """
    if asked.model is not None and asked.tokenizer is not None:
        return log_likelihoods(asked.model, encode(asked.tokenizer, pairs, name), done=done)
    if asked.tokenizer is None:
        raise MissingError(
            f"{asked.name} cannot say how likely a given answer is",
            {"address": asked.url, "its tokenizer": "not known"},
            why="A server is asked about tokens, and only its model's tokenizer says where the answer begins.",
            fix="Name its tokenizer, or take tasks of the kind exact_match, which need only its text.",
        )
    requests = encode(asked.tokenizer, pairs, name)
    engine = ServerEngine(
        url=str(asked.url), model=served_model(asked), dialect="openai", tokenizer=asked.tokenizer, top=1
    )

    def documents() -> Any:
        for i, (context, continuation) in enumerate(requests):
            tokens = np.array(context + continuation, np.int32)
            yield i, tokens, np.arange(1, len(tokens)) >= len(context)

    found = []
    for i, told in engine.score(documents()):
        own, first = told.label_log_probs, told.ids[np.cumsum(told.counts) - told.counts]
        if np.isnan(own).any():
            raise _not_told(asked, name(i))
        greedy = bool((first == np.array(requests[i].continuation)).all())
        found.append(Likelihood(float(own.astype(np.float64).sum()), greedy, len(own), 0))
        done(len(found))
    return found


def answers(
    asked: EvalModel, prompts: Sequence[str], *, until: Sequence[str], max_tokens: int, done: Done
) -> list[Written]:
    """What the model writes after each prompt: its likeliest token at each step, up to the first of ``until``.

    Raises:
        StillroomError: the server gave none.
    """
    if asked.model is not None and asked.tokenizer is not None:
        return write(asked.model, asked.tokenizer, prompts, until=until, max_tokens=max_tokens, done=done)
    body: dict[str, Any] = {"model": served_model(asked), "max_tokens": max_tokens, "temperature": 0.0}
    if until:
        body["stop"] = list(until[:MOST_STOPS])

    async def first(_connection: Connection, _item: tuple[int, str]) -> None:
        pass

    async def ask(connection: Connection, item: tuple[int, str]) -> str:
        number, prompt = item
        payload = await connection.ask("/v1/completions", body | {"prompt": prompt}, f"question {number + 1}")
        try:
            text = payload["choices"][0]["text"]
        except (KeyError, IndexError, TypeError):
            text = None
        if not isinstance(text, str):
            raise _no_text(asked, number)
        return text

    found = []
    for text in in_order(Endpoint(str(asked.url)), enumerate(prompts), ask, first):
        found.append(Written(cut(text, until), 0))
        done(len(found))
    return found


def served_model(asked: EvalModel) -> str:
    """The name of the model that a server is to answer with: the one that is asked for, or its only one.

    Raises:
        MissingError: it serves several, and none by that name.
    """
    with connected(Endpoint(str(asked.url))) as (connection, submit):
        payload = submit(connection.ask("/v1/models", None, "its models")).result()
    data = payload.get("data") if isinstance(payload, dict) else None
    names = [str(m["id"]) for m in data if isinstance(m, dict) and "id" in m] if isinstance(data, list) else []
    if asked.folder in names or len(names) == 1:
        return asked.folder if asked.folder in names else names[0]
    raise MissingError(
        f"which model {asked.name} is, is not known",
        {"asked for": asked.folder, "served": ", ".join(names)[:200] or "none"},
        why="Another model would be taken for it.",
        fix="Name one that is served.",
    )


def _not_told(asked: EvalModel, question: str) -> DataError:
    return DataError(
        f"{asked.name} does not say how likely a given answer is",
        {"address": asked.url, "asked about": question},
        why="The server leaves out the log-probabilities of a text that it is given (echo).",
        fix="Use a server that echoes its prompt with log-probabilities, or tasks of the kind exact_match.",
    )


def _no_text(asked: EvalModel, number: int) -> DataError:
    return DataError(
        f"{asked.name} gave no text for question {number + 1}",
        {"address": asked.url, "expected": "choices[0].text"},
        why="An answer that is not there would count as wrong.",
        fix="Check that it is an OpenAI-compatible server that has /v1/completions.",
    )

"""The interface of tasks to a model, in this process or behind an address: log-likelihoods, and generated answers."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stillroom.data.chat_templates import end_of_turn
from stillroom.errors import DataError, MissingError
from stillroom.evaluate.tasks.likelihood import (
    Likelihood,
    encode,
    encoded,
    fitting,
    log_likelihoods,
)
from stillroom.models.generation import Sampling, Stops, cut, end_tokens, groups, own_stops, trimmed
from stillroom.models.generation import generate as write
from stillroom.models.loading import max_length
from stillroom.teachers.client import Connection, Endpoint, connected, in_order
from stillroom.teachers.engine import ServerEngine
from stillroom.tokenizers import template_of

Done = Callable[[int], object]
"""A function that is called with the number of questions to a model that are answered."""

MOST_STOPS = 4
"""The most strings at which OpenAI's interface ends an answer."""


class EvalModel(NamedTuple):
    """A model as tasks see it."""

    name: str
    model: PreTrainedModel | None
    """None for one behind an address."""
    tokenizer: PreTrainedTokenizerBase | None
    """The tokenizer; None for a model behind an address where it is not known."""
    url: str | None
    """The address of an OpenAI-compatible server."""
    folder: str
    """Its folder or hub name; behind an address, the name that it is served under."""


class Generation(NamedTuple):
    text: str
    num_cut: int
    """Tokens of the prompt that were too far back for the model to read."""


def likelihoods(
    lm: EvalModel, pairs: Sequence[tuple[str, str]], name: Callable[[int], str], done: Done
) -> list[Likelihood]:
    """The likelihood of each continuation after its context.

    Args:
        name: says what pair i is, for errors.

    Raises:
        MissingError: the tokenizer of a model behind an address is not known.
        StillroomError: a pair cannot be asked; the server gives no log-probabilities of a given text.
    """
    if lm.model is not None and lm.tokenizer is not None:
        return log_likelihoods(lm.model, encode(lm.tokenizer, pairs, name), done=done)
    if lm.tokenizer is None:
        raise MissingError(
            f"{lm.name} cannot say how likely a given answer is",
            {"address": lm.url, "its tokenizer": "not known"},
            why="A server is asked about tokens, and only its model's tokenizer says where the answer begins.",
            fix="Name its tokenizer, or take tasks of the kind exact_match, which need only its text.",
        )
    requests = encode(lm.tokenizer, pairs, name)
    engine = ServerEngine(url=str(lm.url), model=served_model(lm), dialect="openai", tokenizer=lm.tokenizer, top=1)

    def documents() -> Any:
        for i, (context, continuation) in enumerate(requests):
            tokens = np.array(context + continuation, np.int32)
            yield i, tokens, np.arange(1, len(tokens)) >= len(context)

    found = []
    for i, scored in engine.score(documents()):
        own, top = scored.label_log_probs, scored.ids[np.cumsum(scored.counts) - scored.counts]
        if np.isnan(own).any():
            raise DataError(
                f"{lm.name} does not say how likely a given answer is",
                {"address": lm.url, "asked about": name(i)},
                why="The server leaves out the log-probabilities of a text that it is given (echo).",
                fix="Use a server that echoes its prompt with log-probabilities, or tasks of the kind exact_match.",
            )
        greedy = bool((top == np.array(requests[i].continuation)).all())
        found.append(Likelihood(float(own.astype(np.float64).sum()), greedy, len(own), 0))
        done(len(found))
    return found


def answers(
    lm: EvalModel, prompts: Sequence[str], *, until: Sequence[str], max_tokens: int, done: Done
) -> list[Generation]:
    """The model's greedy continuation of each prompt, up to the first of ``until``.

    Raises:
        StillroomError: the server gave none.
    """
    if lm.model is not None and lm.tokenizer is not None:
        return generate(lm.model, lm.tokenizer, prompts, until=until, max_tokens=max_tokens, done=done)
    body: dict[str, Any] = {"model": served_model(lm), "max_tokens": max_tokens, "temperature": 0.0}
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
            raise DataError(
                f"{lm.name} gave no text for question {number + 1}",
                {"address": lm.url, "expected": "choices[0].text"},
                why="An answer that is not there would count as wrong.",
                fix="Check that it is an OpenAI-compatible server that has /v1/completions.",
            )
        return text

    found = []
    for text in in_order(Endpoint(str(lm.url)), enumerate(prompts), ask, first):
        found.append(Generation(cut(text, until), 0))
        done(len(found))
    return found


def served_model(lm: EvalModel) -> str:
    """The name of the model that a server is to answer with: the one that is named, or its only one.

    Raises:
        MissingError: it serves several, and none by that name.
    """
    with connected(Endpoint(str(lm.url))) as (connection, submit):
        payload = submit(connection.ask("/v1/models", None, "its models")).result()
    data = payload.get("data") if isinstance(payload, dict) else None
    names = [str(m["id"]) for m in data if isinstance(m, dict) and "id" in m] if isinstance(data, list) else []
    if lm.folder in names or len(names) == 1:
        return lm.folder if lm.folder in names else names[0]
    raise MissingError(
        f"which model {lm.name} is, is not known",
        {"asked for": lm.folder, "served": ", ".join(names)[:200] or "none"},
        why="Another model would be taken for it.",
        fix="Name one that is served.",
    )


# --- generation by a model in this process ---------------------------------------------------------------------------

CPU_TOKENS = 4096
"""Tokens of prompts and answers in a batch on a CPU."""
DEVICE_TOKENS = 65_536
"""The same in the first batch on another device; halved wherever its memory does not suffice."""


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    until: Sequence[str],
    max_tokens: int,
    num_tokens: int | None = None,
    done: Callable[[int], object] = lambda _: None,
) -> list[Generation]:
    """Continues each prompt up to the first of ``until``, an end of the model's own or ``max_tokens``.

    It takes the top-1 token at each step, whatever a model's own generation config says besides, such as a repetition
    penalty: a student and its teacher often have different ones.

    Prompts of like length share a batch where that does not change an answer (see `groups`). A prompt is cut at its
    left where the model could not read it and its answer whole; ``num_cut`` says by how much.

    Args:
        num_tokens: tokens in a batch, prompts and answers; None finds the number by itself.
        done: is called with the number of prompts that are answered.

    Raises:
        DataError: the model cannot read so many tokens as an answer may have.
        NonFiniteError: the logits are not numbers.
        OutOfMemoryError: the device has too little memory for a single prompt and its answer.
    """
    limit = max_length(model.config)
    if limit is not None and limit <= max_tokens:
        raise DataError(
            "an answer may be longer than the model can read",
            {"max_tokens": max_tokens, "the model reads": limit},
            why="There would be no room for a question.",
            fix=f"Set max_tokens in the description to less than {limit}.",
        )
    room = None if limit is None else limit - max_tokens
    whole = encoded(tokenizer, list(prompts))
    prefix = next((i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None), 0)
    ids = [(tokens if room is None else tokens[-room:]) or [cast(int, prefix)] for tokens in whole]
    cpu = next(model.parameters()).device.type == "cpu"
    budget = num_tokens or (CPU_TOKENS if cpu else DEVICE_TOKENS)
    ends = end_tokens(model, tokenizer, end_of_turn(tokenizer, template_of(tokenizer)))
    answer = partial(_generate, model, tokenizer, ids, [*until, *own_stops(model)], max_tokens, ends)
    found: dict[int, Generation] = {}
    for order in groups(model, [len(tokens) for tokens in ids], max_tokens):
        widths = [len(ids[i]) + max_tokens for i in order]
        for batch, texts in fitting(order, widths, budget, "a single answer", answer):
            for i, text in zip(batch, texts, strict=True):
                found[i] = Generation(text, max(0, len(whole[i]) - len(ids[i])))
            done(len(found))
    return [found[i] for i in range(len(prompts))]


def _generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[list[int]],
    until: Sequence[str],
    max_tokens: int,
    ends: Sequence[int],
    batch: Sequence[int],
) -> list[str]:  # kept: what is tried again in halves where the device's memory does not suffice
    prompts = [ids[i] for i in batch]
    stops, pad = Stops(until, tokenizer), ends[0] if ends else 0
    found = write(model, prompts, Sampling(max_tokens), ends=ends, pad_token=pad, stops=stops)
    texts = tokenizer.batch_decode([trimmed(answer, ends) for (answer,) in found], skip_special_tokens=True)
    return [cut(text, until) for text in texts]

"""Likelihood: the log-probability of continuations after their contexts, for many pairs at once.

Texts become tokens as lm-eval makes them, so that both give the same numbers: context and continuation are tokenized
together and parted where the context alone would end, and white space between them belongs to the continuation.

A row that begins another row is not read twice: the longer one answers for both, since no position sees what comes
after it. The common beginning of all rows, as examples before each question, is read once. Rows of like length share
a batch, padded at their ends, which no kept position sees. Only the logits of continuations are ever made, in chunks.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicCache, DynamicLayer

from stillroom.errors import DataError, NonFiniteError, OutOfMemoryError
from stillroom.lm_head import LMHead
from stillroom.models.hidden_states import backbone, lm_head
from stillroom.models.loading import max_length, rope_border

CPU_TOKENS = 2048
"""Tokens in a batch on a CPU, where more are no faster."""
DEVICE_TOKENS = 65_536
"""Tokens in the first batch on another device; halved wherever its memory does not suffice."""
LOGIT_BYTES = 256 * 2**20
"""The budget for logits."""
CACHE_BYTES = 2 * 2**20
"""The budget for logits on a CPU: they should stay in its cache from one operation to the next."""
SHARED_TOKENS = 16
"""A beginning that all rows share is read once from so many tokens on."""


class Request(NamedTuple):
    """A continuation whose likelihood is requested. Both parts have a token or more."""

    context: list[int]
    continuation: list[int]


class Likelihood(NamedTuple):
    log_likelihood: float
    """Σ log p(token | all tokens before it), in nats."""
    greedy: bool
    """Whether each token of the continuation is the top-1 one."""
    num_tokens: int
    """The length of the continuation."""
    num_cut: int
    """Tokens of the context that were too far back for the model to read."""


# --- text to tokens ---------------------------------------------------------------------------------------------------


def encode(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]], name: Callable[[int], str]
) -> list[Request]:
    """Pairs of context and continuation as tokens.

    Before a continuation without a context stands the beginning-of-sequence token, or else the end-of-sequence token.

    Args:
        name: gives the name of pair i, for errors.

    Raises:
        DataError: a continuation adds no token, or nothing can stand before it.
    """
    ends = [len(context.rstrip()) for context, _ in pairs]
    moved = [(pair[0][:end], pair[0][end:] + pair[1]) for pair, end in zip(pairs, ends, strict=True)]
    contexts = list(dict.fromkeys(context for context, _ in moved if context))
    before = dict(zip(contexts, encoded(tokenizer, contexts), strict=True))
    whole = encoded(tokenizer, [context + text for context, text in moved], plain=[not context for context, _ in moved])
    prefix = next((i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None), None)
    found = []
    for i, ((context, _), tokens) in enumerate(zip(moved, whole, strict=True)):
        if context:
            request = Request(tokens[: len(before[context])], tokens[len(before[context]) :])
        else:
            begun = prefix is None or tokens[:1] == [prefix]
            request = Request(tokens[:1], tokens[1:]) if begun else Request([cast(int, prefix)], tokens)
        if not request.context or not request.continuation:
            raise DataError(
                f"{name(i)}: an answer cannot be scored",
                {"tokens before it": len(request.context), "tokens of it": len(request.continuation)},
                why="The tokenizer makes no token of it that comes after another one, so it has no likelihood.",
                fix="Give it a context, or another text.",
            )
        found.append(request)
    return found


def encoded(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], plain: Sequence[bool] | None = None
) -> list[list[int]]:
    """The tokens of each text, with special tokens around it where it is not ``plain``. One that begins with the
    beginning-of-sequence token is given no second one."""
    bos = tokenizer.bos_token
    found: list[list[int]] = [[] for _ in texts]
    for add in (True, False):
        places = []
        for i, text in enumerate(texts):
            bare = (plain is not None and plain[i]) or (isinstance(bos, str) and text.startswith(bos))
            if bare != add:
                places.append(i)
        if places:
            some = [texts[i] for i in places]
            ids = tokenizer(some, add_special_tokens=add, return_attention_mask=False, verbose=False)["input_ids"]
            for i, tokens in zip(places, cast(list[list[int]], ids), strict=True):
                found[i] = tokens
    return found


# --- batches and errors ----------------------------------------------------------------------------------------------

R = TypeVar("R")
A = TypeVar("A")


def fitting(
    rows: Sequence[R], widths: Sequence[int], budget: int, what: str, answer: Callable[[Sequence[R]], A]
) -> Iterator[tuple[Sequence[R], A]]:
    """Rows, widest first, in batches of at most ``budget`` tokens that are halved wherever the device's memory does not
    suffice; each with its answer.

    Raises:
        OutOfMemoryError: the device has too little memory for ``what``, a single row.
    """
    place = 0
    while place < len(rows):
        batch = rows[place : place + max(1, budget // widths[place])]
        try:
            answered = answer(batch)
        except torch.OutOfMemoryError:
            if len(batch) > 1:
                budget = max(widths[place], budget // 2)
                continue
            raise OutOfMemoryError(
                f"the device has too little memory for {what}",
                {"tokens": widths[place], "batch": "1 row"},
                why="It cannot be done in parts.",
                fix="Use a smaller dtype or a device with more memory; for an answer, lower max_tokens.",
            ) from None
        yield batch, answered
        place += len(batch)


def not_a_number(values: Mapping[str, object]) -> NonFiniteError:
    return NonFiniteError(
        "what the model says is not a number",
        values,
        why="An answer would count as right or wrong by chance.",
        fix="Check its weights; where they are good, another dtype or attention may mend it.",
    )


# --- rows that a model reads ------------------------------------------------------------------------------------------


@dataclass
class RequestRow:
    """Tokens that a model reads, and the requests that they answer."""

    tokens: list[int]
    requested: list[tuple[int, int]]
    """(request, position from which on the next tokens are its continuation)."""


def _rows(requests: Sequence[Request], max_length: int | None) -> tuple[list[RequestRow], list[int]]:
    """Rows that answer all requests, longest first, and the tokens that each request's context loses at its left."""
    limit = (max_length or 1 << 62) + 1
    inputs, starts, cuts = [], [], []
    for context, continuation in requests:
        cut = max(len(context) + len(continuation) - limit, 0)
        cuts.append(min(cut, len(context)))
        inputs.append((context + continuation)[cut:-1])
        starts.append(max(len(context) - cut - 1, 0))
    rows: list[RequestRow] = []
    for i in sorted(range(len(inputs)), key=inputs.__getitem__, reverse=True):  # what it begins comes before it
        if rows and rows[-1].tokens[: len(inputs[i])] == inputs[i]:
            rows[-1].requested.append((i, starts[i]))
        else:
            rows.append(RequestRow(inputs[i], [(i, starts[i])]))
    return sorted(rows, key=lambda row: -len(row.tokens)), cuts


@torch.inference_mode()
def log_likelihoods(
    model: PreTrainedModel,
    requests: Sequence[Request],
    *,
    num_tokens: int | None = None,
    limit: int | None = None,
    done: Callable[[int], object] = lambda _: None,
) -> list[Likelihood]:
    """The likelihood of each continuation after its context.

    A context that is too long for the model is cut at its left, as lm-eval does it; ``num_cut`` says by how much.

    Args:
        num_tokens: tokens in a batch; None finds the number by itself.
        limit: tokens that the model can read; None takes the limit of its config.
        done: is called with the number of requests that are answered.

    Raises:
        DataError: a continuation alone is too long for the model.
        NonFiniteError: a log-likelihood is not a number.
        OutOfMemoryError: the device has too little memory for a single row.
    """
    limit = limit or max_length(model.config)
    for request in requests:
        if limit is not None and len(request.continuation) > limit:
            raise DataError(
                "an answer is too long for the model",
                {"tokens": len(request.continuation), "the model reads": limit},
                why="Its likelihood would be that of a part of it.",
                fix="Shorten or delete the item, or use a model that reads more.",
            )
    rows, cuts = _rows(requests, limit)
    border = rope_border(model.config)
    shared = _Shared(0, None) if border is not None else _Shared.read(model, rows)
    budget = num_tokens or (CPU_TOKENS if next(model.parameters()).device.type == "cpu" else DEVICE_TOKENS)
    # no batch has rows of both sides of the border at which the model changes its positions
    num_longer = 0 if border is None else sum(len(row.tokens) > border for row in rows)
    found: dict[int, Likelihood] = {}
    for side in (rows[:num_longer], rows[num_longer:]):
        widths, answer = [len(row.tokens) for row in side], partial(_answer, model, requests, shared)
        for _, answers in fitting(side, widths, budget, "a single text", answer):
            for i, log_likelihood, greedy in answers:
                if math.isnan(log_likelihood):
                    raise not_a_number({"log-likelihood": "not a number", "of": f"request {i} (from 0)"})
                found[i] = Likelihood(log_likelihood, greedy, len(requests[i].continuation), cuts[i])
            done(len(found))
    return [found[i] for i in range(len(requests))]


def _answer(
    model: PreTrainedModel, requests: Sequence[Request], shared: "_Shared", rows: Sequence[RequestRow]
) -> list[tuple[int, float, bool]]:
    """(request, log-likelihood, greedy) of each request that the rows answer."""
    hidden = shared.hidden(model, rows)
    width, device = hidden.shape[1], hidden.device
    places, targets, owners = [], [], []
    for number, row in enumerate(rows):
        for i, start in row.requested:
            continuation = requests[i].continuation
            first = number * width + start - shared.length
            owners.append((i, slice(len(places), len(places) + len(continuation))))
            places += range(first, first + len(continuation))
            targets += continuation
    hidden = hidden.flatten(0, 1)[torch.tensor(places, device=device)]
    log_probs, greedy = _next_log_probs(hidden, lm_head(model), torch.tensor(targets, device=device))
    return [(i, float(log_probs[part].sum()), bool(greedy[part].all())) for i, part in owners]


def _next_log_probs(hidden: Tensor, output: LMHead, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The log-probability of each position's next token (float64), and whether it is the top-1 token."""
    budget = CACHE_BYTES if hidden.device.type == "cpu" else LOGIT_BYTES
    rows = max(1, budget // (4 * output.vocab_size))
    log_probs, greedy = [], []
    for part, wanted in zip(hidden.split(rows), targets.split(rows), strict=True):
        logits = output.logits(part)
        own, most = logits.gather(1, wanted.unsqueeze(1)).squeeze(1), logits.amax(1)
        total = logits.sub_(most.unsqueeze(1)).exp_().sum(1)
        log_probs.append((own - most) - total.log())
        greedy.append(own == most)
    return torch.cat(log_probs).double().cpu(), torch.cat(greedy).cpu()


# --- the common beginning of all rows ---------------------------------------------------------------------------------


class _Shared:
    """The beginning that all rows share, read once: its keys and values go before each row."""

    def __init__(self, length: int, cache: DynamicCache | None) -> None:
        self.length, self._cache = length, cache

    @classmethod
    def read(cls, model: PreTrainedModel, rows: Sequence[RequestRow]) -> "_Shared":
        first = rows[0].tokens
        length = min((start for row in rows for _, start in row.requested), default=0)  # short of any that is requested
        for row in rows:
            length = next((i for i in range(length) if row.tokens[i] != first[i]), length)
        if len(rows) < 2 or length < SHARED_TOKENS:
            return cls(0, None)
        tokens = torch.tensor([first[:length]], device=next(model.parameters()).device)
        try:
            cache = getattr(backbone(model)(input_ids=tokens, use_cache=True), "past_key_values", None)
        except torch.OutOfMemoryError:  # it is read with each row, which says what does not suffice
            cache = None
        plain = type(cache) is DynamicCache and all(type(layer) is DynamicLayer for layer in cache.layers)
        return cls(length, cache) if plain else cls(0, None)  # windows and states of other kinds are read with each row

    def hidden(self, model: PreTrainedModel, rows: Sequence[RequestRow]) -> Tensor:
        """The last hidden states [rows, width, d] from the end of the beginning on, padded at the right."""
        width = max(len(row.tokens) for row in rows) - self.length
        padded = [row.tokens[self.length :] + [0] * (width + self.length - len(row.tokens)) for row in rows]
        inputs: dict[str, Any] = {"input_ids": torch.tensor(padded, device=next(model.parameters()).device)}
        if self._cache is None:
            return backbone(model)(**inputs, use_cache=False)[0]
        layers = [(layer.keys, layer.values) for layer in cast(list[Any], self._cache.layers)]
        cache = DynamicCache([tuple(x.expand(len(rows), -1, -1, -1) for x in layer) for layer in layers])
        return backbone(model)(**inputs, past_key_values=cache, use_cache=True)[0]

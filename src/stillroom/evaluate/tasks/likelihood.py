"""Likelihood: how likely a model finds a continuation of a context, for many pairs at once.

Texts become tokens as lm-eval makes them, so that both give the same numbers: context and continuation are tokenised
together and parted where the context alone would end, and white space between them belongs to the continuation.

A row that begins another row is not read twice: the longer one answers for both, since no position sees what comes
after it. What all rows begin with, as examples before each question, is read once. Rows of like length share a batch,
padded at their ends, which no kept position sees. Only the logits of continuations are ever made, in chunks.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

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
    """A continuation whose likelihood is asked for. Both parts have a token or more."""

    context: list[int]
    continuation: list[int]


class Likelihood(NamedTuple):
    log_likelihood: float
    """Σ log p(token | what stands before it), in nats."""
    greedy: bool
    """Whether each token of the continuation is the likeliest one."""
    num_tokens: int
    """Of the continuation."""
    num_cut: int
    """Tokens of the context that the model could not read, being too far back."""


# --- text to tokens ---------------------------------------------------------------------------------------------------


def encode(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]], name: Callable[[int], str]
) -> list[Request]:
    """Pairs of context and continuation as tokens.

    Before a continuation without a context stands the beginning-of-sequence token, or else the end-of-sequence token.

    Args:
        name: says what pair i is, for errors.

    Raises:
        DataError: a continuation adds no token, or nothing can stand before it.
    """
    moved = [_move_space(context, continuation) for context, continuation in pairs]
    contexts = list(dict.fromkeys(context for context, _ in moved if context))
    numbers = {context: i for i, context in enumerate(contexts)}
    before = encoded(tokenizer, contexts)
    whole = encoded(tokenizer, [context + continuation for context, continuation in moved if context])
    alone = encoded(tokenizer, [text for context, text in moved if not context], special_tokens=False)
    prefix = next((i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None), None)
    wholes, alones, found = iter(whole), iter(alone), []
    for i, (context, _) in enumerate(moved):
        if context:
            start, tokens = before[numbers[context]], next(wholes)
            request = Request(tokens[: len(start)], tokens[len(start) :])
        else:
            tokens = next(alones)
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


def _move_space(context: str, continuation: str) -> tuple[str, str]:
    stripped = context.rstrip()
    return stripped, context[len(stripped) :] + continuation


def encoded(tokenizer: PreTrainedTokenizerBase, texts: list[str], *, special_tokens: bool = True) -> list[list[int]]:
    """The tokens of each text. One that begins with the beginning-of-sequence token is given no second one."""
    bos = tokenizer.bos_token
    begun = [isinstance(bos, str) and text.startswith(bos) for text in texts]
    found: list[list[int]] = [[] for _ in texts]
    for add in (True, False):
        places = [i for i, has in enumerate(begun) if (special_tokens and not has) == add]
        if places:
            asked = [texts[i] for i in places]
            ids = tokenizer(asked, add_special_tokens=add, return_attention_mask=False, verbose=False)["input_ids"]
            for i, tokens in zip(places, cast(list[list[int]], ids), strict=True):
                found[i] = tokens
    return found


# --- rows that a model reads ------------------------------------------------------------------------------------------


@dataclass
class RequestRow:
    """Tokens that a model reads, and the requests that they answer."""

    tokens: list[int]
    asked: list[tuple[int, int]]
    """(request, position from which on the next tokens are its continuation)."""


def _rows(requests: Sequence[Request], max_length: int | None) -> tuple[list[RequestRow], list[int]]:
    """Rows that answer all requests, longest first, and what is cut from each request's context at its left."""
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
            rows[-1].asked.append((i, starts[i]))
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

    A context that is too long for the model is cut at its left, as lm-eval does it; ``num_cut`` tells by how much.

    Args:
        num_tokens: tokens in a batch; None finds the number by itself.
        limit: tokens that the model can read; None is what its config says.
        done: is told of the number of requests that are answered.

    Raises:
        DataError: a continuation alone is too long for the model.
        NonFiniteError: what the model says is not a number.
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
    device = next(model.parameters()).device
    budget = num_tokens or (CPU_TOKENS if device.type == "cpu" else DEVICE_TOKENS)
    found: list[Likelihood | None] = [None] * len(requests)
    place = answered = 0
    while place < len(rows):
        size = max(1, budget // (len(rows[place].tokens)))
        batch = _alike(rows[place : place + size], border)
        try:
            answers = _answer(model, batch, requests, shared)
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise _too_little_memory(len(batch[0].tokens)) from None
            budget = max(len(rows[place].tokens), budget // 2)
            continue
        for i, log_likelihood, greedy in answers:
            if math.isnan(log_likelihood):
                raise _not_a_number(i)
            found[i] = Likelihood(log_likelihood, greedy, len(requests[i].continuation), cuts[i])
        place, answered = place + len(batch), answered + len(answers)
        done(answered)
    return cast(list[Likelihood], found)


def _alike(rows: list[RequestRow], border: int | None) -> list[RequestRow]:
    """The first rows, as far as all lie on the same side of the border at which the model changes its positions."""
    if border is None:
        return rows
    longer = len(rows[0].tokens) > border
    return rows[: next((i for i, row in enumerate(rows) if (len(row.tokens) > border) != longer), len(rows))]


def _answer(
    model: PreTrainedModel, rows: Sequence[RequestRow], requests: Sequence[Request], shared: "_Shared"
) -> list[tuple[int, float, bool]]:
    """(request, log-likelihood, greedy) of each request that the rows answer."""
    hidden = shared.hidden(model, rows)
    width = hidden.shape[1]
    places, targets, owners = [], [], []
    for number, row in enumerate(rows):
        for i, start in row.asked:
            continuation = requests[i].continuation
            first = number * width + start - shared.length
            places += range(first, first + len(continuation))
            targets += continuation
            owners.append((i, len(continuation)))
    device = hidden.device
    log_probs, greedy = _next_log_probs(
        hidden.flatten(0, 1)[torch.tensor(places, device=device)], lm_head(model), torch.tensor(targets, device=device)
    )
    found, place = [], 0
    for i, length in owners:
        part = slice(place, place + length)
        found.append((i, float(log_probs[part].sum()), bool(greedy[part].all())))
        place += length
    return found


def _next_log_probs(hidden: Tensor, output: LMHead, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Of each position: the log-probability of its next token (float64) and whether it is the likeliest."""
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


# --- what all rows begin with -----------------------------------------------------------------------------------------


class _Shared:
    """The beginning that all rows share, read once: its keys and values go before each row."""

    def __init__(self, length: int, cache: DynamicCache | None) -> None:
        self.length, self._cache = length, cache

    @classmethod
    def read(cls, model: PreTrainedModel, rows: Sequence[RequestRow]) -> "_Shared":
        length = _common(rows)
        if len(rows) < 2 or length < SHARED_TOKENS:
            return cls(0, None)
        tokens = torch.tensor([rows[0].tokens[:length]], device=next(model.parameters()).device)
        try:
            cache = getattr(backbone(model)(input_ids=tokens, use_cache=True), "past_key_values", None)
        except torch.OutOfMemoryError:
            raise _too_little_memory(length) from None
        plain = isinstance(cache, DynamicCache) and all(type(layer) is DynamicLayer for layer in cache.layers)
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


def _common(rows: Sequence[RequestRow]) -> int:
    """Tokens that all rows begin with, short of any position that is asked about."""
    first = rows[0].tokens
    length = min((start for row in rows for _, start in row.asked), default=0)
    for row in rows:
        length = next((i for i in range(length) if row.tokens[i] != first[i]), length)
    return length


def _not_a_number(request: int) -> NonFiniteError:
    return NonFiniteError(
        "what the model says is not a number",
        {"log-likelihood": "not a number", "of": f"request {request} (from 0)"},
        why="An answer would count as right or wrong by chance.",
        fix="Check its weights; where they are good, another dtype or attention may mend it.",
    )


def _too_little_memory(length: int) -> OutOfMemoryError:
    return OutOfMemoryError(
        "the device has too little memory to score a single text",
        {"tokens": length, "batch": "1 row"},
        why="It cannot be read in parts.",
        fix="Use a smaller dtype, or a device with more memory.",
    )

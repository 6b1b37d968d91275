"""Text that a model writes: one function for all who want it, which gives the same answer alone and in a batch."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from stillroom.errors import DataError, MismatchError, NonFiniteError
from stillroom.models.hidden_states import lm_head
from stillroom.models.loading import rope_border


class Sampling(NamedTuple):
    """The settings by which answers are drawn."""

    max_tokens: int
    temperature: float = 0.0
    """0 takes the top token each time."""
    top_p: float = 1.0
    num_answers: int = 1
    """The number of answers to each prompt."""


class Stops(NamedTuple):
    """Texts of which the first ends an answer."""

    texts: Sequence[str]
    tokenizer: PreTrainedTokenizerBase


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int] | np.ndarray],
    sampling: Sampling,
    *,
    ends: Sequence[int],
    pad_token: int,
    seeds: Sequence[int] = (),
    vocab_size: int | None = None,
    stops: Stops | None = None,
    check: Callable[[Tensor, int], None] | None = None,
    stopped: Callable[[], bool] = lambda: False,
    streamer: BaseStreamer | None = None,
) -> list[list[np.ndarray]]:
    """Returns the answers to each prompt, int32 [m], each up to its first end, with it.

    Nothing of the model's own generation config counts but its ends (see `end_tokens` and `own_stops`): how to draw is
    said by settings; beams, penalties, guidance and other searches are set aside. torch's own generators are left as
    they were. Prompts of different lengths are padded at their left, so they must be of one group of `groups`.

    Args:
        ends: the tokens that end an answer.
        seeds: one of each prompt; its answers are drawn by it alone, whatever shares its batch. Not needed at
            temperature 0.
        vocab_size: no token from here on is generated.
        stops: they end an answer, too; the token that completes one is its last.
        check: is called with the logits of each step, [prompts · answers, vocab], and the number of tokens written so
            far, and raises where they are not finite.
        stopped: tells after each token whether to write no more.
        streamer: is given each token of a single prompt and answer.

    Raises:
        MismatchError: a prompt has a token that the model has no embedding for.
        NonFiniteError: the logits at a position are no distribution.
    """
    _check_tokens(model, prompts)
    each = sampling.num_answers
    ids, mask = _padded([prompt for prompt in prompts for _ in range(each)], pad_token, model.device)
    width = ids.shape[1]
    generators = [torch.Generator().manual_seed(derived_seed(seed, "answer", j)) for seed in seeds for j in range(each)]

    def choose(input_ids: Tensor, scores: Tensor) -> Tensor:
        (check or _check_finite)(scores, input_ids.shape[1] - width)
        tokens = draw(scores[:, :vocab_size], sampling, generators)
        return torch.full_like(scores, -torch.inf).scatter(-1, tokens.to(scores.device), 0.0)

    ended = _Ended(stops, width, stopped)
    with _set_aside(model):
        written = cast(Callable[..., Tensor], model.generate)(
            ids,
            attention_mask=mask,
            generation_config=GenerationConfig(
                do_sample=False,
                max_new_tokens=sampling.max_tokens,
                pad_token_id=pad_token,
                eos_token_id=list(ends) or None,
            ),
            logits_processor=LogitsProcessorList([choose]),  # pyright: ignore[reportArgumentType]
            stopping_criteria=StoppingCriteriaList([ended]),
            streamer=streamer,
        )
    rows = []
    for number, row in enumerate(written[:, width:].cpu().numpy().astype(np.int32)):
        last = ended.lengths.get(number, len(row))
        places = np.flatnonzero(np.isin(row[:last], ends))
        rows.append(row[: places[0] + 1 if len(places) else last])
    return [rows[i : i + each] for i in range(0, len(rows), each)]


def _check_finite(logits: Tensor, num_written: int) -> None:
    if not logits.amax(dim=-1).isfinite().all():
        raise NonFiniteError(
            "what the model says is not a number",
            {"logits": "not finite", "at": f"token {num_written} of its answer (from 0)"},
            why="The next token would be chosen by chance.",
            fix="Check its weights; where they are good, another dtype or attention may mend it.",
        )


def draw(logits: Tensor, sampling: Sampling, generators: Sequence[torch.Generator]) -> Tensor:
    """Returns a token of each row, [n, 1]: the top one at temperature 0, or one drawn by the row's own generator, on
    the CPU, so that every device draws the same but for rounding."""
    if not sampling.temperature:
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits.cpu() if logits.is_mps else logits  # which has no float64
    probabilities = torch.softmax(logits.double() / sampling.temperature, dim=-1)
    if sampling.top_p < 1:
        ordered, ids = probabilities.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(dim=-1) - ordered
        probabilities = torch.zeros_like(probabilities).scatter(-1, ids, ordered * (before < sampling.top_p))
    below = probabilities.cumsum(dim=-1)
    uniform = torch.stack([torch.rand(1, generator=generator, dtype=torch.float64) for generator in generators])
    return torch.searchsorted(below, uniform.to(below.device) * below[:, -1:], right=True)


class _Ended(StoppingCriteria):
    """Ends each row with the first of some texts after the prompt, and all when they are to stop."""

    def __init__(self, stops: Stops | None, width: int, stopped: Callable[[], bool]) -> None:
        self.stops, self.width, self.stopped = stops, width, stopped
        self.texts = [text for text in stops.texts if text] if stops is not None else []
        self.window = 4 * max((len(text.encode()) for text in self.texts), default=0) + 2  # tokens that can hold one
        self.lengths: dict[int, int] = {}
        """The tokens that were written of the rows that a text ended."""

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:  # noqa: ARG002
        if self.stops is not None and self.texts:
            for row, tokens in enumerate(input_ids[:, self.width :][:, -self.window :].tolist()):
                if row not in self.lengths:
                    text = cast(str, self.stops.tokenizer.decode(tokens))
                    if any(stop in text for stop in self.texts):
                        self.lengths[row] = input_ids.shape[1] - self.width
        stop = self.stopped()
        return torch.tensor([stop or row in self.lengths for row in range(len(input_ids))], device=input_ids.device)


def cut(text: str, until: Sequence[str]) -> str:
    """The text before the first of ``until``."""
    return text[: min((place for stop in until if (place := text.find(stop)) >= 0), default=len(text))]


def _padded(prompts: Sequence[Any], pad_token: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The prompts as rows, padded at their left, and the mask of what is no padding."""
    width = max(map(len, prompts))
    ids = np.full((len(prompts), width), pad_token, np.int64)
    mask = np.zeros((len(prompts), width), np.int64)
    for row, tokens in enumerate(prompts):
        ids[row, width - len(tokens) :], mask[row, width - len(tokens) :] = tokens, 1
    return torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)


def _check_tokens(model: PreTrainedModel, prompts: Sequence[Any]) -> None:
    rows = cast(Any, model.get_input_embeddings()).weight.shape[0]
    largest = max(max(tokens) for tokens in prompts)
    if largest >= rows:
        raise MismatchError(
            "a prompt has a token that the model has no embedding for",
            {"token": int(largest), "the model's embeddings": rows},
            why="The tokenizer has tokens that the model was never given, so it cannot read the prompt.",
            fix="Use the model's own tokenizer, or give the model embeddings for the tokens that were added to it.",
        )


@contextmanager
def _set_aside(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the model has no generation config of its own, of which `generate` would take what ours leaves open."""
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


# --- which prompts may share a batch ---------------------------------------------------------------------------------
def groups(model: PreTrainedModel, lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """The places of prompts by their ``lengths``, longest first, in groups: what a model writes after a prompt does not
    depend on others of its group that share a batch with it.

    All are in one group, unless the family sees padding (prompts of one length share a group then), or changes its
    positions by the longest row (prompts that stay below the border share one, and all others go alone).
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i], reverse=True)
    border = rope_border(model.config)
    alone = [] if border is None else [i for i in order if lengths[i] + max_tokens > border]
    rest = order[len(alone) :]
    found = [[i] for i in alone]
    if len({lengths[i] for i in rest}) < 2 or stands_padding(model):
        return found + ([rest] if rest else [])
    by_length: dict[int, list[int]] = {}
    for i in rest:
        by_length.setdefault(lengths[i], []).append(i)
    return found + list(by_length.values())


@torch.no_grad()
def stands_padding(model: PreTrainedModel) -> bool:
    """Whether what a model says of a prompt stays the same where it is padded at its left, as in a batch with a longer
    one. It is tried once for each model, on a few tokens, and remembered."""
    known = getattr(model, "_stands_padding", None)
    if known is None:
        generator = torch.Generator().manual_seed(0)
        rows = cast(Any, model.get_input_embeddings()).weight.shape[0]
        tokens = torch.randint(0, min(rows, lm_head(model).vocab_size), (24,), generator=generator).tolist()
        short, longer, rest, pad = tokens[:3], tokens[3:16], tokens[16:20], tokens[20]
        alone, batched = (_follow(model, prompts, rest, pad) for prompts in ([short], [longer, short]))
        plain = next(model.parameters()).dtype in (torch.float32, torch.float64)
        apart = (alone - batched).abs().max() / alone.abs().max().clamp_min(1e-6)
        known = bool(apart <= (1e-3 if plain else 5e-2))
        cast(Any, model)._stands_padding = known
    return known


def _follow(model: PreTrainedModel, prompts: list[list[int]], rest: list[int], pad_token: int) -> Tensor:
    """The logits [n, vocab] of the last prompt, at each of the tokens that are written, which are ``rest``."""
    seen: list[Tensor] = []

    def follow(input_ids: Tensor, scores: Tensor) -> Tensor:  # noqa: ARG001
        seen.append(scores[-1].float().clone())
        forced = torch.full_like(scores, -torch.inf)
        forced[:, rest[len(seen) - 1]] = 0.0
        return forced

    ids, mask = _padded(prompts, pad_token, model.device)
    with _set_aside(model):
        cast(Any, model.generate)(
            ids,
            attention_mask=mask,
            generation_config=GenerationConfig(do_sample=False, max_new_tokens=len(rest), pad_token_id=pad_token),
            logits_processor=LogitsProcessorList([follow]),  # pyright: ignore[reportArgumentType]
        )
    return torch.stack(seen)


# --- what counts of a model's own generation config ------------------------------------------------------------------
def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, turn_end: str | None) -> list[int]:
    """All tokens that end what a model writes: those of its generation config and its config, the tokenizer's, and
    the end of turn of its chat template where that is a token made for it.

    Raises:
        DataError: a config names something that is no token.
    """
    found: list[int] = []
    config = model.config.get_text_config()
    for name, said in (
        ("generation_config.json", getattr(model.generation_config, "eos_token_id", None)),
        ("config.json", getattr(config, "eos_token_id", None)),
    ):
        several = said if isinstance(said, list | tuple) else [said]
        if any(one is not None and (not isinstance(one, int) or isinstance(one, bool)) for one in several):
            raise _ill_typed(name, "eos_token_id", said, "a token's number, or a list of them")
        found += [one for one in several if one is not None]
    found += [tokenizer.eos_token_id] if isinstance(tokenizer.eos_token_id, int) else []
    if turn_end:
        tokens = cast(list[int], tokenizer(turn_end, add_special_tokens=False)["input_ids"])
        found += tokens if len(tokens) == 1 and tokens[0] in tokenizer.added_tokens_decoder else []
    return [end for end in dict.fromkeys(found) if end >= 0]


def own_stops(model: PreTrainedModel) -> list[str]:
    """The texts at which a model's own generation config ends what it writes. Raises DataError where they are none."""
    said = getattr(model.generation_config, "stop_strings", None)
    texts = [said] if isinstance(said, str) else [] if said is None else said
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise _ill_typed("generation_config.json", "stop_strings", said, "a text, or a list of texts")
    return [text for text in texts if text]


def _ill_typed(file: str, key: str, said: object, expected: str) -> DataError:
    return DataError(
        f"`{key}` in the model's {file} cannot be used",
        {"found": f"{said!r:.100}", "expected": expected},
        why="It says where the model's text ends, and would be left out silently.",
        fix=f"Mend {file}, or take `{key}` out of it.",
    )


def trimmed(tokens: np.ndarray, ends: Iterable[int]) -> list[int]:
    """An answer without the end that it came to."""
    written = tokens.tolist()
    return written[:-1] if written and written[-1] in ends else written


def derived_seed(seed: int, purpose: str, number: int) -> int:
    """Returns a seed of 63 bits for one of many things that are drawn independently of each other."""
    digest = hashlib.sha256(f"{purpose} {seed} {number}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1

"""Generation: what a model writes after a prompt, its likeliest token at each step."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.logits_process import LogitsProcessorList
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList

from stillroom.errors import DataError, NonFiniteError, OutOfMemoryError
from stillroom.evaluate.tasks.likelihood import encoded
from stillroom.models.loading import max_length

CPU_TOKENS = 4096
"""Tokens of prompts and answers in a batch on a CPU."""
DEVICE_TOKENS = 65_536
"""The same in the first batch on another device; halved wherever its memory does not suffice."""


class Written(NamedTuple):
    text: str
    num_cut: int
    """Tokens of the prompt that the model could not read, being too far back."""


def cut(text: str, until: Sequence[str]) -> str:
    """The text before the first of ``until``."""
    return text[: min((place for stop in until if (place := text.find(stop)) >= 0), default=len(text))]


class _Until(StoppingCriteria):
    """Ends each row with the first of some strings in what was written after the prompts."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, until: Sequence[str], num_prompt: int) -> None:
        self.tokenizer, self.until, self.num_prompt = tokenizer, [stop for stop in until if stop], num_prompt
        self.window = 4 * max((len(stop.encode()) for stop in self.until), default=0) + 2  # tokens that can hold one
        self.done: list[bool] = []

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:  # noqa: ARG002
        self.done = self.done or [False] * len(input_ids)
        for row, tokens in enumerate(input_ids[:, self.num_prompt :][:, -self.window :].tolist()):
            if not self.done[row]:
                text = cast(str, self.tokenizer.decode(tokens))
                self.done[row] = any(stop in text for stop in self.until)
        return torch.tensor(self.done, device=input_ids.device)


class _Finite(LogitsProcessor):
    """Refuses logits that are not numbers, of which `generate` would take the first as the likeliest."""

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        if torch.isnan(scores).any():
            raise NonFiniteError(
                "what the model says is not a number",
                {"logits": "not a number", "at": f"token {input_ids.shape[1]} (from 0) of a prompt and its answer"},
                why="What it writes would mean nothing.",
                fix="Check its weights; where they are good, another dtype or attention may mend it.",
            )
        return scores


@torch.inference_mode()
def write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    until: Sequence[str],
    max_tokens: int,
    num_tokens: int | None = None,
    done: Callable[[int], object] = lambda _: None,
) -> list[Written]:
    """What the model writes after each prompt, up to the first of ``until``, its end of sequence or ``max_tokens``.

    The likeliest token at each step, whatever a model's own generation config says besides, such as a repetition
    penalty: a student and its teacher often have different ones.

    Prompts of like length share a batch, padded at their left and masked. A prompt is cut at its left where the model
    could not read it and its answer whole; ``num_cut`` tells by how much.

    Args:
        num_tokens: tokens in a batch, prompts and answers; None finds the number by itself.
        done: is told of the number of prompts that are answered.

    Raises:
        DataError: the model cannot read so many tokens as an answer may have.
        NonFiniteError: what the model says is not a number.
        OutOfMemoryError: the device has too little memory for a single prompt and its answer.
    """
    room = _room(model, max_tokens)
    whole = encoded(tokenizer, list(prompts))
    prefix = next((i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None), 0)
    ids = [(tokens if room is None else tokens[-room:]) or [cast(int, prefix)] for tokens in whole]
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
    cpu = next(model.parameters()).device.type == "cpu"
    budget = num_tokens or (CPU_TOKENS if cpu else DEVICE_TOKENS)
    found: list[Written | None] = [None] * len(ids)
    place = 0
    while place < len(order):
        width = len(ids[order[place]]) + max_tokens
        batch = order[place : place + max(1, budget // width)]
        try:
            written = _write(model, tokenizer, [ids[i] for i in batch], until, max_tokens)
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise _too_little_memory(width) from None
            budget = max(width, budget // 2)
            continue
        for i, text in zip(batch, written, strict=True):
            found[i] = Written(text, max(0, len(whole[i]) - len(ids[i])))
        place += len(batch)
        done(place)
    return cast(list[Written], found)


def _write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    until: Sequence[str],
    max_tokens: int,
) -> list[str]:
    width = max(map(len, prompts))
    device = next(model.parameters()).device
    rows = torch.tensor([[0] * (width - len(tokens)) + tokens for tokens in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(tokens)) + [1] * len(tokens) for tokens in prompts], device=device)
    own = model.generation_config
    eos = tokenizer.eos_token_id if own is None or own.eos_token_id is None else own.eos_token_id
    pad = eos[0] if isinstance(eos, list) else (eos or 0)
    greedy = GenerationConfig(do_sample=False, max_new_tokens=max_tokens, eos_token_id=eos, pad_token_id=pad)
    stop = StoppingCriteriaList([_Until(tokenizer, until, width)])
    generate = cast(Callable[..., Tensor], model.generate)
    try:
        model.generation_config = GenerationConfig()  # `generate` would take from its own what ours leaves open
        out = generate(
            rows,
            attention_mask=mask,
            generation_config=greedy,
            logits_processor=LogitsProcessorList([_Finite()]),
            stopping_criteria=stop,
        )
    finally:
        model.generation_config = own
    written = tokenizer.batch_decode(out[:, width:].tolist(), skip_special_tokens=True)
    return [cut(text, until) for text in written]


def _room(model: PreTrainedModel, max_tokens: int) -> int | None:
    """The most tokens of a prompt that leave room for its answer; None where the model has no limit."""
    limit = max_length(model.config)
    if limit is None or limit > max_tokens:
        return None if limit is None else limit - max_tokens
    raise DataError(
        "an answer may be longer than the model can read",
        {"max_tokens": max_tokens, "the model reads": limit},
        why="There would be no room for a question.",
        fix=f"Set max_tokens in the description to less than {limit}.",
    )


def _too_little_memory(width: int) -> OutOfMemoryError:
    return OutOfMemoryError(
        "the device has too little memory to write a single answer",
        {"tokens of prompt and answer": width, "batch": "1 prompt"},
        why="It cannot be written in parts.",
        fix="Lower max_tokens in the description, or use a smaller dtype, or a device with more memory.",
    )

"""Text that a model writes: answers to batches of prompts, and single texts drawn token by token."""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel

from stillroom.models.hidden_states import backbone, lm_head


class Sampling(NamedTuple):
    """The settings by which answers are drawn."""

    max_tokens: int
    temperature: float
    """0 takes the top token each time."""
    top_p: float
    num_answers: int
    """The number of answers to each prompt."""


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    prompts: Sequence[np.ndarray],
    sampling: Sampling,
    *,
    vocab_size: int,
    pad_token: int,
    seed: int,
    check: Callable[[Tensor, int], None],
) -> list[list[np.ndarray]]:
    """Returns the answers to each prompt, int32 [m], each up to the first end of sequence, with it.

    The model's own generation settings do not count, but for its end of sequence. torch's own generators are left as
    they were.

    Args:
        vocab_size: no token from here on is generated.
        seed: of the draws; they also depend on which prompts are generated together.
        check: is called with the logits of each step, [prompts · answers, vocab], and the number of tokens written so
            far.
    """
    width = max(map(len, prompts))
    ids = np.full((len(prompts), width), pad_token, np.int64)
    mask = np.zeros((len(prompts), width), np.int64)
    for row, tokens in enumerate(prompts):
        ids[row, width - len(tokens) :], mask[row, width - len(tokens) :] = tokens, 1
    end: Any = model.generation_config.eos_token_id  # pyright: ignore[reportOptionalMemberAccess]
    how: dict[str, Any] = {"do_sample": False}
    if sampling.temperature:
        how = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    settings = GenerationConfig(
        max_new_tokens=sampling.max_tokens,
        num_return_sequences=sampling.num_answers,
        pad_token_id=pad_token,
        eos_token_id=end,
        suppress_tokens=list(range(vocab_size, lm_head(model).vocab_size)) or None,
        **how,
    )

    def see(input_ids: Tensor, scores: Tensor) -> Tensor:
        check(scores, input_ids.shape[1] - width)
        return scores

    device = model.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        write: Any = model.generate
        own, model.generation_config = model.generation_config, settings
        try:
            written = write(
                torch.from_numpy(ids).to(device),
                attention_mask=torch.from_numpy(mask).to(device),
                logits_processor=LogitsProcessorList([see]),  # pyright: ignore[reportArgumentType]
            )
        finally:
            model.generation_config = own
    ends = [e for e in (end if isinstance(end, list) else [end]) if e is not None]
    rows = []
    for row in written[:, width:].cpu().numpy().astype(np.int32):
        places = np.flatnonzero(np.isin(row, ends))
        rows.append(row[: places[0] + 1] if len(places) else row)
    return [rows[i : i + sampling.num_answers] for i in range(0, len(rows), sampling.num_answers)]


@torch.no_grad()
def draw_text(
    model: PreTrainedModel,
    prompt: np.ndarray,
    max_tokens: int,
    vocab_size: int,
    end: int | None,
    generator: torch.Generator,
) -> np.ndarray:
    """Returns the prompt and up to ``max_tokens`` tokens after it, drawn at temperature 1, int64 [n].

    The draws are made on the CPU, so they are the same on every device but for rounding.

    Args:
        vocab_size: no token from here on is drawn.
        end: the token that ends the text, and is its last.
    """
    device = next(model.parameters()).device
    text = torch.from_numpy(prompt.astype(np.int64))[None].to(device)
    unread, cache = text, None
    for _ in range(max_tokens):
        output: Any = backbone(model)(input_ids=unread, past_key_values=cache, use_cache=True)
        cache = getattr(output, "past_key_values", None)
        logits = lm_head(model).logits(output[0][0, -1:])  # the last position alone
        probabilities = logits[0, :vocab_size].softmax(-1).cpu()
        token = torch.multinomial(probabilities, 1, generator=generator)[None].to(device)
        text = torch.cat([text, token], 1)
        if token.item() == end:
            break
        unread = text if cache is None else token
    return text[0].cpu().numpy()


def derived_seed(seed: int, purpose: str, number: int) -> int:
    """Returns a seed of 63 bits for one of many things that are drawn independently of each other."""
    digest = hashlib.sha256(f"{purpose} {seed} {number}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1

"""Answer: what models say to a prompt, in pieces as they come."""

import queue
import threading
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria, TextStreamer

from stillroom.errors import ConfigError
from stillroom.models.loading import max_length
from stillroom.tokenizers import template_of


class Piece(NamedTuple):
    """A piece of the answer of a model, by its number."""

    model: int
    text: str
    last: bool
    """The answer is done."""


@dataclass
class Talker:
    """A model in conversation, which remembers what was said and answered where its tokenizer has a chat template."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    messages: list[dict[str, str]] = field(default_factory=list)

    def tokens(self, prompt: str, system: str | None) -> Tensor:
        """The tokens that the model goes on from, ``[1, t]``: the conversation in its template, or the prompt alone."""
        if template_of(self.tokenizer) is None:
            found = self.tokenizer(prompt, return_tensors="pt")["input_ids"]
        else:
            found = self.tokenizer.apply_chat_template(
                self._with(prompt, system), add_generation_prompt=True, return_tensors="pt", return_dict=False
            )
        assert isinstance(found, Tensor)
        if found.shape[1] == 0:
            raise ConfigError(
                f"the prompt is no token to {self.name}",
                {"prompt": repr(prompt)},
                why="A model goes on from what it has read, and its tokenizer makes nothing of this.",
                fix="Write a prompt.",
            )
        return found.to(self.model.device)

    def _with(self, prompt: str, system: str | None) -> list[dict[str, str]]:
        """The conversation and what is asked now, which is remembered only when it is answered."""
        before = [{"role": "system", "content": system}] if system is not None and not self.messages else self.messages
        return [*before, {"role": "user", "content": prompt}]

    def remember(self, prompt: str, system: str | None, answer: str) -> None:
        if template_of(self.tokenizer) is not None:
            self.messages = [*self._with(prompt, system), {"role": "assistant", "content": answer}]


class Draw(LogitsProcessor):
    """Draws the next token with a generator of its own, and leaves no other to choose.

    `generate` draws by the process's one generator, which two models at work at the same time would share.
    """

    def __init__(self, temperature: float, top_p: float, generator: torch.Generator) -> None:
        self.temperature, self.top_p, self.generator = temperature, top_p, generator

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # noqa: ARG002
        if self.temperature == 0:
            return scores
        probabilities = torch.softmax(scores.float() / self.temperature, dim=-1).cpu()
        if self.top_p < 1:
            top_indices, ids = probabilities.sort(dim=-1, descending=True)
            before = top_indices.cumsum(dim=-1) - top_indices
            probabilities = torch.zeros_like(probabilities).scatter(-1, ids, top_indices * (before < self.top_p))
        token = torch.multinomial(probabilities, 1, generator=self.generator).to(scores.device)
        return torch.full_like(scores, -torch.inf).scatter(-1, token, 0.0)


class _Stop(StoppingCriteria):
    """Ends an answer when somebody asks for it."""

    def __init__(self, asked: threading.Event) -> None:
        self.asked = asked

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Any:  # noqa: ARG002
        return torch.full((input_ids.shape[0],), self.asked.is_set(), device=input_ids.device)


class _Pieces(TextStreamer):
    """Puts each piece of an answer into a queue."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, number: int, pieces: "queue.SimpleQueue[Any]") -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)  # pyright: ignore[reportArgumentType]
        self.number, self.pieces = number, pieces

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.pieces.put(Piece(self.number, text, stream_end))


def answers(
    talkers: Sequence[Talker],
    prompt: str,
    *,
    system: str | None,
    max_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
) -> Generator[Piece]:
    """The pieces of all models' answers, in the order in which they come. Each model answers in a thread of its own.
    Who stops reading stops them, and what was asked is forgotten: a template may want an answer to each question.

    Raises:
        ConfigError: prompt and answer are longer than a model can read.
    """
    pieces: queue.SimpleQueue[Piece | BaseException] = queue.SimpleQueue()
    stop = threading.Event()
    asked = [talker.tokens(prompt, system) for talker in talkers]
    for talker, tokens in zip(talkers, asked, strict=True):
        _check_length(talker, tokens.shape[1], max_tokens)

    def answer(number: int) -> None:
        draw = Draw(temperature, top_p, torch.Generator().manual_seed(seed))
        streamer = _Pieces(talkers[number].tokenizer, number, pieces)
        try:
            _generate(talkers[number], asked[number], max_tokens, draw, _Stop(stop), streamer)
        except BaseException as error:
            pieces.put(error)

    threads = [threading.Thread(target=answer, args=(i,), daemon=True) for i in range(len(talkers))]
    texts, left = [""] * len(talkers), len(talkers)
    try:
        for thread in threads:
            thread.start()
        while left:
            piece = pieces.get()
            if isinstance(piece, BaseException):
                raise piece
            texts[piece.model] += piece.text
            left -= piece.last
            yield piece
    finally:
        stop.set()
        for thread in threads:
            if thread.ident is not None:  # it was started before somebody interrupted
                thread.join()
    for talker, text in zip(talkers, texts, strict=True):
        talker.remember(prompt, system, text)


def _generate(talker: Talker, tokens: Tensor, max_tokens: int, draw: Draw, stop: _Stop, streamer: TextStreamer) -> None:
    talker.model.generate(  # pyright: ignore[reportCallIssue]
        inputs=tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=max_tokens,
        do_sample=False,
        num_beams=1,
        temperature=None,
        top_p=None,
        top_k=None,
        pad_token_id=_pad(talker),
        logits_processor=[draw],
        stopping_criteria=[stop],
        streamer=streamer,
    )


def _pad(talker: Talker) -> int | None:
    """A token for padding, which an answer of one row never has but `generate` wants."""
    ends = talker.model.generation_config.eos_token_id  # pyright: ignore[reportOptionalMemberAccess]
    return talker.tokenizer.pad_token_id or (ends[0] if isinstance(ends, list) else ends)  # pyright: ignore


def _check_length(talker: Talker, num_tokens: int, max_tokens: int) -> None:
    limit = max_length(talker.model.config)
    if limit is not None and num_tokens + max_tokens > limit:
        raise ConfigError(
            f"{talker.name} cannot read prompt and answer",
            {"prompt, in tokens": num_tokens, "max_tokens": max_tokens, "its max_position_embeddings": limit},
            why="Positions beyond that have no embedding, or one that the model never saw.",
            fix=f"Set max_tokens to at most {limit - num_tokens}." if num_tokens < limit else "Write a shorter prompt.",
        )

"""`stillroom chat`: a prompt -> the models' answers, in pieces as they come."""

import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from stillroom.chat.config import ChatConfig
from stillroom.data.chat_templates import end_of_turn
from stillroom.errors import ConfigError, StillroomError
from stillroom.models import loading
from stillroom.models.generation import Sampling, Stops, cut, end_tokens, generate, own_stops
from stillroom.tokenizers import load_tokenizer, template_of


class Piece(NamedTuple):
    """A piece of the answer of a model, by its number."""

    model: int
    text: str
    last: bool
    """The answer is done."""


def run(
    config: ChatConfig,
    prompts: Iterable[str],
    show: Callable[[Iterator[Piece]], None],
    notify: Callable[[str], None],
    *,
    turn_by_turn: bool = False,
) -> None:
    """Answers each prompt by all models, and hands the pieces of the answers to ``show``.

    Args:
        notify: is called with every other message.
        turn_by_turn: an error of a turn, and Ctrl-C while it is answered, end this turn alone. It is forgotten.

    Raises:
        StillroomError: something that the user can mend.
        KeyboardInterrupt: Ctrl-C; the models have stopped.
    """
    models = [
        load(place, device=config.device, dtype=config.dtype, trust_remote_code=config.trust_remote_code)
        for place in config.models
    ]
    for model in models:
        if config.system is not None and template_of(model.tokenizer) is None:
            notify(f"{model.name} has no chat template: `system` is not used for it")
    settings = {key: getattr(config, key) for key in ("system", "max_tokens", "temperature", "top_p", "seed")}
    for prompt in prompts:
        try:
            with closing(answers(models, prompt, **settings)) as pieces:
                show(pieces)
        except (StillroomError, KeyboardInterrupt) as error:
            if not turn_by_turn:
                raise
            notify(f"error: {error}" if isinstance(error, StillroomError) else "\nstopped; this turn is forgotten")


@dataclass
class ChatModel:
    """A model in conversation, which remembers questions and answers where its tokenizer has a chat template."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    messages: list[dict[str, str]] = field(default_factory=list)

    def tokens(self, prompt: str, system: str | None, max_tokens: int) -> list[int]:
        """The tokens that the model goes on from: the conversation in its template, or the prompt alone.

        Raises:
            ConfigError: there are none; or they and ``max_tokens`` more are too many for the model.
        """
        if template_of(self.tokenizer) is None:
            tokens = self.tokenizer(prompt)["input_ids"]
        else:
            tokens = self.tokenizer.apply_chat_template(
                self._with(prompt, system), add_generation_prompt=True, return_dict=False
            )
        assert isinstance(tokens, list)
        if not tokens:
            raise ConfigError(
                f"the prompt is no token to {self.name}",
                {"prompt": repr(prompt)},
                why="A model goes on from what it has read, and its tokenizer makes nothing of this.",
                fix="Write a prompt.",
            )
        limit, num_tokens = loading.max_length(self.model.config), len(tokens)
        if limit is not None and num_tokens + max_tokens > limit:
            fits = num_tokens < limit
            raise ConfigError(
                f"{self.name} cannot read prompt and answer",
                {"prompt, in tokens": num_tokens, "max_tokens": max_tokens, "its max_position_embeddings": limit},
                why="Positions beyond that have no embedding, or one that the model never saw.",
                fix=f"Set max_tokens to at most {limit - num_tokens}." if fits else "Write a shorter prompt.",
            )
        return cast(list[int], tokens)

    def _with(self, prompt: str, system: str | None) -> list[dict[str, str]]:
        """The conversation with this prompt, which is remembered only when it is answered."""
        before = [{"role": "system", "content": system}] if system is not None and not self.messages else self.messages
        return [*before, {"role": "user", "content": prompt}]

    def ends(self) -> list[int]:
        """The tokens that end an answer."""
        return end_tokens(self.model, self.tokenizer, end_of_turn(self.tokenizer, template_of(self.tokenizer)))

    def remember(self, prompt: str, system: str | None, answer: str) -> None:
        if template_of(self.tokenizer) is not None:
            self.messages = [*self._with(prompt, system), {"role": "assistant", "content": answer}]


def load(place: str, *, device: str, dtype: str, trust_remote_code: bool) -> ChatModel:
    """Loads a model and its tokenizer; the folder of a run means the model in it.

    Args:
        device, dtype: see `ChatConfig`; "auto" is resolved here.
    """
    folder = Path(place).expanduser()
    if (folder / "run.json").is_file() and (folder / "model").is_dir():
        place = str(folder / "model")
    device = loading.resolve_device(device, "device")
    if dtype == "auto":
        half = torch.device(device).type == "cuda" and torch.cuda.is_bf16_supported()
        dtype = "bfloat16" if half else "float32"
    tokenizer = load_tokenizer(place, trust_remote_code=trust_remote_code)
    model = loading.load_model(
        place, dtype=getattr(torch, dtype), device=device, trust_remote_code=trust_remote_code
    ).requires_grad_(False)
    return ChatModel(place, model, tokenizer)


class _Pieces(TextStreamer):
    """Puts each piece of an answer into a queue, up to the end or the first of some texts."""

    def __init__(self, chat: ChatModel, number: int, pieces: "queue.SimpleQueue[Any]") -> None:
        super().__init__(chat.tokenizer, skip_prompt=True, skip_special_tokens=True)  # pyright: ignore[reportArgumentType]
        self.number, self.pieces = number, pieces
        self.ends, self.stops = chat.ends(), own_stops(chat.model)
        self.text, self.shown = "", 0

    def put(self, value: Tensor) -> None:
        if self.next_tokens_are_prompt or value.flatten()[-1].item() not in self.ends:
            super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.text += text
        whole = cut(self.text, self.stops)
        if not stream_end and len(whole) == len(self.text):  # what may be the beginning of one of the texts waits
            begun = (size for stop in self.stops for size in range(1, len(stop)) if whole.endswith(stop[:size]))
            whole = whole[: len(whole) - max(begun, default=0)]
        self.pieces.put(Piece(self.number, whole[self.shown :], stream_end))
        self.shown = max(self.shown, len(whole))


def answers(
    models: Sequence[ChatModel],
    prompt: str,
    *,
    system: str | None,
    max_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
) -> Generator[Piece]:
    """The pieces of all models' answers, in the order in which they come. Each model answers in a thread of its own.
    Closing the generator stops the models and forgets the prompt: a template may want an answer to each question.

    Raises:
        ConfigError: prompt and answer are longer than a model can read.
    """
    pieces: queue.SimpleQueue[Piece | BaseException] = queue.SimpleQueue()
    stop = threading.Event()
    prompts = [model.tokens(prompt, system, max_tokens) for model in models]

    def answer(number: int) -> None:
        chat = models[number]
        try:
            pieces_of = _Pieces(chat, number, pieces)
            generate(
                chat.model,
                [prompts[number]],
                Sampling(max_tokens, temperature, top_p),
                ends=pieces_of.ends,
                pad_token=0,  # one row is never padded
                seeds=[seed],
                stops=Stops(pieces_of.stops, chat.tokenizer),
                stopped=stop.is_set,
                streamer=pieces_of,
            )
        except BaseException as error:
            pieces.put(error)

    threads = [threading.Thread(target=answer, args=(i,), daemon=True) for i in range(len(models))]
    texts, left = [""] * len(models), len(models)
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
    for model, text in zip(models, texts, strict=True):
        model.remember(prompt, system, text)

"""The settings of a data set: where it lies, how a row becomes tokens, and how tokens become rows of a batch."""

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from stillroom.config import Config, PathText, Positive, is_local, replace


class _Data(Config):
    path: PathText
    """A .jsonl, .json, .parquet, .arrow, .csv, .tsv or .txt file (those of text .gz, .bz2, .xz or .zst too), a folder
    of such files, a pattern (data/*.jsonl), an address of any of these (s3://…), a folder written by `datasets`, or
    the name of a data set on the hub."""
    split: str = "train"
    """The split, where the data set has several."""
    subset: str | None = None
    """The configuration of a data set on the hub."""
    revision: str | None = None
    """The commit or tag of a data set on the hub."""
    max_documents: Annotated[int, Field(gt=0)] | None = None
    """Read only the first so many documents."""
    hash_range: Annotated[list[float], Field(min_length=2, max_length=2)] | None = None
    """Take only the rows whose hash, as a number from 0 to 1, is at least the first and below the second: [0.9, 1.0] is
    a tenth. A row keeps its hash when the file grows or its order changes."""
    weight: str | None = None
    """The column that holds what each row counts, for objectives whose token_weight is `data`."""
    length: Annotated[int, Field(ge=2)] = 1024
    """Tokens in a row: the longest context that the student is trained on."""
    pack: bool = True
    """Put several documents into a row. They never attend to each other."""
    shuffle: bool = True
    """Take the documents in a new order each epoch, which follows from the run's seed."""
    empty: Literal["refuse", "drop"] = "refuse"
    """A document with nothing to learn in it is an error, or is left out and counted."""
    cache: PathText | Literal["auto"] = "auto"
    """The folder for tokenized data; auto is $STILLROOM_CACHE or else ~/.cache/stillroom."""


class TextData(_Data):
    """Plain text: every token is learned."""

    format: Literal["text"]
    column: str = "text"
    """The column that holds the text."""
    overlong: Literal["split", "cut", "drop"] = "split"
    """A document longer than `length`: split into several, cut after `length` tokens, or left out. All are counted."""


class ChatData(_Data):
    """Conversations, through the tokenizer's own chat template."""

    format: Literal["chat"]
    column: str | Literal["auto"] = "auto"
    """The column that holds the conversation; auto takes `messages` or else `conversations` (ShareGPT)."""
    keep: Literal["assistant", "last", "all"] = "assistant"
    """The tokens that are learned: those that the assistant said, with its end of turn; those of its last message
    alone; or all."""
    roles: dict[str, Literal["system", "developer", "user", "assistant", "tool"]] | None = None
    """What the words for roles in the data mean, beside those of OpenAI's and ShareGPT's form: {bot: assistant}."""
    chat_template_kwargs: dict[str, Any] | None = None
    """The chat template's own settings, such as {enable_thinking: false}; a row's own column of that name goes
    before them."""
    template: Literal["auto", "student", "teacher"] = "auto"
    """The model whose chat template is taken; auto demands that both have the same one."""
    overlong: Literal["cut", "drop"] = "cut"
    """A conversation longer than `length`: cut after `length` tokens, or left out. Both are counted."""


class PromptCompletionData(_Data):
    """Pairs of a prompt and its completion."""

    format: Literal["prompt_completion"]
    prompt: str = "prompt"
    """The column that holds the prompt, or a text with columns in braces: "Question: {question}\\nAnswer: ". One that
    may be absent has a question mark, "{instruction}\\n{input?}\\n"; a line that holds nothing else is left out."""
    completion: str = "completion"
    """The column that holds the completion, or a text with columns in braces."""
    keep: Literal["completion", "all"] = "completion"
    """The tokens that are learned: the completion with its end of sequence, or all."""
    chat: bool = False
    """Put the pair through the chat template, as a user's and an assistant's message."""
    system: str | None = None
    """The column that holds the system message, or a text with columns in braces, where `chat` is on."""
    chat_template_kwargs: dict[str, Any] | None = None
    """The chat template's own settings, where `chat` is on, such as {enable_thinking: false}."""
    template: Literal["auto", "student", "teacher"] = "auto"
    """The model whose chat template is taken, where `chat` is on; auto demands that both have the same one."""
    overlong: Literal["cut", "drop"] = "cut"
    """A pair longer than `length`: cut after `length` tokens, or left out. Both are counted."""

    @model_validator(mode="after")
    def _fits_together(self) -> "PromptCompletionData":
        given = [name for name in ("system", "chat_template_kwargs") if getattr(self, name)]
        if given and not self.chat:
            raise ValueError(f"{given[0]} is for pairs that go through the chat template: set chat=true")
        return self


class TokensData(_Data):
    """Documents that are tokenized already, by the tokenizer of the models."""

    format: Literal["tokens"]
    column: str = "tokens"
    """The column that holds the tokens of a row, as whole numbers."""
    loss_mask: str | None = None
    """The column that says of each token whether it is learned (0 or 1); null learns all."""
    overlong: Literal["split", "cut", "drop"] = "split"
    """A document longer than `length`: split into several, cut after `length` tokens, or left out. All are counted."""


AnyData = TextData | ChatData | PromptCompletionData | TokensData

DataConfig = Annotated[AnyData, Field(discriminator="format")]


class StoredDataConfig(Config):
    """The documents of the store itself, so that no signal can be joined to other data."""

    format: Literal["store"]
    length: Annotated[int, Field(ge=2)] | Literal["auto"] = "auto"
    """Tokens in a row; auto is what the store was captured with, and it cannot be less."""
    pack: bool = True
    """Put several documents into a row. They never attend to each other."""
    shuffle: bool = True
    """Take the documents in a new order each epoch, which follows from the run's seed."""


class HeldOutText(Config):
    """Text that nothing is learned from or chosen by, read as `data` is read."""

    path: PathText | None = None
    """A file, folder or data set like data.path; where data.format is store, another store."""
    share: Annotated[float, Field(gt=0, lt=1)] | None = None
    """In the place of `path`: this share of the rows of data itself is held out, those of the smallest hashes. A row
    stays held out when the data grow or their order changes."""
    split: str = "train"
    """The split, where the data set has several."""
    subset: str | None = None
    """The configuration on the hub; null is data.subset where the path is the same."""
    revision: str | None = None
    """The commit or tag on the hub; null is data.revision where the path is the same."""
    max_documents: Positive | None = None
    """Read only the first so many documents."""

    @model_validator(mode="after")
    def _from_somewhere(self) -> "HeldOutText":
        if (self.path is None) == (self.share is None):
            raise ValueError("give either `path` or `share`")
        others = [name for name in ("subset", "revision", "max_documents") if getattr(self, name) is not None]
        others += ["split"] if self.split != "train" else []
        if self.share is not None and others:
            raise ValueError(f"{others[0]} is for text at a `path` of its own: `share` is one of data's rows")
        return self

    def of(self, data: AnyData) -> AnyData:
        """The settings by which the text is read, where ``data`` are those of what is learned.

        Raises ValueError where both are the same.
        """
        if self.share is not None:
            if data.hash_range not in (None, [self.share, 1.0]):
                raise ValueError("data.hash_range and held_out.share both choose rows by their hash: give one")
            return replace(data, {"hash_range": [0.0, self.share], "shuffle": False})
        own = self.model_dump(include={"path", "split", "subset", "revision", "max_documents"})
        if self.path == data.path:
            own |= {name: own[name] or getattr(data, name) for name in ("subset", "revision")}
        there = replace(data, {**own, "hash_range": None, "shuffle": False})
        if all(getattr(there, name) == getattr(data, name) for name in ("path", "split", "subset", "revision")):
            raise ValueError("held_out is the same as data: what is measured must not be what is learned or chosen by")
        return there

    def rest(self, data: AnyData) -> AnyData:
        """The settings by which all else of ``data`` is read."""
        return data if self.share is None else replace(data, {"hash_range": [self.share, 1.0]})


class HeldOutConfig(HeldOutText):
    """Text that is never trained on, read as `data` is read."""

    every: Positive | None = None
    """Measure after every so many steps; always at the end."""


def cache_folder(config: AnyData) -> Path:
    """The folder for tokenized data: ``config.cache``, or by default $STILLROOM_CACHE or else ~/.cache/stillroom."""
    if config.cache != "auto":
        return Path(config.cache)
    return Path(os.environ.get("STILLROOM_CACHE") or Path.home() / ".cache" / "stillroom")


PLAIN = (".jsonl", ".json", ".txt")
"""Files that are no shorter than their text."""


def most_tokens(data: AnyData) -> tuple[float | None, str]:
    """An upper bound of the tokens that are read in one pass, and what it rests on; None, and why, where there is none.

    Where long documents are cut or left out, at most `length` tokens of each are read, and the number of documents may
    be limited. Of plain text no token is shorter than a byte.
    """
    bounds: list[tuple[float, str]] = []
    if data.max_documents is not None and data.overlong != "split":
        total = data.max_documents * data.length
        bounds.append((total, f"at most: {data.max_documents:,} documents of up to {data.length:,}"))
    path = Path(data.path).expanduser()
    if isinstance(data, TextData) and is_local(data.path) and path.is_file() and path.suffix in PLAIN:
        size = path.stat().st_size
        bounds.append((size, f"at most: {size:,} bytes of text, where a token is often 3 to 5"))
    unknown = "not known before they are tokenized: data_tokens=… tells how many there are"
    return min(bounds) if bounds else (None, unknown)

"""Formats: how a row becomes tokens, and which of them are to be learnt.

A format turns a row into one text and the spans of its characters that are to be learnt. The text is tokenised once,
as a whole, and a token is learnt where it reaches into a span, so no token depends on where a span begins.
"""

import difflib
import math
from collections.abc import Callable, Sequence
from functools import partial
from string import Formatter
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from stillroom.data.chat import ChatRenderer, Name, Rendered, messages_of
from stillroom.data.config import AnyData, ChatData, PromptCompletionData, TextData
from stillroom.errors import ConfigError, DataError

Row = dict[str, Any]


class Encoded(NamedTuple):
    """One document. ``learn[i]`` speaks of token i itself: nothing is shifted yet."""

    tokens: np.ndarray
    """int32, shape [n]."""
    learn: np.ndarray
    """bool, shape [n]: True where this token is to be learnt."""
    weight: float = 1.0
    """What each of its tokens counts."""

    def part(self, start: int, stop: int) -> "Encoded":
        """Some of its tokens, which count what they did."""
        return self._replace(tokens=self.tokens[start:stop], learn=self.learn[start:stop])


Encoder = Callable[[Sequence[Row], Callable[[int], str]], list[Encoded]]
"""Takes rows and a function that names row i of them in messages; gives one document for each row, in order."""


def needs_template(config: AnyData) -> bool:
    """Whether rows go through a chat template."""
    return isinstance(config, ChatData) or (isinstance(config, PromptCompletionData) and config.chat)


def encoder(config: AnyData, tokenizer: PreTrainedTokenizerBase, template: str | None) -> Encoder:
    """Makes the function that turns rows into documents as ``config`` says.

    Text, and pairs outside a chat, get the tokenizer's own special tokens and one end of sequence, which is learnt.
    A conversation gets exactly what its template writes. No document begins with two beginnings of sequence.
    A row whose text, completion or assistant messages are empty has nothing to learn.

    Raises:
        MissingError: rows go through a chat template and ``template`` is None.
        ConfigError: a text with columns in braces cannot be meant.
        DataError, from the encoder: a row lacks a column, or does not have the shape that the format needs.
    """
    render = _renderer(config, tokenizer, template)
    finish = _finisher(tokenizer, special_tokens=not needs_template(config))

    def encode(rows: Sequence[Row], name: Callable[[int], str]) -> list[Encoded]:
        rendered = [render(row, partial(name, index)) for index, row in enumerate(rows)]
        documents = finish(rendered, name)
        if config.weight is None:
            return documents
        weights = [_weight(row, config.weight, partial(name, index)) for index, row in enumerate(rows)]
        return [document._replace(weight=weight) for document, weight in zip(documents, weights, strict=True)]

    return encode


# --- rows to text ----------------------------------------------------------------------------------------------------


def _renderer(
    config: AnyData, tokenizer: PreTrainedTokenizerBase, template: str | None
) -> Callable[[Row, Name], Rendered]:
    if isinstance(config, TextData):
        return partial(_render_text, config.column)
    if isinstance(config, ChatData):
        chat = ChatRenderer(tokenizer, template, keep_all=config.keep == "all")
        return lambda row, name: chat(messages_of(_conversation(row, config.column, name), name), name)
    pair = _PairReader(config)
    if not config.chat:
        return lambda row, name: _render_pair(*pair(row, name), keep_all=config.keep == "all")
    chat = ChatRenderer(tokenizer, template, keep_all=config.keep == "all")

    def render(row: Row, name: Name) -> Rendered:
        prompt, completion = pair(row, name)
        return chat([{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}], name)

    return render


def _render_text(column: str, row: Row, name: Name) -> Rendered:
    text = _text(row, column, name)
    return Rendered(text, None if text else [])


def _render_pair(prompt: str, completion: str, keep_all: bool) -> Rendered:
    text = prompt + completion
    if keep_all:
        return Rendered(text, None if text else [])
    return Rendered(text, [(len(prompt), len(text))] if completion else [])


class _PairReader:
    """Reads (prompt, completion) from a row by two columns, or by texts with columns in braces."""

    def __init__(self, config: PromptCompletionData) -> None:
        self.prompt, self.completion = _pieces("prompt", config.prompt), _pieces("completion", config.completion)
        self.defaults = (config.prompt, config.completion) == ("prompt", "completion")

    def __call__(self, row: Row, name: Name) -> tuple[str, str]:
        hint = ""
        if self.defaults and "prompt" not in row and {"question", "answer"} <= row.keys():
            hint = "data.prompt='{question}\\n' data.completion=answer"
        return self._fill(self.prompt, row, name, hint), self._fill(self.completion, row, name, hint)

    @staticmethod
    def _fill(pieces: list[tuple[str, str | None]], row: Row, name: Name, hint: str) -> str:
        return "".join(
            literal + ("" if column is None else _text(row, column, name, hint)) for literal, column in pieces
        )


def _pieces(setting: str, text: str) -> list[tuple[str, str | None]]:
    """A setting as pairs of literal text and the column that follows it."""
    if "{" not in text and "}" not in text:
        return [("", text)]
    try:
        parsed = list(Formatter().parse(text))
    except ValueError as error:
        raise _braces(setting, text, str(error)) from None
    for _, column, form, conversion in parsed:
        if column == "" or form or conversion:
            raise _braces(setting, text, "braces must hold the name of a column and nothing else")
    if all(column is None for _, column, _, _ in parsed):
        raise _braces(setting, text, "no column is named")
    return [(literal, column) for literal, column, _, _ in parsed]


def _braces(setting: str, text: str, reason: str) -> ConfigError:
    return ConfigError(
        f"the setting `data.{setting}` is not valid",
        {"text": repr(text), "reason": reason},
        why="It is filled with the columns of each row.",
        fix='Write a column as {column}, such as "Question: {question}\\nAnswer: ", and a brace itself as {{ or }}.',
    )


def _conversation(row: Row, column: str, name: Name) -> object:
    if column == "auto":
        column = next((c for c in ("messages", "conversations") if row.get(c) is not None), "messages")
    return _value(row, column, name)


def _text(row: Row, column: str, name: Name, hint: str = "") -> str:
    value = _value(row, column, name, hint)
    if isinstance(value, str):
        return value
    raise DataError(
        f"{name()}: the column `{column}` does not hold a text",
        {"expected": "a text", "found": "null" if value is None else f"{value!r:.60} ({type(value).__name__})"},
        why="Nothing is converted or left out, since either would change the data without a word.",
        fix="Mend or delete the row, or name another column.",
    )


def _weight(row: Row, column: str, name: Name) -> float:
    value = _value(row, column, name)
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf:
        return float(value)
    raise DataError(
        f"{name()}: the column `{column}` does not hold a weight",
        {"expected": "a number of at least 0", "found": f"{value!r:.60} ({type(value).__name__})"},
        why="It says what each token of the row counts in the loss.",
        fix="Mend or delete the row, or name another column in data.weight.",
    )


def _value(row: Row, column: str, name: Name, hint: str = "") -> Any:
    if column in row:
        return row[column]
    near = difflib.get_close_matches(column, list(row), n=1, cutoff=0.6)
    values = {"columns there": ", ".join(map(str, row)) or "none", **({"did you mean": near[0]} if near else {})}
    raise DataError(
        f"{name()} has no column `{column}`",
        values,
        why="Every row must have the columns that the settings name.",
        fix=f"Set {hint}." if hint else "Name the right column in the data settings, or mend the row.",
    )


# --- text to tokens --------------------------------------------------------------------------------------------------


def _finisher(
    tokenizer: PreTrainedTokenizerBase, special_tokens: bool
) -> Callable[[list[Rendered], Callable[[int], str]], list[Encoded]]:
    vocabulary = tokenizer.get_vocab()
    bos, eos = vocabulary.get(str(tokenizer.bos_token)), vocabulary.get(str(tokenizer.eos_token))
    adds_bos = bos is not None and special_tokens and tokenizer("a")["input_ids"][0] == bos

    def finish(rendered: list[Rendered], name: Callable[[int], str]) -> list[Encoded]:
        encoding = tokenizer(
            [item.text for item in rendered],
            add_special_tokens=special_tokens,
            return_offsets_mapping=any(item.spans for item in rendered),
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        offsets = encoding.get("offset_mapping") or [None] * len(rendered)
        documents: list[Encoded] = []
        for index, (item, ids, places) in enumerate(zip(rendered, encoding["input_ids"], offsets, strict=True)):
            tokens = np.array(ids, dtype=np.int32)
            learn = _learn(item, len(tokens), places, partial(name, index))
            if adds_bos and len(tokens) > 1 and tokens[1] == bos:
                tokens, learn = tokens[1:], learn[1:]
            if special_tokens and eos is not None:
                if not len(tokens) or tokens[-1] != eos:
                    tokens, learn = np.append(tokens, np.int32(eos)), np.append(learn, False)
                learn[-1] = item.spans != []
            documents.append(Encoded(tokens, learn))
        return documents

    return finish


def _learn(item: Rendered, num_tokens: int, places: list[tuple[int, int]] | None, name: Name) -> np.ndarray:
    """bool [num_tokens]: True where a token ends after a span's start and starts before its end."""
    if not item.spans:
        return np.full(num_tokens, item.spans is None)
    starts, ends = np.array(places, dtype=np.int64).reshape(-1, 2).T
    if ends.max(initial=0) < len(item.text.rstrip()):
        raise DataError(
            f"{name()}: the tokenizer does not say where its tokens lie in the text",
            {"characters": len(item.text), "last token ends at": int(ends.max(initial=0))},
            why="It drops characters that it does not know, so the tokens to learn cannot be told from the others.",
            fix="Use a tokenizer with byte fallback or an unknown token, delete the row, or set data.keep=all.",
        )
    learn = np.zeros(num_tokens, dtype=bool)
    for start, end in item.spans:
        learn |= (ends > start) & (starts < end)
    return learn

"""Formats: how a row becomes tokens, and which of them are to be learned.

A format turns a row into one text and the spans of its characters that are to be learned. The text is tokenized once,
as a whole, and a token is learned where it reaches into a span, so no token depends on where a span begins.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from stillroom.data.chat_templates import (
    ROLES,
    ChatRenderer,
    Conversation,
    Name,
    Rendered,
    Row,
    Template,
    conversation_of,
    text_in,
    value_in,
)
from stillroom.data.config import AnyData, ChatData, PromptCompletionData, TextData, TokensData
from stillroom.errors import DataError
from stillroom.tokenizers import required_vocab_size


class Encoded(NamedTuple):
    """One document. ``learn[i]`` speaks of token i itself: nothing is shifted yet."""

    tokens: np.ndarray
    """int32, shape [n]."""
    target_mask: np.ndarray
    """bool, shape [n]: True where this token is to be learned."""
    weight: float = 1.0
    """The weight of each of its tokens."""
    num_bytes: np.ndarray | None = None
    """int32, shape [n]: the UTF-8 bytes of the text that each token stands for, where they are counted; special tokens
    stand for none. None too where the tokenizer drops characters, so that its tokens do not stand for the text."""

    def part(self, start: int, stop: int) -> "Encoded":
        """Some of its tokens, which count what they did."""
        num_bytes = None if self.num_bytes is None else self.num_bytes[start:stop]
        return Encoded(self.tokens[start:stop], self.target_mask[start:stop], self.weight, num_bytes)

    def longer(self, token: int) -> "Encoded":
        """The same with one more token, which stands for no text and is not to be learned."""
        num_bytes = None if self.num_bytes is None else np.append(self.num_bytes, np.int32(0))
        target_mask = np.append(self.target_mask, False)
        return Encoded(np.append(self.tokens, np.int32(token)), target_mask, self.weight, num_bytes)


Encoder = Callable[[Sequence[Row], Callable[[int], str]], list[Encoded]]
"""Takes rows and a function that names row i of them in messages; gives one document for each row, in order."""


def needs_template(config: AnyData) -> bool:
    """Whether rows go through a chat template."""
    return isinstance(config, ChatData) or (isinstance(config, PromptCompletionData) and config.chat)


def encoder(
    config: AnyData, tokenizer: PreTrainedTokenizerBase, template: str | None, *, count_bytes: bool = False
) -> Encoder:
    """Makes the function that turns rows into documents as ``config`` says; with ``count_bytes``, each token's too.

    Text, and pairs outside a chat, get the tokenizer's own special tokens and one end of sequence, which is learned.
    A conversation gets exactly what its template writes. No document begins with two beginnings of sequence.
    A row whose text, completion or assistant messages are empty has nothing to learn.

    Raises:
        MissingError: rows go through a chat template and ``template`` is None.
        ConfigError: a text with columns in braces cannot be meant.
        DataError, from the encoder: a row lacks a column, or does not have the shape that the format needs.
    """
    if isinstance(config, TokensData):
        read = _reader(config, required_vocab_size(tokenizer))
    else:
        render = _renderer(config, tokenizer, template)
        finish = _finisher(tokenizer, special_tokens=not needs_template(config), count_bytes=count_bytes)
        read = lambda rows, names: finish(list(map(render, rows, names)), names)  # noqa: E731
    column = config.weight

    def weighted(document: Encoded, row: Row, name: Name) -> Encoded:
        assert column is not None
        value = value_in(row, column, name)
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf:
            return document._replace(weight=float(value))
        raise DataError(
            f"{name()}: the column `{column}` does not hold a weight",
            {"expected": "a number of at least 0", "found": f"{value!r:.60} ({type(value).__name__})"},
            why="It says what each token of the row counts in the loss.",
            fix="Mend or delete the row, or name another column in data.weight.",
        )

    def encode(rows: Sequence[Row], name: Callable[[int], str]) -> list[Encoded]:
        names = [partial(name, index) for index in range(len(rows))]
        documents = read(rows, names)
        return documents if column is None else list(map(weighted, documents, rows, names))

    return encode


def _reader(config: TokensData, vocab_size: int) -> Callable[[Sequence[Row], Sequence[Name]], list[Encoded]]:
    """What reads rows that hold their tokens. It raises DataError where they are no tokens of the tokenizer, or a mask
    does not fit them."""

    def read(row: Row, name: Name) -> Encoded:
        tokens = _numbers(row, config.column, vocab_size, name)
        if config.loss_mask is None:
            return Encoded(tokens, np.ones(len(tokens), dtype=bool))
        mask = _numbers(row, config.loss_mask, 2, name)
        if len(mask) != len(tokens):
            raise DataError(
                f"{name()}: the mask is not as long as the tokens",
                {config.column: len(tokens), config.loss_mask: len(mask)},
                why="It says of each token whether it is learned.",
                fix="Mend the row; the mask speaks of each token itself, and is not shifted.",
            )
        return Encoded(tokens, mask.astype(bool))

    return lambda rows, names: list(map(read, rows, names))


def _numbers(row: Row, column: str, below: int, name: Name) -> np.ndarray:
    """The whole numbers from 0 to ``below`` (excluded) in a column, int32 [n]."""
    value = value_in(row, column, name)
    numbers = np.asarray(value if isinstance(value, list) and all(type(one) in (int, bool) for one in value) else None)
    if numbers.dtype.kind not in "bi" and value != []:
        raise DataError(
            f"{name()}: the column `{column}` does not hold whole numbers",
            {"expected": "a list of whole numbers", "found": f"{value!r:.60} ({type(value).__name__})"},
            why="Nothing is converted or left out, since either would change the data without a word.",
            fix="Mend or delete the row, or name another column.",
        )
    if len(numbers) and not (numbers.min() >= 0 and numbers.max() < below):
        wrong = int(numbers[(numbers < 0) | (numbers >= below)][0])
        raise DataError(
            f"{name()}: the column `{column}` holds a number that means nothing",
            {"found": wrong, "from 0 to": below - 1},
            why="A token of another tokenizer is another word, and one beyond the vocabulary is none.",
            fix="Tokenize with the tokenizer of the models; a mask holds 0 and 1.",
        )
    return numbers.astype(np.int32)


# --- rows to text ----------------------------------------------------------------------------------------------------
def _renderer(
    config: TextData | ChatData | PromptCompletionData, tokenizer: PreTrainedTokenizerBase, template: str | None
) -> Callable[[Row, Name], Rendered]:
    keep_all = isinstance(config, TextData) or config.keep == "all"
    chat = ChatRenderer(tokenizer, template, keep_all) if needs_template(config) else None
    parts = ("prompt", "completion") if isinstance(config, PromptCompletionData) else ()
    templates = [Template(f"data.{part}", getattr(config, part)) for part in parts]
    system = getattr(config, "system", None)
    before = None if system is None else Template("data.system", system)
    roles = {**ROLES, **(getattr(config, "roles", None) or {})}
    settings = getattr(config, "chat_template_kwargs", None) or {}

    def render(row: Row, name: Name) -> Rendered:
        if isinstance(config, ChatData) and chat is not None:
            columns = ("messages", "conversations") if config.column == "auto" else (config.column,)
            column = next((column for column in columns if row.get(column) is not None), columns[0])
            messages, learned, rest = conversation_of(row, column, name, roles)
            if config.keep == "last":
                last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=-1)
                learned = tuple(said and i == last for i, said in enumerate(learned))
            return chat(Conversation(messages, learned, {**settings, **rest}), name)
        if isinstance(config, PromptCompletionData):
            hint, defaults = "", (config.prompt, config.completion) == ("prompt", "completion")
            if defaults and "prompt" not in row and {"question", "answer"} <= row.keys():
                hint = "data.prompt='{question}\\n' data.completion=answer"
            asked, answer = (template(row, name, hint) for template in templates)
            if chat is not None:
                pair = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
                if before is not None and (said := before(row, name)):
                    pair = [{"role": "system", "content": said}, *pair]
                return chat(Conversation(pair, (True,) * len(pair), settings), name)
            if not keep_all:
                return Rendered(asked + answer, [(len(asked), len(asked) + len(answer))] if answer else [])
            text = asked + answer
        else:
            text = text_in(row, config.column, name)
        return Rendered(text, None if text else [])

    return render


# --- text to tokens --------------------------------------------------------------------------------------------------
def _finisher(
    tokenizer: PreTrainedTokenizerBase, special_tokens: bool, count_bytes: bool
) -> Callable[[list[Rendered], Sequence[Name]], list[Encoded]]:
    vocabulary = tokenizer.get_vocab()
    bos, eos = vocabulary.get(str(tokenizer.bos_token)), vocabulary.get(str(tokenizer.eos_token))
    adds_bos = bos is not None and special_tokens and tokenizer("")["input_ids"][:1] == [bos]
    added = [number for number, token in tokenizer.added_tokens_decoder.items() if token.special]
    special = np.array([*added, *tokenizer.all_special_ids], dtype=np.int32)

    def finish(rendered: list[Rendered], names: Sequence[Name]) -> list[Encoded]:
        encoding = tokenizer(
            [item.text for item in rendered],
            add_special_tokens=special_tokens,
            return_offsets_mapping=count_bytes or any(item.spans for item in rendered),
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        offsets = encoding.get("offset_mapping") or [None] * len(rendered)
        documents: list[Encoded] = []
        for item, ids, places, name in zip(rendered, encoding["input_ids"], offsets, names, strict=True):
            tokens = np.array(ids, dtype=np.int32)
            target_mask = _target_mask(item, len(tokens), places, name)
            num_bytes = _num_bytes(item.text, places, np.isin(tokens, special)) if count_bytes else None
            document = Encoded(tokens, target_mask, num_bytes=num_bytes)
            if adds_bos and len(tokens) > 1 and tokens[1] == bos:
                document = document.part(1, len(tokens))
            if special_tokens and eos is not None:
                if not len(document.tokens) or document.tokens[-1] != eos:
                    document = document.longer(eos)
                document.target_mask[-1] = item.spans != []
            documents.append(document)
        return documents

    return finish


def _target_mask(item: Rendered, num_tokens: int, places: list[tuple[int, int]] | None, name: Name) -> np.ndarray:
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
    target_mask = np.zeros(num_tokens, dtype=bool)
    for start, end in item.spans:
        target_mask |= (ends > start) & (starts < end)
    return target_mask


def _num_bytes(text: str, places: list[tuple[int, int]] | None, special: np.ndarray) -> np.ndarray | None:
    """int32 [n]: the bytes from the end of what came before each token to its own end; a special token's are no text.

    Tokens that share a character, as those of single bytes do, count it once. White space that lies between the places
    of two tokens is the later one's, since many tokenizers leave it out of what they tell; None where any other
    character is left out, which no token stands for.
    """
    starts, ends = np.array(places, dtype=np.int64).reshape(-1, 2).T
    if not len(ends):
        return None if text.strip() else np.zeros(0, dtype=np.int32)
    ends = np.maximum.accumulate(ends)
    before = np.concatenate(([0], ends[:-1]))
    gaps = [*zip(before[starts > before], starts[starts > before], strict=True), (int(ends[-1]), len(text))]
    if any(text[start:stop].strip() for start, stop in gaps):
        return None
    ends[ends == ends[-1]] = len(text)
    bytes_before = np.cumsum([0, *(len(character.encode()) for character in text)])
    counts = np.diff(bytes_before[ends], prepend=0)
    return np.where(special, 0, counts).astype(np.int32)

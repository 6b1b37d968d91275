"""Token texts as a terminal can show them: on one line, with nothing in them that it would obey."""

import unicodedata
from functools import lru_cache

from transformers import PreTrainedTokenizerBase


class TokenTexts:
    """The texts of a tokenizer's tokens, each in quotation marks, by id."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._special = {token.content for token in tokenizer.added_tokens_decoder.values()}
        self.text = lru_cache(1 << 16)(self._text)

    def _text(self, token: int) -> str:
        """What token ``token`` stands for; an id that has none is shown by its number."""
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if not isinstance(piece, str):
            return f"<{token}>"
        if piece in self._special:
            return escaped(piece)
        text = self._tokenizer.decode([token])
        assert isinstance(text, str)
        if not text or "\ufffd" in text:  # a part of a character
            return f"<{escaped(piece)}>"
        if piece.startswith("▁") and not text[0].isspace():
            text = f" {text}"
        return f"'{escaped(text)}'"


def escaped(text: str) -> str:
    """The text with all that is not plainly visible written as Python would: newlines, control and format signs."""
    parts = []
    for i, sign in enumerate(text):
        if sign == "\\":
            parts.append("\\\\")
        elif not sign.isprintable() or (i == 0 and unicodedata.combining(sign)):
            parts.append(sign.encode("unicode_escape").decode() if ord(sign) < 256 or sign in "\n\r\t" else _code(sign))
        else:
            parts.append(sign)
    return "".join(parts)


def _code(sign: str) -> str:
    return f"\\u{ord(sign):04x}" if ord(sign) < 2**16 else f"\\U{ord(sign):08x}"


def width(text: str) -> int:
    """The columns that a text takes on a terminal."""
    return sum(
        0 if unicodedata.combining(sign) else 2 if unicodedata.east_asian_width(sign) in "WF" else 1 for sign in text
    )


def fitted(text: str, columns: int) -> str:
    """The text filled up with spaces, or cut with an ellipsis, to just so many columns."""
    if width(text) > columns:
        while width(text) > columns - 1:
            text = text[:-1]
        text += "…"
    return text + " " * (columns - width(text))

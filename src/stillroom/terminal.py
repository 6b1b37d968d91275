"""Texts as others may see them: without secrets, and on a terminal with nothing that it would obey, and so many columns
wide."""

import re
import unicodedata
from typing import Any, TextIO


def escaped(text: str) -> str:
    """The text with all that is not plainly visible written as Python would: newlines, control and format signs."""
    parts = []
    for i, sign in enumerate(text):
        if sign == "\\":
            parts.append("\\\\")
        elif not sign.isprintable() or (i == 0 and unicodedata.combining(sign)):
            parts.append(sign.encode("unicode_escape").decode())
        else:
            parts.append(sign)
    return "".join(parts)


def harmless(text: str) -> str:
    """The text with each sign that a terminal would obey or hide written as Python would; newlines stay."""
    text = text.replace("\r\n", "\n").replace("\t", "    ")
    return "".join(sign if sign == "\n" or sign.isprintable() else escaped(sign) for sign in text)


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


SECRET = "token|key|secret|pass|pwd|auth|sig|credential"
"""What the names of an address's secrets have in them."""


def redact(value: Any) -> Any:
    """The same values without secrets: passwords in addresses, and tokens, keys and signatures in their queries."""
    if isinstance(value, dict):
        return {key: redact(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redact(item) for item in value]
    if not isinstance(value, str) or "://" not in value:
        return value
    value = re.sub(r"(\w+://)[^/\s]*@", r"\1***@", value)
    return re.sub(rf"(?i)([?&][\w.-]*(?:{SECRET})[\w.-]*=)[^&\s'\"]*", r"\1***", value)


def say(text: object, to: TextIO | None = None, end: str = "\n") -> None:
    """Prints what may hold text from outside, on stdout or ``to``: without secrets, and nothing that a terminal would
    obey."""
    print(harmless(redact(str(text))), file=to, end=end)

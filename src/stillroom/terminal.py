"""Texts as others may see them: without secrets, and on a terminal with nothing that it would obey, and so many columns
wide."""

import logging
import re
import sys
import unicodedata
import warnings
from typing import Any


def say(text: object, *, error: bool = False) -> None:
    """Prints a text that may quote what came from outside, on stdout or stderr: without secrets, and without what a
    terminal would obey. All that the project prints goes through here, and a rule of the linter sees to that."""
    print(harmless(redact(str(text))), file=sys.stderr if error else sys.stdout)


class _Record(logging.LogRecord):
    def getMessage(self) -> str:
        return harmless(redact(super().getMessage()))


_plain_warning = warnings.formatwarning


def guard_logs() -> None:
    """Lets what libraries log and warn of reach the terminal in no other form than what is said."""
    logging.setLogRecordFactory(_Record)
    warnings.formatwarning = lambda *given, **named: harmless(redact(_plain_warning(*given, **named)))


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


SECRET = "token|key|secret|pass|pwd|auth|sig|credential|session|jwt"
"""What the names of an address's secrets have in them."""


def redact(value: Any) -> Any:
    """The same values without secrets: passwords in addresses, and tokens, keys and signatures in their queries."""
    if isinstance(value, dict):
        return {key: redact(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redact(item) for item in value]
    if not isinstance(value, str) or ("://" not in value and "url: /" not in value):  # urllib3 tells of a path alone
        return value
    value = re.sub(r"(\w+://)[^/\s]*@", r"\1***@", value)
    return re.sub(rf"(?i)([?&;#][\w.%-]*(?:{SECRET})[\w.%-]*=)[^&;#\s'\"]*", r"\1***", value)

"""How many tokens data have at the most, by their settings and files' sizes alone: nothing is read."""

from pathlib import Path

from stillroom.config import is_local
from stillroom.data.config import AnyData, TextData

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
    unknown = "not known before they are tokenised: data_tokens=… tells how many there are"
    return min(bounds) if bounds else (None, unknown)

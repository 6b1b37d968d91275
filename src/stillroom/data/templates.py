"""Templates: texts that are filled with the columns of a row."""

import difflib
from collections.abc import Callable
from string import Formatter
from typing import Any

from stillroom.errors import ConfigError, DataError

Row = dict[str, Any]
Name = Callable[[], str]
"""Gives the row as a message calls it. Finding it may take a while, so it is asked for only where it is needed."""


class Template:
    """A column of each row, or a text with columns in braces: "Question: {question}\\nAnswer: ".

    Args:
        setting: where it was set, for errors.

    Raises:
        ConfigError: it cannot be meant.
    """

    def __init__(self, setting: str, text: str) -> None:
        self.pieces = _pieces(setting, text)

    def __call__(self, row: Row, name: Name, hint: str = "") -> str:
        """The text of a row. Raises DataError where it lacks a column, or one does not hold a text."""
        return "".join(
            literal + ("" if column is None else text_in(row, column, name, hint)) for literal, column in self.pieces
        )


def _pieces(setting: str, text: str) -> list[tuple[str, str | None]]:
    """A text as pairs of what is literal and the column that follows it."""
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
        f"the setting `{setting}` is not valid",
        {"text": repr(text), "reason": reason},
        why="It is filled with the columns of each row.",
        fix='Write a column as {column}, such as "Question: {question}\\nAnswer: ", and a brace itself as {{ or }}.',
    )


def text_in(row: Row, column: str, name: Name, hint: str = "") -> str:
    """The text in a column."""
    value = value_in(row, column, name, hint)
    if isinstance(value, str):
        return value
    raise DataError(
        f"{name()}: the column `{column}` does not hold a text",
        {"expected": "a text", "found": "null" if value is None else f"{value!r:.60} ({type(value).__name__})"},
        why="Nothing is converted or left out, since either would change the data without a word.",
        fix="Mend or delete the row, or name another column.",
    )


def value_in(row: Row, column: str, name: Name, hint: str = "") -> Any:
    """What a column holds; ``hint`` is a setting that would help where it is not there."""
    if column in row:
        return row[column]
    near = difflib.get_close_matches(column, list(row), n=1, cutoff=0.6)
    values = {"columns there": ", ".join(map(str, row)) or "none", **({"did you mean": near[0]} if near else {})}
    raise DataError(
        f"{name()} has no column `{column}`",
        values,
        why="Every row must have the columns that the settings name.",
        fix=f"Set {hint}." if hint else "Name the right column in the settings, or mend the row.",
    )

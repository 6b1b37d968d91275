"""Questions: the items of a local task as what a model is asked, each checked."""

import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from stillroom.data.chat_templates import Name, Row, Template, text_in, value_in
from stillroom.data.sources import FileSource, files_of
from stillroom.errors import ConfigError, DataError, MissingError
from stillroom.evaluate.tasks.description import Description, ExactMatch, LastWord, MinimalPairs, MultipleChoice


class Question(NamedTuple):
    """One item of a task."""

    id: str
    group: str | None
    """The part of the task that it belongs to."""
    shown: str
    """What is asked, without instruction and examples."""
    context: str
    """What the model reads before its answer."""
    options: tuple[str, ...]
    """The answers whose likelihood is compared, as they follow the context; none where the model writes."""
    labels: tuple[str, ...]
    """The options without what stands before them."""
    gold: int
    """The right option."""
    answers: tuple[str, ...]
    """The right answers, where the model writes."""


class Asked(NamedTuple):
    """An item as a description makes it, before examples are put before it."""

    context: str
    options: tuple[str, ...]
    gold: int
    answers: tuple[str, ...]


Asker = Callable[[Row, Name], Asked]


def questions(description: Description, limit: int | None = None) -> list[Question]:
    """All items of a task, or the first ``limit``, in their order.

    Raises:
        MissingError, DataError: a file is not there or cannot be read; an item lacks a column, or what it holds cannot
            be asked, with file, line and column; two items have the same id.
        ConfigError: the description cannot be meant.
    """
    ask = _asker(description)
    before = _before(description, ask)
    delimiter = description.delimiter if isinstance(description, MultipleChoice | ExactMatch) else ""
    found, seen = [], set[str]()
    for file, place, row in islice(_rows(description.items), limit):
        name = partial("{} {}".format, file, place)
        asked = ask(row, name)
        number = f"{file.name} {place}" if description.id is None else _plain(row, description.id, name)
        if number in seen:
            raise _error(name(), f"an item `{number}` came before", {"column": description.id, "value": number})
        seen.add(number)
        group = None if description.group is None else _plain(row, description.group, name)
        options = tuple(delimiter + option for option in asked.options)
        context, shown = before + asked.context, asked.context
        found.append(Question(number, group, shown, context, options, asked.options, asked.gold, asked.answers))
    if not found:
        raise MissingError(
            f"{description.items} has no items",
            why="There is nothing to ask.",
            fix="Check the path in the description.",
        )
    return found


def _rows(path: str) -> Iterator[tuple[Path, str, Row]]:
    return FileSource(files_of(Path(path))).places()


# --- what each kind asks ----------------------------------------------------------------------------------------------


def _asker(description: Description) -> Asker:
    match description:
        case MultipleChoice():
            return _multiple_choice(description)
        case MinimalPairs():
            good, bad = (_template(description, field) for field in ("good", "bad"))
            return lambda row, name: Asked("", _not_empty((good(row, name), bad(row, name)), name), 0, ())
        case ExactMatch():
            context = _template(description, "context")
            return lambda row, name: Asked(context(row, name), (), 0, _answers(description, row, name))
        case LastWord():
            return partial(_last_word, _template(description, "text"))


def _template(description: Description, field: str) -> Template:
    return Template(f"{field} of {description.name}", getattr(description, field))


def _multiple_choice(description: MultipleChoice) -> Asker:
    context = _template(description, "context")
    given = description.choices
    fixed = None if isinstance(given, str) else [_choice(description, text) for text in given]

    def ask(row: Row, name: Name) -> Asked:
        choices = _list(row, str(given), name) if fixed is None else [text(row, name) for text in fixed]
        options = _distinct(_not_empty(choices, name), name)
        return Asked(context(row, name), options, _gold(row, description.target, choices, name), ())

    return ask


def _choice(description: MultipleChoice, text: str) -> Callable[[Row, Name], str]:
    if "{" in text or "}" in text:
        return Template(f"choices of {description.name}", text)
    return lambda _row, _name: text


def _list(row: Row, column: str, name: Name) -> list[str]:
    value = value_in(row, column, name)
    if isinstance(value, list) and len(value) >= 2 and all(isinstance(choice, str) for choice in value):
        return value
    texts = isinstance(value, list) and all(isinstance(choice, str) for choice in value)
    found = f"a list of {len(value)}" if texts else f"{value!r:.60}"
    raise _error(name(), "there is nothing to choose", {f"column `{column}`": found, "needed": "two texts or more"})


def _not_empty(choices: Sequence[str], name: Name) -> tuple[str, ...]:
    for i, choice in enumerate(choices):
        if not choice.strip():
            raise _error(name(), "a choice is empty", {"choice": i, "text": repr(choice)})
    return tuple(choices)


def _distinct(choices: tuple[str, ...], name: Name) -> tuple[str, ...]:
    for i, choice in enumerate(choices):
        if choice in choices[:i]:
            both = f"{choices.index(choice)} and {i}"
            raise _error(name(), "two choices are the same", {"choices": both, "text": f"{choice!r:.60}"})
    return choices


def _gold(row: Row, column: str, choices: Sequence[str], name: Name) -> int:
    value = value_in(row, column, name)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(choices):
        return value
    if isinstance(value, str) and value in choices:
        return choices.index(value)
    raise _error(
        name(),
        "the target is none of the choices",
        {f"column `{column}`": f"{value!r:.60}", "choices": f"0 to {len(choices) - 1}, or {', '.join(choices)}"[:200]},
    )


def _answers(description: ExactMatch, row: Row, name: Name) -> tuple[str, ...]:
    target = description.target
    if "{" in target or "}" in target:
        return (_template(description, "target")(row, name),)
    value = value_in(row, target, name)
    values = value if isinstance(value, list) else [value]
    if values and all(isinstance(answer, str | int | float) and not isinstance(answer, bool) for answer in values):
        return tuple(str(answer) for answer in values)
    raise _error(
        name(), "the target is no answer", {f"column `{target}`": f"{value!r:.60}", "needed": "a text or a number"}
    )


def _last_word(template: Template, row: Row, name: Name) -> Asked:
    text = template(row, name).rstrip()
    match = re.fullmatch(r"(.*\S)(\s+\S+)", text, re.DOTALL)
    if match is None:
        raise _error(name(), "there is no last word after others", {"text": f"{text!r:.60}", "needed": "two words"})
    return Asked(match[1], (match[2],), 0, ())


# --- examples, columns, errors ----------------------------------------------------------------------------------------


def _before(description: Description, ask: Asker) -> str:
    """Instruction and examples, which stand before every question."""
    if not isinstance(description, MultipleChoice | ExactMatch):
        return ""
    examples = [] if description.shots == 0 else list(islice(_examples(description), description.shots))
    if len(examples) < description.shots:
        raise ConfigError(
            f"the task {description.name} has too few examples",
            {"shots": description.shots, "examples": len(examples)},
            why="As many stand before each question as shots says.",
            fix="Set `examples` in the description to a list or a file with enough of them, or lower shots.",
        )
    text = description.instruction
    for name, row in examples:
        asked = ask(row, name)
        answer = asked.options[asked.gold] if asked.options else asked.answers[0]
        text += asked.context + description.delimiter + answer + description.separator
    return text


def _examples(description: MultipleChoice | ExactMatch) -> Iterator[tuple[Name, Row]]:
    if isinstance(description.examples, str):
        for file, place, row in _rows(description.examples):
            yield partial("{} {}".format, file, place), row
    else:
        for i, row in enumerate(description.examples or ()):
            yield partial("example {} of {}".format, i + 1, description.name), row


def _plain(row: Row, column: str, name: Name) -> str:
    value = value_in(row, column, name)
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else text_in(row, column, name)


def _error(place: str, what: str, values: dict[str, Any]) -> DataError:
    return DataError(
        f"{place}: {what}",
        values,
        why="The item cannot be asked, and none is left out without a word.",
        fix="Mend or delete it, or name another column in the description.",
    )

"""Diff: the items of a task on which two models part, read from the file of items."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from stillroom.errors import MissingError
from stillroom.evaluate.tasks.items import Item, ModelAnswer, read_items


class Change(NamedTuple):
    """An item that one model has right and the other wrong."""

    item: Item
    kind: Literal["gained", "lost"]
    """Whether b has right what a had wrong, or the other way about."""
    a: ModelAnswer
    b: ModelAnswer


def changes(path: Path, a: str, b: str) -> Iterator[Change]:
    """The items that changed from model ``a`` to model ``b``, in the order of the file.

    Raises:
        MissingError: the file is not there, or tells nothing of one of the models.
        DataError: a line of it is not an item.
    """
    for item in read_items(path):
        for name in (a, b):
            if name not in item.models:
                raise MissingError(
                    f"{path} tells nothing of {name}",
                    {"item": item.id, "models": ", ".join(item.models)},
                    why="Only models that answered the same items can be compared.",
                    fix="Name two of these models, or evaluate again with both.",
                )
        one, other = item.models[a], item.models[b]
        if one.correct != other.correct:
            yield Change(item, "gained" if other.correct > one.correct else "lost", one, other)


def as_text(change: Change, a: str, b: str) -> str:
    """A change in a few lines, for a terminal."""
    question = " ".join(change.item.question.split())
    lines = [
        f"{'+' if change.kind == 'gained' else '-'} {change.item.id}: {question[-160:]}",
        f"    right: {change.item.gold}",
    ]
    return "\n".join([*lines, *(f"    {name}: {one.prediction}" for name, one in ((a, change.a), (b, change.b)))])

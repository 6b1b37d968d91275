"""Items: what each model said of each item of a task, one JSON object a line."""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from stillroom.errors import DataError, MissingError
from stillroom.runs import writing

FOLDER = "items"


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelAnswer(_Part):
    """What a model said of an item."""

    prediction: str
    scores: tuple[float, ...] = ()
    """The log-likelihood of each option, in nats; none where the model wrote."""
    correct: float
    """By the metric that is shown first: 1 or 0, or what the item counts."""
    num_cut: int = 0
    """Tokens of the question that the model could not read, being too far back."""


class Item(_Part):
    """An item of a task."""

    id: str
    group: str | None = None
    question: str
    """What was asked, without instruction and examples."""
    options: tuple[str, ...] = ()
    gold: str
    models: dict[str, ModelAnswer] = Field(default_factory=dict)
    """By the model's name."""


def write_items(path: Path, items: Iterable[Item]) -> None:
    """Writes items under a temporary name, syncs the file and renames it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with writing(path), temporary.open("w", encoding="utf-8") as file:
        for item in items:
            file.write(json.dumps(item.model_dump(), ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
        temporary.replace(path)


def read_items(path: Path) -> Iterator[Item]:
    """The items in a file, streamed.

    Raises:
        MissingError: it is not there.
        DataError: a line is not an item.
    """
    if not path.is_file():
        raise MissingError(
            f"the items {path} are not there",
            why="They tell what each model said of each item.",
            fix="Check the path; `stillroom evaluate` writes them into OUT/items.",
        )
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield Item.model_validate_json(line)
            except ValidationError as error:
                raise DataError(
                    f"{path} line {number} is not an item",
                    {"problem": " ".join(error.errors()[0]["msg"].split())[:200]},
                    why="Every line is the result of one item.",
                    fix="Evaluate again, or restore the file.",
                ) from None


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

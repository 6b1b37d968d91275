"""Items: what each model said of each item of a task, one JSON object a line."""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from stillroom.errors import DataError, MissingError
from stillroom.files import writing

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

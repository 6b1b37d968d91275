"""Changes: the items of a task that one model has right and another wrong, as a reader sees them."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from stillroom.errors import DataError, StillroomError
from stillroom.evaluate.results import ModelFacts, TaskResult
from stillroom.evaluate.tasks.items import Change, changes

SHOWN = 10
"""Changed items of a task that the page holds, for two models."""
QUESTION_LENGTH = 400


class Changes(NamedTuple):
    """How two models part on a task."""

    task: str
    a: str
    b: str
    num_items: int
    gained: int
    """Items that b has right and a wrong."""
    lost: int
    shown: tuple[Change, ...]
    """The first of them, gained and lost in turn."""
    file: str
    missing: str | None = None
    """Why nothing is told, where nothing is."""


def pairs(models: Sequence[ModelFacts]) -> tuple[tuple[str, str], ...]:
    """The models that a reader wants to compare: each distilled one with the baseline, and with the teacher; where
    there is none, each model with the next."""

    def named(role: str) -> list[str]:
        return [facts.name for facts in models if facts.role == role]

    found = [(one, student) for student in named("distilled") for one in [*named("baseline"), *named("teacher")]]
    return tuple(found or pairwise(facts.name for facts in models))


def read_changes(tasks: Sequence[TaskResult], models: Sequence[ModelFacts], folder: Path) -> Iterator[Changes]:
    """The changes of every task and pair whose items are known. What cannot be read is told of."""
    for task in tasks:
        for a, b in pairs(models) if task.items is not None else ():
            if a in task.scores and b in task.scores:
                yield _changes(task, a, b, folder)


def task_changes(task: TaskResult, a: str, b: str, folder: Path) -> Iterator[Change]:
    """The items of a task that changed from model ``a`` to model ``b``.

    Raises:
        MissingError: the file of items is not there, or tells nothing of one of the models.
        DataError: it lies outside the evaluation's folder, or a line of it is not an item.
    """
    path = folder / str(task.items)
    if not path.resolve().is_relative_to(folder.resolve()):
        raise DataError(
            f"the items of {task.name} lie outside the evaluation's folder",
            {"folder": folder, "items": task.items},
            why="A file of results must not have other files read.",
            fix="Evaluate again.",
        )
    return changes(path, a, b)


def _changes(task: TaskResult, a: str, b: str, folder: Path) -> Changes:
    file = str(task.items)
    gained: list[Change] = []
    lost: list[Change] = []
    num_gained = num_lost = 0
    try:
        for change in task_changes(task, a, b, folder):
            num_gained += change.kind == "gained"
            num_lost += change.kind == "lost"
            kept = gained if change.kind == "gained" else lost
            if len(kept) < SHOWN:
                kept.append(change)
    except (StillroomError, OSError, UnicodeDecodeError) as error:
        why = error.what if isinstance(error, StillroomError) else str(error)
        return Changes(task.name, a, b, task.num_items, 0, 0, (), file, why)
    few = min(len(gained), max(SHOWN // 2, SHOWN - len(lost)))
    shown = (*gained[:few], *lost[: SHOWN - few])
    return Changes(task.name, a, b, task.num_items, num_gained, num_lost, shown, file)

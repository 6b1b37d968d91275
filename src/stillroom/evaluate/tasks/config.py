"""The settings of the tasks of an evaluation: which benchmarks, with how many shots and items."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from stillroom.config import Config, PathText, Positive

Whole = Annotated[int, Field(ge=0)]


class LocalTask(Config):
    """A task that a description file describes, over items in a file: no hub, no network."""

    kind: Literal["local"]
    path: PathText
    """The description file."""
    items: PathText | None = None
    """The file, or folder of files, of the items; null is what the description says."""
    name: Annotated[str, Field(pattern=r"^[\w.-]+$")] | None = None
    """What the task is called in the results; null is the description's name, with that of `items` where it is set."""
    shots: Whole | None = None
    """Examples before each question; null is what the description says."""
    limit: Positive | None = None
    """Ask only the first so many items."""


class HarnessTask(Config):
    """A task or group of lm-eval."""

    kind: Literal["lm_eval"]
    task: str
    """Its name there: hellaswag, leaderboard_bbh, …; leaderboard is the six of the Open LLM Leaderboard v2. Or the
    path of a task in lm-eval's own form."""
    name: Annotated[str, Field(pattern=r"^[\w.-]+$")] | None = None
    """What the task is called in the results; null is its name there."""
    shots: Whole | None = None
    """Examples before each question; null is the task's own number."""
    limit: Positive | None = None
    """Ask only the first so many items of each of its tasks."""


def _from_text(value: object) -> object:
    """A bare text: a path where it ends as a description does or is there, and otherwise a name of lm-eval."""
    if isinstance(value, Path) or (isinstance(value, str) and _is_path(value)):
        return {"kind": "local", "path": str(value)}
    return {"kind": "lm_eval", "task": value} if isinstance(value, str) else value


def _is_path(text: str) -> bool:
    return text.endswith((".yaml", ".yml")) or "/" in text or text.startswith(("~", "$"))


TaskConfig = Annotated[LocalTask | HarnessTask, Field(discriminator="kind"), BeforeValidator(_from_text)]
"""A description file's path, the name of a task of lm-eval, or settings."""

AnyTask = LocalTask | HarnessTask

LEADERBOARD = (
    "leaderboard_ifeval",
    "leaderboard_bbh",
    "leaderboard_math_hard",
    "leaderboard_gpqa",
    "leaderboard_musr",
    "leaderboard_mmlu_pro",
)
"""The six benchmarks of the Open LLM Leaderboard v2."""


def expand(tasks: Sequence[AnyTask]) -> tuple[AnyTask, ...]:
    """The same tasks with `leaderboard` as its six, so that each has a result and one that fails leaves the others."""
    found: list[Any] = []
    for task in tasks:
        if isinstance(task, HarnessTask) and task.task == "leaderboard":
            for part in LEADERBOARD:
                name = None if task.name is None else part.replace("leaderboard", task.name)
                found.append(task.model_copy(update={"task": part, "name": name}))
        else:
            found.append(task)
    return tuple(found)

"""The settings of tasks: which benchmarks, with how many shots and items; and the description file of a local task."""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from stillroom.config import Config, PathText, Positive, load
from stillroom.errors import ConfigError, MissingError
from stillroom.recipe import read_recipe

Whole = Annotated[int, Field(ge=0)]
TaskName = Annotated[str, Field(pattern=r"^[\w.-]+$")]


class LocalTask(Config):
    """A task that a description file describes, over items in a file: no hub, no network."""

    kind: Literal["local"]
    path: PathText
    """The description file."""
    items: PathText | None = None
    """The file, or folder of files, of the items; null is what the description says."""
    name: TaskName | None = None
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
    name: TaskName | None = None
    """What the task is called in the results; null is its name there."""
    shots: Whole | None = None
    """Examples before each question; null is the task's own number."""
    limit: Positive | None = None
    """Ask only the first so many items of each of its tasks."""


def _from_text(value: object) -> object:
    """Reads a bare text as a path where it ends as a description does or looks like one, else as a name of lm-eval."""
    if isinstance(value, Path):
        value = str(value)
    elif not isinstance(value, str):
        return value
    elif not (value.endswith((".yaml", ".yml")) or "/" in value or value.startswith(("~", "$"))):
        return {"kind": "lm_eval", "task": value}
    return {"kind": "local", "path": value}


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
    expanded: list[Any] = []
    for task in tasks:
        if isinstance(task, HarnessTask) and task.task == "leaderboard":
            for part in LEADERBOARD:
                name = None if task.name is None else part.replace("leaderboard", task.name)
                expanded.append(task.model_copy(update={"task": part, "name": name}))
        else:
            expanded.append(task)
    return tuple(expanded)


# --- descriptions ----------------------------------------------------------------------------------------------------

Template = str
"""A column of the items, or a text with columns in braces."""


class _Description(Config):
    name: TaskName
    """The name of the task in the results."""
    version: str = "1"
    """Stands with the results; change it when the questions change."""
    items: PathText
    """The file of items (.jsonl, .json, .parquet, .gz too), or a folder of such files; relative to this file."""
    id: str | None = None
    """The column that tells items apart; null takes file and line."""
    group: str | None = None
    """A column by whose values the score is also given."""


class _Prompted(_Description):
    instruction: str = ""
    """A text before everything else."""
    context: Template
    """The text before the answer: a column, or a text with columns in braces: "Q: {question}\\nA:"."""
    delimiter: str = " "
    """The text between context and answer."""
    shots: Whole = 0
    """Examples before each question: the first so many of `examples`."""
    examples: PathText | Annotated[tuple[dict[str, Any], ...], Field(strict=False)] | None = None
    """Items that serve as examples: a list, or a file relative to this one. None of them should be asked."""
    separator: str = "\n\n"
    """The text after each example."""


def _two_or_more(choices: str | tuple[str, ...]) -> str | tuple[str, ...]:  # kept: a validator
    if isinstance(choices, tuple) and len(choices) < 2:
        raise ValueError(f"there is nothing to choose among {len(choices)}: give two texts or more, or a column")
    return choices


class MultipleChoice(_Prompted):
    """The answer is the choice with the highest log-likelihood after the context."""

    kind: Literal["multiple_choice"]
    choices: Annotated[str | Annotated[tuple[str, ...], Field(strict=False)], AfterValidator(_two_or_more)]
    """The column that holds the list of choices; or the choices, where all items have the same, as texts that may
    have columns in braces."""
    target: str
    """The column that holds the right choice: its number from 0, or its text."""
    metric: Literal["acc", "acc_norm", "acc_bytes", "acc_tokens"] = "acc"
    """The score that is shown first: by summed log-likelihood, or by that divided by the choice's characters (which is
    lm-eval's acc_norm), UTF-8 bytes or tokens. All are given."""


class MinimalPairs(_Description):
    """The acceptable one of two texts should be likelier."""

    kind: Literal["minimal_pairs"]
    good: Template
    """The acceptable text: a column, or a text with columns in braces."""
    bad: Template
    """The other text."""


def _compiles(pattern: str) -> str:  # kept: a validator
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"it is not a regular expression: {error}") from None
    return pattern


class Regex(Config):
    """Keep the last match of a regular expression, or its first group where it has one; nothing where none matches."""

    kind: Literal["regex"]
    pattern: Annotated[str, AfterValidator(_compiles)]
    """The expression in Python's syntax."""


Filter = Literal["strip", "lower", "last_number"] | Regex
"""strip removes white space around; lower makes small letters; last_number keeps the last number, 1,234.0 as 1234."""
Filters = Annotated[tuple[Filter, ...], Field(strict=False)]


class ExactMatch(_Prompted):
    """The model writes an answer, the top-1 token at each step, that must be the target."""

    kind: Literal["exact_match"]
    target: Template
    """The right answer: a column, or a text with columns in braces. Each text of a list in a column is right."""
    until: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(strict=False)] = ("\n",)
    """The answer ends before the first of these, or with the end of sequence."""
    max_tokens: Positive = 64
    """The answer ends after so many tokens."""
    filters: Filters = ("strip",)
    """The filters of the answer before it is compared, in turn."""
    target_filters: Filters = ("strip",)
    """The filters of the target."""


class LastWord(_Description):
    """The model's top-1 tokens after a text without its last word must be that word (as in LAMBADA)."""

    kind: Literal["last_word"]
    text: Template
    """The text: a column, or a text with columns in braces."""


Description = MultipleChoice | MinimalPairs | ExactMatch | LastWord
KINDS: dict[str, type[Description]] = {
    "multiple_choice": MultipleChoice,
    "minimal_pairs": MinimalPairs,
    "exact_match": ExactMatch,
    "last_word": LastWord,
}


def read_description(task: LocalTask) -> Description:
    """Reads the description of a task, with the changes that the task's own settings make and with whole paths.

    Raises:
        MissingError: it is not there.
        ConfigError: it is not YAML, or a setting is unknown, missing or not valid.
    """
    path = Path(task.path)
    try:
        values = read_recipe(path)
    except MissingError as error:
        raise MissingError(
            error.what.replace("the recipe", "the description"),
            error.values,
            why="It says what a task asks of the models.",
            fix="Check the path; a task of lm-eval is named without a slash, and without .yaml.",
        ) from None
    kind = values.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        near = difflib.get_close_matches(str(kind), KINDS, n=1)
        raise ConfigError(
            f"{path} describes no task" if kind is None else f"{path} describes a task of no known kind",
            {
                "kind": "not given" if kind is None else kind,
                **({"did you mean": near[0]} if near else {"possible": ", ".join(KINDS)}),
            },
            why="The kind says what is asked of the model and what counts as right.",
            fix="Set `kind` in the description; docs/guide/tasks.md describes each.",
        )
    try:
        description = load(KINDS[kind], path)
    except ConfigError as error:
        raise ConfigError(
            error.what,
            error.values,
            why=f"Read from {path}, which describes a task.",
            fix="Mend the description; docs/guide/tasks.md explains each of its settings.",
        ) from None
    changes: dict[str, Any] = {"items": str(path.parent / description.items)}
    if task.items is not None:
        suffix = re.sub(r"[^\w-]+", "-", Path(task.items).name.split(".")[0])
        changes |= {"items": task.items, "name": f"{description.name}-{suffix}"}
    if task.name is not None:
        changes["name"] = task.name
    if isinstance(description, _Prompted):
        if isinstance(description.examples, str):
            changes["examples"] = str(path.parent / description.examples)
        if task.shots is not None:
            changes["shots"] = task.shots
    elif task.shots:
        raise ConfigError(
            f"the task {description.name} takes no examples",
            {"shots": task.shots, "kind": kind},
            why="Only questions with a context have examples before them.",
            fix="Leave shots out for this task.",
        )
    return type(description).model_validate({**description.model_dump(), **changes})

"""Descriptions: what a local task asks and what counts as right, in about ten lines of YAML."""

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from stillroom.config import Config, PathText, Positive, load
from stillroom.errors import ConfigError, MissingError
from stillroom.evaluate.tasks.config import LocalTask, Whole
from stillroom.recipe import read_recipe

Template = str
"""A column of the items, or a text with columns in braces."""


class _Description(Config):
    name: Annotated[str, Field(pattern=r"^[\w.-]+$")]
    """What the task is called in the results."""
    version: str = "1"
    """Told with the results; change it when what is asked changes."""
    items: PathText
    """The file of items (.jsonl, .json, .parquet, .gz too), or a folder of such files; relative to this file."""
    id: str | None = None
    """The column that tells items apart; null takes file and line."""
    group: str | None = None
    """A column by whose values the score is also told."""


class _Prompted(_Description):
    instruction: str = ""
    """A text before everything else."""
    context: Template
    """What stands before the answer: a column, or a text with columns in braces: "Q: {question}\\nA:"."""
    delimiter: str = " "
    """What stands between context and answer."""
    shots: Whole = 0
    """Examples before each question: the first so many of `examples`."""
    examples: PathText | Annotated[tuple[dict[str, Any], ...], Field(strict=False)] | None = None
    """Items that serve as examples: a list, or a file relative to this one. None of them should be asked."""
    separator: str = "\n\n"
    """What stands after each example."""


def _two_or_more(choices: str | tuple[str, ...]) -> str | tuple[str, ...]:
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
    lm-eval's acc_norm), UTF-8 bytes or tokens. All are told."""


class MinimalPairs(_Description):
    """Of two texts the acceptable one should be likelier."""

    kind: Literal["minimal_pairs"]
    good: Template
    """The acceptable text: a column, or a text with columns in braces."""
    bad: Template
    """The other text."""


def _compiles(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"it is not a regular expression: {error}") from None
    return pattern


class Regex(Config):
    """Keep the last match of a regular expression, or its first group where it has one; nothing where none matches."""

    kind: Literal["regex"]
    pattern: Annotated[str, AfterValidator(_compiles)]
    """In Python's syntax."""


Filter = Literal["strip", "lower", "last_number"] | Regex
"""strip removes white space around; lower makes small letters; last_number keeps the last number, 1,234.0 as 1234."""
Filters = Annotated[tuple[Filter, ...], Field(strict=False)]


class ExactMatch(_Prompted):
    """The model writes an answer, its likeliest token at each step, that must be the target."""

    kind: Literal["exact_match"]
    target: Template
    """The right answer: a column, or a text with columns in braces. Of a list in a column each is right."""
    until: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(strict=False)] = ("\n",)
    """The answer ends before the first of these, or with the end of sequence."""
    max_tokens: Positive = 64
    """The answer ends after so many tokens."""
    filters: Filters = ("strip",)
    """What is done to the answer before it is compared, in turn."""
    target_filters: Filters = ("strip",)
    """What is done to the target."""


class LastWord(_Description):
    """The model's likeliest tokens after a text without its last word must be that word (as in LAMBADA)."""

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
    """The description of a task, with what the task's own settings change of it and paths made whole.

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

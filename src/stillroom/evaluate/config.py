"""The settings of `stillroom evaluate`: models -> scores and a report; and the description file of a local task."""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field, StringConstraints, model_validator

from stillroom.config import Config, PathText, Positive, load
from stillroom.data.config import DataConfig, TextData, TokensData
from stillroom.errors import ConfigError, MissingError
from stillroom.recipe import read_recipe

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z][\w-]*$")]

Role = Literal["teacher", "distilled", "baseline", "other"]
ROLES: dict[str, Role] = {"teacher": "teacher", "distilled": "distilled", "baseline": "baseline"}
"""The role of a model by its name alone."""


class ModelConfig(Config):
    """A model that is evaluated."""

    model: PathText
    """Hub name or folder; behind an address, the name that it is served under."""
    url: str | None = None
    """The address of an OpenAI-compatible server that runs it, for tasks alone: http://127.0.0.1:8000/v1."""
    role: Role | None = None
    """Its role; null is what its name says: teacher, distilled, baseline, and any other name is other. There is one
    teacher at the most, and one baseline: the student that was not distilled."""
    tokenizer: PathText | None = None
    """Hub name or folder of its tokenizer; null is the model's own. One that makes other ids than that is refused."""
    revision: str | None = None
    """Commit or tag on the hub."""
    trust_remote_code: bool = False
    """Run code that comes with the model."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """The type of its weights and arithmetic; auto is bfloat16 on a GPU and float32 on a CPU."""
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2", "flex_attention"] = "auto"
    """The attention kernel; auto is what `transformers` takes."""
    run: PathText | None = None
    """The folder of the run that made it, whose training curves the report shows; null is the folder around the model,
    where that is a run's."""


ModelOrText = Annotated[
    ModelConfig, BeforeValidator(lambda value: value if isinstance(value, dict | ModelConfig) else {"model": value})
]
"""A model; a bare text is its folder or hub name."""


# --- tasks -----------------------------------------------------------------------------------------------------------

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
    """Its name in the results; null is the description's name, with that of `items` where it is set."""
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
    """Its name in the results; null is its name there."""
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


# --- the verb --------------------------------------------------------------------------------------------------------


class EvaluateConfig(Config):
    """`stillroom evaluate`: how much of the teacher did the student keep?"""

    verb: ClassVar[str | None] = "evaluate"

    models: Annotated[dict[Name, ModelOrText], Field(min_length=1)]
    """The models, each under a name that the results call it by: models.teacher=FOLDER models.distilled=FOLDER
    models.baseline=FOLDER, and any others. A bare text is the model; or settings:"""
    data: DataConfig | None = None
    """The held-out text that they predict; null where there are only tasks."""
    tasks: Annotated[tuple[TaskConfig, ...], Field(strict=False)] = ()
    """The benchmarks that they are asked; each may also be a bare text: the path of a description file, or the name of
    a task of lm-eval."""
    batch_tokens: Positive | Literal["auto"] = "auto"
    """Tokens that go through a model at once, with padding; auto is the length of a row or 16384, whichever is more. It
    changes memory and speed and no score."""
    logits_bytes: Positive | Literal["auto"] = "auto"
    """Budget for the logits that are held at a time; auto is 256 MiB."""
    device: str = "auto"
    """cpu, cuda, cuda:1; auto takes a CUDA device where there is one, and else the CPU."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """The seed of the resamples that intervals are taken from."""
    out: PathText
    """The folder of the results, which must not exist yet."""

    @model_validator(mode="after")
    def _fits_together(self) -> "EvaluateConfig":
        for role in ("teacher", "baseline"):
            names = [name for name in self.models if self.role(name) == role]
            if len(names) > 1:
                raise ValueError(f"there is one {role} at the most, and {' and '.join(names)} are said to be it")
        if self.data is None:
            if not self.tasks:
                raise ValueError("there is nothing to measure: give `data` (a held-out text), `tasks`, or both")
            return self
        data = self.data
        if data.weight is not None:
            raise ValueError("data.weight: every predicted token counts the same in an evaluation")
        if data.cache != "auto":
            raise ValueError("data.cache: an evaluation keeps no tokenized data")
        if getattr(data, "template", "auto") == "student":
            raise ValueError("data.template=student: there may be several; auto demands that all have the same one")
        return self

    def role(self, name: str) -> Role:
        """The role of the model of that name."""
        return self.models[name].role or ROLES.get(name, "other")

    @property
    def teacher(self) -> str | None:
        """The teacher's name."""
        return next((name for name in self.models if self.role(name) == "teacher"), None)

    @property
    def baseline(self) -> str | None:
        return next((name for name in self.models if self.role(name) == "baseline"), None)

    @property
    def cuts(self) -> bool:
        """Whether a long document loses text, and where depends on the tokenizer."""
        return self.data is not None and not (
            isinstance(self.data, TextData | TokensData) and self.data.overlong == "split"
        )


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
        what, why = error.what.replace("the recipe", "the description"), "It says what a task asks of the models."
        fix = "Check the path; a task of lm-eval is named without a slash, and without .yaml."
        raise MissingError(what, error.values, why=why, fix=fix) from None
    kind = values.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        near = difflib.get_close_matches(str(kind), KINDS, n=1)
        raise ConfigError(
            f"{path} describes {'no task' if kind is None else 'a task of no known kind'}",
            {"kind": kind or "not given", **({"did you mean": near[0]} if near else {"possible": ", ".join(KINDS)})},
            why="The kind says what is asked of the model and what counts as right.",
            fix="Set `kind` in the description; docs/guide/tasks.md describes each.",
        )
    try:
        description = load(KINDS[kind], path)
    except ConfigError as error:
        fix = "Mend the description; docs/guide/tasks.md explains each of its settings."
        why = f"Read from {path}, which describes a task."
        raise ConfigError(error.what, error.values, why=why, fix=fix) from None
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

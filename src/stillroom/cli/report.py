"""``stillroom report``: the reports of evaluations, made anew from their files; and the items that changed."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from stillroom.cli.arguments import Arguments
from stillroom.config import Config, explain, load
from stillroom.errors import ConfigError, MissingError
from stillroom.terminal import say

USAGE = """\
usage: stillroom report RUN…
       stillroom report RUN between=[A,B] [task=NAME]

Makes report.html and report.md anew in the folder of each evaluation (the `out` of `stillroom evaluate`), from its
results.json, its items/ and the metrics.jsonl of the runs that made its models. report.html needs matplotlib:
pip install "stillroom[report]".

With `between` it prints every item that one of two models has right and the other wrong, and writes nothing.

settings"""


class BetweenConfig(Config):
    """`stillroom report RUN between=[A,B]`: the items that changed between two models."""

    between: Annotated[tuple[str, str], Field(strict=False)]
    """The names of the two models in the evaluation: from the first to the second an item is gained or lost."""
    task: str | None = None
    """The task; null is every one."""


def main(arguments: Arguments) -> int:
    if "help" in arguments.flags:
        say(f"{USAGE}\n{explain(BetweenConfig)}")
        return 0
    flags = arguments.flags - {"quiet", "debug"}
    if not arguments.words or flags or (arguments.overrides and len(arguments.words) > 1):
        given = [*arguments.words, *arguments.overrides, *(f"--{flag}" for flag in sorted(flags))]
        raise ConfigError(
            "`report` takes the folders of evaluations, or one of them and `between`",
            {"given": " ".join(given) or "nothing", "wanted": "RUN…, or RUN between=[A,B]"},
            why="What is in a report is decided by what was evaluated.",
            fix="Write `stillroom report RUN…`; a path with a sign of equality in it is written as ./a=b.",
        )
    if arguments.overrides:
        return _print_changes(Path(arguments.words[0]), load(BetweenConfig, None, arguments.overrides))

    from stillroom.evaluate.report.page import rebuild

    for word in arguments.words:
        for path in rebuild(Path(word)):
            say(f"report    {path}")
    return 0


def _print_changes(folder: Path, config: BetweenConfig) -> int:
    from stillroom.evaluate.report.content import task_changes
    from stillroom.evaluate.report.page import read_results
    from stillroom.evaluate.results import as_text

    results, (a, b) = read_results(folder), config.between
    tasks = [task for task in results.tasks if task.items is not None and config.task in (None, task.name)]
    if not tasks:
        raise MissingError(
            f"{folder} has no items to compare",
            {"task": config.task or "any", "tasks with items": ", ".join(t.name for t in results.tasks if t.items)},
            why="Two models are compared by what they said of each item.",
            fix="Name one of these tasks, or evaluate again with tasks.",
        )
    for task in tasks:
        found = list(task_changes(task, a, b, folder))
        gained = sum(change.kind == "gained" for change in found)
        say(f"{task.name}, {a} -> {b}: {gained} gained, {len(found) - gained} lost of {task.num_items:,}")
        for change in found:
            say(as_text(change, a, b))
    return 0

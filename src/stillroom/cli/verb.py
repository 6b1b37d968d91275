"""The steps of every verb with a recipe: explain its settings, print its plan, or run and print the result."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

from stillroom.cli.arguments import Arguments
from stillroom.config import Config, explain, load


def run_verb(
    verb: str,
    config_class: type[Config],
    summary: Callable[[dict[str, Any]], str],
    arguments: Arguments,
    code: Callable[[dict[str, Any]], int] = lambda _: 0,
) -> int:
    """Runs ``stillroom.VERB.run.run``, or with --dry-run prints ``stillroom.VERB.plan.make_plan``; the exit code, which
    of a run is what ``code`` makes of its record."""
    if "help" in arguments.flags:
        print(f"usage: stillroom {verb} [RECIPE.yaml] [key=value …]\n\n{explain(config_class)}")
        return 0
    config = load(config_class, arguments.recipe, arguments.overrides)

    from stillroom.models.loading import quiet

    quiet()
    if "dry-run" in arguments.flags:
        print(import_module(f"stillroom.{verb}.plan").make_plan(config), end="")
        return 0

    from stillroom.cli.progress import Progress

    run = import_module(f"stillroom.{verb}.run").run
    with Progress(quiet="quiet" in arguments.flags) as progress:
        record = run(
            config, resume="resume" in arguments.flags, overwrite="overwrite" in arguments.flags, report=progress
        )
    if not record:  # another process of the run tells it
        return 0
    print(summary(record))
    return code(record)

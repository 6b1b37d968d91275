"""The steps of every verb with a recipe: explain its settings, print its plan, or run and print the result."""

import gc
from collections.abc import Callable
from importlib import import_module
from typing import Any

from stillroom.cli.arguments import Arguments
from stillroom.config import Config, explain, load


def import_all(name: str) -> Any:
    """Imports a module that brings torch and transformers, and returns it.

    Nothing of what they make can be collected, and looking through it again and again takes a third of their time. So
    the collector waits until they are there, and never looks at it again.
    """
    gc.disable()
    try:
        return import_module(name)
    finally:
        gc.freeze()
        gc.enable()


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

    dry = "dry-run" in arguments.flags
    module = import_all(f"stillroom.{verb}.{'plan' if dry else 'run'}")

    from stillroom.cli.progress import Progress
    from stillroom.models.loading import quiet

    quiet()
    if dry:
        print(module.make_plan(config), end="")
        return 0
    with Progress(quiet="quiet" in arguments.flags) as progress:
        record = module.run(
            config, resume="resume" in arguments.flags, overwrite="overwrite" in arguments.flags, report=progress
        )
    if not record:  # another process of the run tells it
        return 0
    print(summary(record))
    return code(record)

"""The command line's own grammar, VERB [RECIPE.yaml] [key=value …] and the flags; and what is done with it alike: a
verb explains its settings, prints its plan, or runs and prints the result."""

import difflib
import gc
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any

from stillroom.errors import ConfigError
from stillroom.terminal import say

if TYPE_CHECKING:
    from stillroom.config import Config

FLAGS = ("dry-run", "resume", "overwrite", "quiet", "debug", "help")
OF_SOME = {"json": ("doctor", "plan")}
"""Flags that only some verbs have."""
WITH_WORDS = ("chat", "plan", "report", "store")
"""Verbs that take words of their own in the place of a recipe: `stillroom store check DIR`, `stillroom report RUN`."""


@dataclass
class Arguments:
    verb: str | None = None
    recipe: str | None = None
    overrides: list[str] = field(default_factory=list)
    flags: set[str] = field(default_factory=set)
    words: list[str] = field(default_factory=list)
    """All other words, of a verb that takes them."""


def parse(words: Sequence[str], verbs: Sequence[str]) -> Arguments:
    """Flags stand anywhere; the first other word is the verb, ``key=value`` sets, and one more word is the recipe."""
    arguments = Arguments()
    for word in words:
        if word in ("-h", "--help"):
            arguments.flags.add("help")
        elif word.startswith("-"):
            name = word.lstrip("-")
            arguments.flags.add(name if name in OF_SOME else _known(name, FLAGS, "flag", word))
        elif arguments.verb is None:
            arguments.verb = _known(word, verbs, "verb", word)
        elif re.match(r"[A-Za-z_][\w.-]*=", word):
            arguments.overrides.append(word)
        elif arguments.verb in WITH_WORDS:
            arguments.words.append(word)
        elif arguments.recipe is None:
            arguments.recipe = word
        else:
            raise ConfigError(
                f"`{word}` is neither a setting nor the recipe",
                {"recipe": arguments.recipe, "then": word},
                why="A run has one recipe, and every other word after the verb sets one value.",
                fix="Write settings as key=value, with no spaces around the sign.",
            )
    if arguments.verb is None and arguments.flags - {"help"}:
        raise ConfigError(
            "there is no verb",
            {"flags": ", ".join(f"--{flag}" for flag in sorted(arguments.flags)), "verbs": ", ".join(verbs)},
            why="The first word says what to do.",
            fix="Write `stillroom VERB [RECIPE.yaml] [key=value …]`; see `stillroom --help`.",
        )
    for flag, having in OF_SOME.items():
        if flag in arguments.flags and arguments.verb not in (None, *having):
            raise ConfigError(
                f"`{arguments.verb}` has no --{flag}",
                {"verbs that have it": ", ".join(having), "flags": ", ".join(f"--{name}" for name in FLAGS)},
                why="Nothing would be done for it.",
                fix="Leave it out.",
            )
    if {"resume", "overwrite"} <= arguments.flags:
        raise ConfigError(
            "--resume and --overwrite contradict each other",
            {"--resume": "goes on with the run that is there", "--overwrite": "deletes it"},
            why="Only one of them can be meant.",
            fix="Leave one of them out.",
        )
    return arguments


def _known(name: str, names: Sequence[str], kind: str, word: str) -> str:
    if name in names:
        return name
    dashes = "--" if kind == "flag" else ""
    near = difflib.get_close_matches(name, names, n=1)
    raise ConfigError(
        f"`{word}` is not a {kind}",
        {
            **({"did you mean": dashes + near[0]} if near else {}),
            f"{kind}s": ", ".join(dashes + name for name in names),
        },
        why="Nothing would be done for it." if kind == "flag" else "The first word says what to do.",
        fix="See `stillroom --help`; settings are written as key=value.",
    )


def refuse_flags(name: str, given: set[str], allowed: Sequence[str], why: str) -> None:
    """Raises ConfigError where a command has been given another flag than those that it has."""
    for flag in sorted(given - set(allowed)):
        flags = {"flags": ", ".join(f"--{one}" for one in allowed)}
        raise ConfigError(f"`{name}` has no --{flag}", flags, why=why, fix="Leave it out.")


def first_key(word: str) -> str:
    """The first key of a ``key=value``: batch of batch.tokens=4096."""
    return word.partition("=")[0].partition(".")[0]


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
    config_class: "type[Config]",
    summary: Callable[[dict[str, Any]], str],
    arguments: Arguments,
    code: Callable[[dict[str, Any]], int] = lambda _: 0,
) -> int:
    """Runs ``stillroom.VERB.run.run``, or with --dry-run prints ``stillroom.VERB.plan.make_plan``; the exit code, which
    of a run is what ``code`` makes of its record."""
    from stillroom.config import explain, load  # which is no part of what answers `stillroom --help`

    if "help" in arguments.flags:
        say(f"usage: stillroom {verb} [RECIPE.yaml] [key=value …]\n\n{explain(config_class)}")
        return 0
    config = load(config_class, arguments.recipe, arguments.overrides)

    dry = "dry-run" in arguments.flags
    module = import_all(f"stillroom.{verb}.{'plan' if dry else 'run'}")

    from stillroom.cli.progress import Progress
    from stillroom.models.loading import quiet

    quiet()
    if dry:
        say(str(module.make_plan(config)).rstrip("\n"))
        return 0
    with Progress(quiet="quiet" in arguments.flags) as progress:
        record = module.run(
            config, resume="resume" in arguments.flags, overwrite="overwrite" in arguments.flags, report=progress
        )
    if not record:  # another process of the run tells it
        return 0
    say(summary(record))
    return code(record)

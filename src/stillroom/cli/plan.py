"""``stillroom plan``: what a run will need, before anything is loaded or rented."""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from stillroom.cli.arguments import Arguments, first_key, import_all, refuse_flags
from stillroom.config import explain, load
from stillroom.errors import ConfigError
from stillroom.estimates.hardware import Hardware
from stillroom.estimates.report import CostReport
from stillroom.estimates.storage import Storage, storage_report
from stillroom.recipe import override, read_recipe
from stillroom.terminal import say

USAGE = """\
usage: stillroom plan RECIPE.yaml [key=value …] [--json]
       stillroom plan verb=VERB key=value … [--json]
       stillroom plan storage prompts=N vocab=N length=N [width=N layers=N] [--json]

What a run of `distill`, `capture`, `evaluate` or `prune` will need: parameters, memory by part, arithmetic, time, cost
and storage; whether it fits, and the nearest settings with which it does; whether to ask the teacher live or once. From
configs and the headers of weights alone, in seconds: no weights are loaded, and of models on the hub only these small
files are read.
Every assumption is printed. Settings below are the plan's own, and all others are the recipe's:

  stillroom plan recipes/qwen2-7b-to-1.5b-logits.yaml device=L40S data_tokens=6e7 batch.micro_tokens=8192

`device` here is one of the table, whatever the recipe's own says. With `storage` there is no model at all."""

VERBS = {"capture": "CaptureConfig", "distill": "DistillConfig", "evaluate": "EvaluateConfig", "prune": "PruneConfig"}
"""The verbs that can be planned, with the class of their settings."""


def main(arguments: Arguments) -> int:
    if "help" in arguments.flags:
        say(f"{USAGE}\n\nsettings\n{explain(Hardware)}\n\nsettings of storage\n{explain(Storage)}")
        return 0
    refuse_flags(
        "plan", arguments.flags, ("json", "quiet", "debug", "help"), "A plan reads headers and writes nothing."
    )
    report = _report(arguments.words, arguments.overrides)
    say(report.as_json() if "json" in arguments.flags else report)
    return 0


def _report(words: Sequence[str], overrides: Sequence[str]) -> CostReport:
    if list(words) == ["storage"]:
        return storage_report(load(Storage, None, overrides))
    if len(words) > 1:
        raise _what(f"`{words[1]}` is neither a setting nor the recipe", " ".join(words))
    own = [word for word in overrides if first_key(word) in Hardware.model_fields]
    hardware = load(Hardware, None, own)
    rest = [word for word in overrides if word not in own]
    recipe = words[0] if words else None
    values = {} if recipe is None else read_recipe(Path(recipe))
    for word in rest:
        if first_key(word) == "verb":
            override(values, word)
    verb = values.get("verb")
    if verb not in VERBS:
        what = "there is nothing to plan" if not values and not rest else "nothing says which verb this is a recipe of"
        raise _what(what if verb is None else f"`{verb}` is no verb that can be planned", recipe or "no recipe")
    config = load(getattr(import_module(f"stillroom.{verb}.config"), VERBS[verb]), recipe, rest)
    module = import_all(f"stillroom.{verb}.estimate")
    return module.costs(config, module.read_headers(config), hardware, f"{verb} {recipe or ''}".rstrip())


def _what(what: str, given: str) -> ConfigError:
    return ConfigError(
        what,
        {
            "given": given,
            "wanted": f"a recipe that begins with `verb: …`, one of {', '.join(VERBS)}; or `storage`",
        },
        why="A plan is of one run of one verb, or of storage alone, and a guess may be wrong.",
        fix="Begin the recipe with `verb: distill` (or whichever), or write `stillroom plan verb=distill key=value …`.",
    )

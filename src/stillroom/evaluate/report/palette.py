"""Palette: the colour, dash and mark of each model; teacher green, distilled purple, baseline yellow."""

from collections.abc import Sequence
from typing import NamedTuple

from stillroom.evaluate.results import ModelFacts, Role


class Paint(NamedTuple):
    """How a model is drawn. Each colour is a pair: on a light page and on a dark one."""

    fill: tuple[str, str]
    line: tuple[str, str]
    """Of edges and curves: at least 3 : 1 against the page."""


class Look(NamedTuple):
    """A model's place in the charts."""

    name: str
    paint: Paint
    dash: str
    """An SVG dash pattern, so that curves are told apart without colour."""
    mark: str
    """A mark of the plotting library."""


PAINTS: dict[Role, tuple[Paint, ...]] = {
    "teacher": (Paint(("#2f9e5b", "#45b873"), ("#1d7a43", "#62d690")),),
    "distilled": (
        Paint(("#7a4fd0", "#9b78ec"), ("#6236bd", "#b79cf8")),
        Paint(("#bda4f2", "#5f3db0"), ("#6236bd", "#b79cf8")),
        Paint(("#4b2a8f", "#d9c9ff"), ("#4b2a8f", "#d9c9ff")),
    ),
    "baseline": (Paint(("#f2c230", "#f2c84b"), ("#8a6700", "#f2c84b")),),
    "other": (
        Paint(("#3b8fdd", "#4a9de8"), ("#1f6bb0", "#7dbcf5")),
        Paint(("#e07a3a", "#e5864a"), ("#a8501a", "#f0a575")),
        Paint(("#2aa3a8", "#37b3b8"), ("#147277", "#62d0d4")),
        Paint(("#d763a0", "#de74ac"), ("#a83774", "#f09cc8")),
        Paint(("#8d959e", "#9aa3ad"), ("#626a73", "#b6bec7")),
    ),
}
DASHES = ("", "6 3", "2 2", "8 3 2 3", "1 2", "10 4")
MARKS = ("o", "s", "^", "D", "v", "P")


def looks(models: Sequence[ModelFacts]) -> tuple[Look, ...]:
    """A look for each model, in their order; the first distilled one has the plain line."""
    used: dict[Role, int] = {}
    found = {}
    for i, facts in enumerate(sorted(models, key=lambda one: one.role != "distilled")):
        paints, number = PAINTS[facts.role], used.get(facts.role, 0)
        used[facts.role] = number + 1
        paint = paints[number % len(paints)]
        found[facts.name] = Look(facts.name, paint, DASHES[i % len(DASHES)], MARKS[i % len(MARKS)])
    return tuple(found[facts.name] for facts in models)

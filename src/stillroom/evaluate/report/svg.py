"""SVG: the color, dash and mark of each model, and a figure of the plotting library as a part of the page."""

import io
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple
from xml.etree import ElementTree

from stillroom.evaluate.report.words import visible
from stillroom.evaluate.results import ModelFacts, Role

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SVG, LINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}"
INK, MUTED, RULE = "#0f0001", "#0f0002", "#0f0003"
"""Stand-ins in a figure for the page's colors, which depend on whether it is light or dark."""
FACE = "DejaVu Sans"
"""The library's own typeface, by which it takes the measure of texts; the page's is hardly ever wider."""
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": FACE,
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": RULE,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.unicode_minus": True,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "axes.labelsize": 8,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "hatch.linewidth": 0.8,
}


def fill(model: int) -> str:
    """The stand-in for the fill of a model, by its number."""
    return f"#0f01{model:02x}"


def line(model: int) -> str:
    return f"#0f02{model:02x}"


@contextmanager
def drawing() -> Iterator[None]:
    """A context in which figures are made and turned into SVG. The library's own typeface may lack any letter: it is
    the page that sets the text."""
    import matplotlib

    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from font")
        yield


def inline(figure: "Figure", name: str, title: str, text: str, hints: Mapping[str, str]) -> str:
    """The figure as an ``<svg>`` element that takes the width that it is given.

    Args:
        name: starts every id in it, so that figures of one page do not share any.
        title: the title of the chart.
        text: the same in words, for those who do not see it.
        hints: the text by the id of an artist that is shown when one points at it.
    """
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": name}):
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    root = ElementTree.fromstring(buffer.getvalue())
    for child in list(root):
        if child.tag.endswith("metadata"):
            root.remove(child)
    view = root.attrib["viewBox"]
    root.attrib.clear()
    root.attrib.update({"viewBox": view, "role": "img", "aria-labelledby": f"{name}-title {name}-text"})
    for element in root.iter():
        _adapt(element, name, hints)
    for place, (kind, content) in enumerate((("title", title), ("desc", text))):
        element = ElementTree.Element(f"{SVG}{kind}", {"id": f"{name}-{'text' if kind == 'desc' else kind}"})
        element.text = visible(content)
        root.insert(place, element)
    ElementTree.register_namespace("", SVG[1:-1])
    ElementTree.register_namespace("xlink", LINK[1:-1])
    return ElementTree.tostring(root, encoding="unicode")


def _adapt(element: ElementTree.Element, name: str, hints: Mapping[str, str]) -> None:
    """Gives an element an id of its own, the page's colors and typeface, and the text for who points at it."""
    given = element.get("id")
    if given is not None and given in hints:
        hint = ElementTree.Element(f"{SVG}title")
        hint.text = visible(hints[given])
        element.insert(0, hint)
    if given is not None:
        element.set("id", f"{name}-{given}")
    if (target := element.get(f"{LINK}href")) is not None:
        element.set(f"{LINK}href", target.replace("#", f"#{name}-", 1))
    for key in ("style", "clip-path", "fill", "stroke"):
        if (text := element.get(key)) is not None:
            text = text.replace("url(#", f"url(#{name}-")
            for kind, variable in (("1", "fill"), ("2", "line")):
                text = re.sub(rf"#0f0{kind}([0-9a-f]{{2}})", lambda m, v=variable: f"var(--{v}-{int(m[1], 16)})", text)
            for color, variable in ((INK, "ink"), (MUTED, "muted"), (RULE, "rule")):
                text = text.replace(color, f"var(--{variable})")
            element.set(key, text.replace(f"'{FACE}'", "var(--face)"))


# --- the look of each model ------------------------------------------------------------------------------------------


class Paint(NamedTuple):
    """The colors of a model. Each is a pair: on a light page and on a dark one."""

    fill: tuple[str, str]
    line: tuple[str, str]
    """The color of edges and curves: at least 3 : 1 against the page."""


class Look(NamedTuple):
    """A model's place in the charts."""

    name: str
    paint: Paint
    dash: str
    """An SVG dash pattern, so that curves are told apart without color."""
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
"""Teachers are green, distilled models purple, baselines yellow."""
DASHES = ("", "6 3", "2 2", "8 3 2 3", "1 2", "10 4")
MARKS = ("o", "s", "^", "D", "v", "P")


def looks(models: Sequence[ModelFacts]) -> tuple[Look, ...]:
    """A look for each model, in their order; the first distilled one has the plain line."""
    used: dict[Role, int] = {}
    by_name = {}
    for i, facts in enumerate(sorted(models, key=lambda one: one.role != "distilled")):
        paints, number = PAINTS[facts.role], used.get(facts.role, 0)
        used[facts.role] = number + 1
        paint = paints[number % len(paints)]
        by_name[facts.name] = Look(facts.name, paint, DASHES[i % len(DASHES)], MARKS[i % len(MARKS)])
    return tuple(by_name[facts.name] for facts in models)

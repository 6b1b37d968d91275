"""SVG: a figure of the plotting library as part of a page, in the page's own colours and typeface."""

import io
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from stillroom.evaluate.report.words import visible

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SVG = "{http://www.w3.org/2000/svg}"
INK, MUTED, RULE = "#0f0001", "#0f0002", "#0f0003"
"""Stand-ins in a figure for the page's colours, which depend on whether it is light or dark."""
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
    """In it figures are made and turned into SVG. Any letter may be missing in the library's own typeface: it is the
    page that sets the text."""
    import matplotlib

    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from font")
        yield


def inline(figure: "Figure", name: str, title: str, text: str, hints: Mapping[str, str]) -> str:
    """The figure as an ``<svg>`` element that takes the width that it is given.

    Args:
        name: starts every id in it, so that figures of one page do not share any.
        title: what it is.
        text: the same in words, for those who do not see it.
        hints: by the id of an artist, what is shown when one points at it.
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


LINK = "{http://www.w3.org/1999/xlink}"


def _adapt(element: ElementTree.Element, name: str, hints: Mapping[str, str]) -> None:
    """Ids of its own, the page's colours and typeface, and what is shown when one points at it."""
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
            text = re.sub(r"#0f0([0-2])([0-9a-f]{2})", _colour, text)
            element.set(key, text.replace(f"'{FACE}'", "var(--face)"))


def _colour(match: re.Match[str]) -> str:
    kind, number = match[1], int(match[2], 16)
    if kind == "0":
        return f"var(--{('ink', 'muted', 'rule')[number - 1]})"
    return f"var(--{'fill' if kind == '1' else 'line'}-{number})"

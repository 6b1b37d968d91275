"""Charts: bars with intervals, curves and dots, drawn by matplotlib, as SVG in the colors of the page."""

import io
import math
import re
import textwrap
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from xml.etree import ElementTree

from stillroom.errors import require
from stillroom.evaluate.report.tables import (
    BY,
    Group,
    Panel,
    ends_of,
    error_text,
    interval_text,
    shortened,
    value_text,
    visible,
)
from stillroom.evaluate.results import Breakdown, ModelFacts, Number, Role

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 10.0
"""The width of every chart, in inches; the page scales it."""
BARS_IN_A_ROW = 24
MOST_GROUPS = 8
LEAST_GROUPS = 3
AXES_POINTS = 660
"""The width of the axes of bars, in points, about."""


SVG, LINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}"
INK, MUTED, RULE = "#0f0001", "#0f0002", "#0f0003"
"""Stand-ins in a figure for the page's colors, which depend on whether it is light or dark."""
FACE = "DejaVu Sans"
"""The library's own typeface, by which it takes the measure of texts; the page's is hardly ever wider."""
STYLE = Path(__file__).parent / "charts.mplstyle"


class Paint(NamedTuple):
    """The colors of a model. Each is a pair: on a light page and on a dark one."""

    fill: tuple[str, str]
    line: tuple[str, str]
    """The color of edges and curves: at least 3 : 1 against the page."""


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


class Look(NamedTuple):
    """A model's place in the charts."""

    name: str
    number: int
    paint: Paint
    dash: str
    """An SVG dash pattern, so that curves are told apart without color."""
    mark: str
    """A mark of the plotting library."""

    @property
    def fill(self) -> str:
        """The stand-in for the color of its areas."""
        return f"#0f01{self.number:02x}"

    @property
    def line(self) -> str:
        return f"#0f02{self.number:02x}"

    @property
    def dashes(self) -> Any:
        """The pattern as the plotting library takes it."""
        return (0, tuple(float(part) / 2 for part in self.dash.split())) if self.dash else "solid"


def looks(models: Sequence[ModelFacts]) -> tuple[Look, ...]:
    """A look for each model, in their order; the first distilled one has the plain line."""
    found, used = {}, Counter[Role]()
    for i, (number, facts) in enumerate(sorted(enumerate(models), key=lambda one: one[1].role != "distilled")):
        paint = PAINTS[facts.role][used[facts.role] % len(PAINTS[facts.role])]
        used[facts.role] += 1
        found[number] = Look(facts.name, number, paint, DASHES[i % len(DASHES)], MARKS[i % len(MARKS)])
    return tuple(found[number] for number in range(len(models)))


def check() -> None:
    """Raises MissingError where the plotting library is not installed."""
    require("matplotlib", "report", "the charts of report.html")


# --- bars ------------------------------------------------------------------------------------------------------------


def bars(groups: Sequence[Group], looks: Sequence[Look], name: str, title: str, axis: str = "percent") -> str:
    """Grouped bars in percent, or in what ``axis`` says, with the 95 % interval of each."""
    shown = [look for look in looks if any(look.name in group.numbers for group in groups)]
    most = max(1, min(MOST_GROUPS, BARS_IN_A_ROW // max(1, len(shown))))
    num_rows = math.ceil(len(groups) / most)
    in_row = math.ceil(len(groups) / num_rows)
    ends = [100 * end for group in groups for number in group.numbers.values() for end in ends_of(number)]
    low, high = min([0.0, *ends]), max([1.0, *ends])
    room = 0.12 * (high - low)
    texts, hints = [], {}
    for group in groups:
        values = [
            f"{one.name} {value_text(group.numbers[one.name], '%')}" for one in shown if one.name in group.numbers
        ]
        texts.append(f"{group.title}: {', '.join(values)}")
    with _drawing(0.5 + 2.5 * num_rows, num_rows, 1) as (figure, axes):
        for row, ax in enumerate(axes):
            part = groups[row * in_row : (row + 1) * in_row]
            hints |= _bars(ax, part, shown, f"bar-{row}", max(in_row, LEAST_GROUPS))
            ax.set_ylim(low - room if low < 0 else 0, high + room)
            ax.set_ylabel(axis)
            ax.grid(axis="y")
            ax.axhline(0, color=MUTED, linewidth=0.8)
            ax.spines["left"].set_visible(False)
            ax.tick_params(length=0)
        return inline(figure, name, title, ". ".join(texts), hints)


class _Label(NamedTuple):
    """The look of the values of bars: at the bar's end, beside the line of the interval, so that neither hides the
    other."""

    digits: int
    size: float
    """The size of the letters, in points."""
    x: float
    """The distance of the label's middle from the middle of its bar, in points."""
    whisker: float
    """The distance of the line of the interval from there."""

    @classmethod
    def in_bars(cls, width: float, numbers: Sequence[Number]) -> "_Label":
        """The largest label that a bar of so many points has room for, or the smallest there is. The interval's line is
        moved to the left as far as the label needs."""
        for digits, size in ((1, 8.0), (1, 7.0), (0, 7.0), (0, 6.0)):
            label = cls(digits, size, 0, 0)
            room = max(0.64 * size * len(label.text(100 * number.value)) for number in numbers)
            if room + 5 <= width:
                break
        whisker = max(-width / 2 + 2, min(0, width / 2 - room - 3))
        return cls(digits, size, whisker + 3 + room / 2, whisker)

    def text(self, value: float) -> str:
        return f"{value:.{self.digits}f}".replace("-", "−")


def _bars(ax: "Axes", groups: Sequence[Group], shown: Sequence[Look], key: str, slots: int) -> dict[str, str]:
    """Draws the groups of a row; returns the text of each bar by its id."""
    hints: dict[str, str] = {}
    width = min(0.8 / max(1, len(shown)), 0.26)
    label = _Label.in_bars(0.9 * width * AXES_POINTS / slots, [n for group in groups for n in group.numbers.values()])
    for g, group in enumerate(groups):
        for i, look in enumerate(shown):
            if (number := group.numbers.get(look.name)) is None:
                continue
            x, y = g + (i - (len(shown) - 1) / 2) * width, 100 * number.value
            (bar,) = ax.bar(x, y, 0.9 * width, color=look.fill, edgecolor=look.line, linewidth=1)
            bar.set_gid(f"{key}-{g}-{i}")
            parts = [value_text(number, "%"), error_text(number, "%")]
            if interval := interval_text(number, "%"):
                parts.append(f"(95 % interval {interval})")
            hints[f"{key}-{g}-{i}"] = f"{group.title}, {look.name}: {' '.join(filter(None, parts))}"
            low, high = (100 * end for end in ends_of(number))
            if high > low:
                at = x + label.whisker * slots / AXES_POINTS
                ends = [[y - low], [high - y]]
                ax.errorbar(at, y, ends, fmt="none", color=INK, ecolor=INK, elinewidth=1, capsize=1.8)
            place = (label.x if high > low else 0, 2 if y >= 0 else -2)
            about: dict[str, Any] = {"ha": "center", "va": "bottom" if y >= 0 else "top", "fontsize": label.size}
            ax.annotate(label.text(y), (x, y), place, textcoords="offset points", **about)
    characters = int(118 / slots)
    for g, group in enumerate(groups):
        row = 0
        for text in (group.title.replace("_", " "), group.note):  # each in two lines at the most
            for length in range(2 * characters, characters // 2, -1):
                lines = textwrap.wrap(shortened(text, length), characters)
                if len(lines) <= 2:
                    break
            else:
                lines = []
            for line in lines:
                place = ((g, 0), (0, -6 - 10.5 * row), ("data", "axes fraction"), "offset points")
                ax.annotate(line, *place, ha="center", va="top", fontsize=8)
                row += 1
    ax.set_xticks([])
    spare = (slots - len(groups)) / 2
    ax.set_xlim(-0.5 - spare, len(groups) - 0.5 + spare)
    return hints


# --- curves ----------------------------------------------------------------------------------------------------------


def curves(panels: Sequence[Panel], looks: Sequence[Look], name: str, title: str, teacher: Look | None) -> str:
    """Curves over optimizer steps, side by side."""
    from matplotlib.ticker import MaxNLocator

    by_name, texts = {look.name: look for look in looks}, []
    with _drawing(3.0, 1, len(panels)) as (figure, axes):
        for ax, panel in zip(axes, panels, strict=True):
            for curve in panel.curves:
                look = by_name[curve.model]
                if curve.thin:
                    ax.plot(curve.steps, curve.thin, color=look.line, alpha=0.25, linewidth=0.7)
                mark = look.mark if len(curve.steps) <= 24 else None
                ax.plot(curve.steps, curve.values, color=look.line, lw=1.6, ls=look.dashes, marker=mark, ms=4)
            if panel.level is not None and teacher is not None:
                ax.axhline(panel.level, color=teacher.line, linewidth=1.2, linestyle=(0, (5, 2)))
                place = ((1, panel.level), (0, 3), ("axes fraction", "data"), "offset points")
                ax.annotate(f"teacher {panel.level:.3f}", *place, ha="right", color=teacher.line, fontsize=8)
            ax.set(title=panel.title, xlabel="optimizer step", ylabel="nats a token")
            ax.grid(axis="y")
            ax.set_xlim(0, 1.02 * max(step for curve in panel.curves for step in curve.steps))
            ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            ax.yaxis.set_major_locator(MaxNLocator(6))
            ax.xaxis.set_major_formatter("{x:,.0f}")
            ends = [f"{curve.model} ends at {curve.values[-1]:.3f}" for curve in panel.curves]
            texts.append(f"{panel.title}: {', '.join(ends)}")
        return inline(figure, name, title, ". ".join(texts), {})


# --- dots ------------------------------------------------------------------------------------------------------------


def dots(breakdowns: Sequence[Breakdown], looks: Sequence[Look], name: str, title: str) -> str:
    """The mean KL of each bin, a row a bin and a mark a model; one panel a breakdown."""
    texts, hints = [], {}
    for one in breakdowns:
        parts = []
        for model, values in one.forward_kl_nats.items():
            known = [(label, x) for label, x in zip(one.labels, values, strict=True) if x is not None]
            if known:
                (first, low), (last, high) = known[0], known[-1]
                parts.append(f"{model} {low:.3f} nats at {first}, {high:.3f} at {last}")
        texts.append(f"{BY[one.by]}: {'; '.join(parts)}")
    with _drawing(1.1 + 0.24 * max(len(one.labels) for one in breakdowns), 1, len(breakdowns)) as (figure, axes):
        for b, (ax, one) in enumerate(zip(axes, breakdowns, strict=True)):
            for look in (look for look in looks if look.name in one.forward_kl_nats):
                places = [(x, y) for y, x in enumerate(one.forward_kl_nats[look.name]) if x is not None]
                ax.plot(*zip(*places, strict=True), color=look.line, linewidth=0.9, linestyle=look.dashes)
                for x, y in places:
                    (dot,) = ax.plot(x, y, look.mark, color=look.fill, mec=look.line, ms=5.5, mew=0.9)
                    dot.set_gid(key := f"dot-{b}-{look.number}-{y}")
                    hints[key] = f"{look.name}, {one.labels[y]}: {x:.3f} nats, {one.num_tokens[y]:,} tokens"
            ax.set_yticks(range(len(one.labels)), [shortened(label, 18) for label in one.labels])
            ax.set_ylim(len(one.labels) - 0.4, -0.6)
            ax.set_xlim(left=0)
            ax.set(title=BY[one.by], xlabel="KL to the teacher, nats a token")
            ax.grid(axis="both")
            ax.tick_params(length=0)
        return inline(figure, name, title, ". ".join(texts), hints)


# --- from figures to SVG ---------------------------------------------------------------------------------------------


@contextmanager
def _drawing(height: float, rows: int, columns: int) -> Iterator[tuple["Figure", list["Axes"]]]:
    """A figure with its axes, and the context in which it is drawn and turned into SVG. The library's own typeface may
    lack any letter: it is the page that sets the text."""
    from matplotlib import style
    from matplotlib.figure import Figure

    with style.context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from font")
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        yield figure, list(figure.subplots(rows, columns, squeeze=False).flat)


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

"""Charts: bars with intervals, curves and dots, drawn by matplotlib, as SVG for the page."""

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from stillroom.errors import require
from stillroom.evaluate.report import words
from stillroom.evaluate.report.svg import INK, MUTED, Look, drawing, fill, inline, line
from stillroom.evaluate.results import Breakdown, Number
from stillroom.statistics import Z_95

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


class Group(NamedTuple):
    """Bars that stand together: one number of each model."""

    title: str
    note: str
    """The text below the title."""
    numbers: Mapping[str, Number]


class Curve(NamedTuple):
    """A curve of one model; ``thin`` is drawn pale behind the others."""

    model: str
    steps: Sequence[int]
    values: Sequence[float]
    thin: Sequence[float] = ()


class Panel(NamedTuple):
    """Curves that share an axis, and the level of the teacher where there is one."""

    title: str
    curves: Sequence[Curve]
    level: float | None = None


def check() -> None:
    """Raises MissingError where the plotting library is not installed."""
    require("matplotlib", "report", "the charts of report.html")


def _figure(height: float, rows: int, columns: int, **settings: Any) -> tuple["Figure", list["Axes"]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **settings)
    return figure, list(axes.flat)


# --- bars ------------------------------------------------------------------------------------------------------------


def bars(groups: Sequence[Group], looks: Sequence[Look], name: str, title: str, axis: str = "per cent") -> str:
    """Grouped bars in per cent, or in what ``axis`` says, with the 95 % interval of each."""
    looks_by = {look.name: (i, look) for i, look in enumerate(looks)}
    shown = [look.name for look in looks if any(look.name in group.numbers for group in groups)]
    most = max(1, min(MOST_GROUPS, BARS_IN_A_ROW // max(1, len(shown))))
    num_rows = math.ceil(len(groups) / most)
    in_row = math.ceil(len(groups) / num_rows)
    ends = [100 * end for group in groups for number in group.numbers.values() for end in ends_of(number)]
    low, high = min([0.0, *ends]), max([1.0, *ends])
    room = 0.12 * (high - low)
    hints: dict[str, str] = {}
    with drawing():
        figure, axes = _figure(0.5 + 2.5 * num_rows, num_rows, 1)
        for row, ax in enumerate(axes):
            part = groups[row * in_row : (row + 1) * in_row]
            slots = max(in_row, LEAST_GROUPS)
            _bars(ax, part, shown, looks_by, f"bar-{row}", slots, hints)
            ax.set_ylim(low - room if low < 0 else 0, high + room)
            ax.set_ylabel(axis)
            ax.grid(axis="y")
            ax.axhline(0, color=MUTED, linewidth=0.8)
            ax.spines["left"].set_visible(False)
            ax.tick_params(length=0)
        texts = []
        for group in groups:
            numbers = {one: group.numbers[one] for one in shown if one in group.numbers}
            values = [f"{one} {words.value(number, '%')}" for one, number in numbers.items()]
            texts.append(f"{group.title}: {', '.join(values)}")
        return inline(figure, name, title, ". ".join(texts), hints)


def ends_of(number: Number) -> tuple[float, float]:
    """The ends of the 95 % interval, or those by the standard error, or the value alone."""
    if number.low is not None and number.high is not None:
        return min(number.low, number.value), max(number.high, number.value)
    half = Z_95 * (number.error or 0.0)
    return number.value - half, number.value + half


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


def _bars(
    ax: "Axes",
    groups: Sequence[Group],
    shown: Sequence[str],
    looks: Mapping[str, tuple[int, Look]],
    key: str,
    slots: int,
    hints: dict[str, str],
) -> None:
    width = min(0.8 / max(1, len(shown)), 0.26)
    label = _Label.in_bars(0.9 * width * AXES_POINTS / slots, [n for group in groups for n in group.numbers.values()])
    for g, group in enumerate(groups):
        for i, name in enumerate(shown):
            if name not in group.numbers:
                continue
            number, (color, _) = group.numbers[name], looks[name]
            x, y = g + (i - (len(shown) - 1) / 2) * width, 100 * number.value
            (bar,) = ax.bar(x, y, 0.9 * width, color=fill(color), edgecolor=line(color), linewidth=1)
            bar.set_gid(f"{key}-{g}-{i}")
            parts = [words.value(number, "%"), words.error(number, "%")]
            if interval := words.interval(number, "%"):
                parts.append(f"(95 % interval {interval})")
            hints[f"{key}-{g}-{i}"] = f"{group.title}, {name}: {' '.join(filter(None, parts))}"
            low, high = (100 * end for end in ends_of(number))
            if high > low:
                at = x + label.whisker * slots / AXES_POINTS
                ax.errorbar(
                    at, y, [[y - low], [high - y]], fmt="none", color=INK, ecolor=INK, elinewidth=1, capsize=1.8
                )
            place = (label.x if high > low else 0, 2 if y >= 0 else -2)
            valign = "bottom" if y >= 0 else "top"
            ax.annotate(
                label.text(y), (x, y), place, textcoords="offset points", ha="center", va=valign, fontsize=label.size
            )
    characters = int(118 / slots)
    for g, group in enumerate(groups):
        for row, text in enumerate(_lines(group, characters)):
            place = (0, -6 - 10.5 * row)
            across = ("data", "axes fraction")
            ax.annotate(text, (g, 0), place, across, "offset points", ha="center", va="top", fontsize=8)
    ax.set_xticks([])
    spare = (slots - len(groups)) / 2
    ax.set_xlim(-0.5 - spare, len(groups) - 0.5 + spare)


def _lines(group: Group, characters: int) -> Iterator[str]:
    """The title in two lines at the most, and the note."""
    for text in (group.title.replace("_", " "), group.note):
        for length in range(2 * characters, characters // 2, -1):
            lines = textwrap.wrap(words.shortened(text, length), characters)
            if len(lines) <= 2:
                yield from lines
                break


# --- curves ----------------------------------------------------------------------------------------------------------


def curves(panels: Sequence[Panel], looks: Sequence[Look], name: str, title: str, teacher: int | None) -> str:
    """Curves over optimizer steps, side by side."""
    from matplotlib.ticker import MaxNLocator

    looks_by = {look.name: (i, look) for i, look in enumerate(looks)}
    with drawing():
        figure, axes = _figure(3.0, 1, len(panels))
        for ax, panel in zip(axes, panels, strict=True):
            for curve in panel.curves:
                i, look = looks_by[curve.model]
                if curve.thin:
                    ax.plot(curve.steps, curve.thin, color=line(i), alpha=0.25, linewidth=0.7)
                style = _dash(look.dash)
                mark = look.mark if len(curve.steps) <= 24 else None
                ax.plot(curve.steps, curve.values, color=line(i), linewidth=1.6, linestyle=style, marker=mark, ms=4)
            if panel.level is not None and teacher is not None:
                ax.axhline(panel.level, color=line(teacher), linewidth=1.2, linestyle=(0, (5, 2)))
                ax.annotate(
                    f"teacher {panel.level:.3f}",
                    (1, panel.level),
                    (0, 3),
                    xycoords=("axes fraction", "data"),
                    textcoords="offset points",
                    ha="right",
                    color=line(teacher),
                    fontsize=8,
                )
            ax.set_title(panel.title)
            ax.set_xlabel("optimizer step")
            ax.set_ylabel("nats a token")
            ax.grid(axis="y")
            ax.set_xlim(0, 1.02 * max(step for curve in panel.curves for step in curve.steps))
            ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            ax.yaxis.set_major_locator(MaxNLocator(6))
            ax.xaxis.set_major_formatter("{x:,.0f}")
        texts = []
        for panel in panels:
            ends = [f"{curve.model} ends at {curve.values[-1]:.3f}" for curve in panel.curves]
            texts.append(f"{panel.title}: {', '.join(ends)}")
        text = ". ".join(texts)
        return inline(figure, name, title, text, {})


def _dash(pattern: str) -> Any:
    return (0, tuple(float(part) / 2 for part in pattern.split())) if pattern else "solid"


# --- dots ------------------------------------------------------------------------------------------------------------

BY = {
    "token_frequency": "by how often the token comes",
    "position": "by the tokens read before it",
    "teacher_entropy": "by the teacher's entropy, nats",
}


def dots(breakdowns: Sequence[Breakdown], looks: Sequence[Look], name: str, title: str) -> str:
    """The mean KL of each bin, a row a bin and a mark a model; one panel a breakdown."""
    hints: dict[str, str] = {}
    with drawing():
        height = 1.1 + 0.24 * max(len(one.labels) for one in breakdowns)
        figure, axes = _figure(height, 1, len(breakdowns))
        for b, (ax, one) in enumerate(zip(axes, breakdowns, strict=True)):
            _dots(ax, one, looks, f"dot-{b}", hints)
        texts = []
        for one in breakdowns:
            parts = []
            for model, values in one.forward_kl_nats.items():
                known = [(label, x) for label, x in zip(one.labels, values, strict=True) if x is not None]
                if known:
                    (first, low), (last, high) = known[0], known[-1]
                    parts.append(f"{model} {low:.3f} nats at {first}, {high:.3f} at {last}")
            texts.append(f"{BY[one.by]}: {'; '.join(parts)}")
        text = ". ".join(texts)
        return inline(figure, name, title, text, hints)


def _dots(ax: "Axes", one: Breakdown, looks: Sequence[Look], key: str, hints: dict[str, str]) -> None:
    rows = range(len(one.labels))
    for i, look in enumerate(looks):
        if look.name not in one.forward_kl_nats:
            continue
        values = one.forward_kl_nats[look.name]
        places = [(x, y) for y, x in zip(rows, values, strict=True) if x is not None]
        ax.plot(*zip(*places, strict=True), color=line(i), linewidth=0.9, linestyle=_dash(look.dash))
        for x, y in places:
            (dot,) = ax.plot(x, y, look.mark, color=fill(i), mec=line(i), ms=5.5, mew=0.9)
            dot.set_gid(f"{key}-{i}-{y}")
            hints[f"{key}-{i}-{y}"] = f"{look.name}, {one.labels[y]}: {x:.3f} nats, {one.num_tokens[y]:,} tokens"
    ax.set_yticks(rows, [words.shortened(label, 18) for label in one.labels])
    ax.set_ylim(len(one.labels) - 0.4, -0.6)
    ax.set_xlim(left=0)
    ax.set_title(BY[one.by])
    ax.set_xlabel("KL to the teacher, nats a token")
    ax.grid(axis="both")
    ax.tick_params(length=0)

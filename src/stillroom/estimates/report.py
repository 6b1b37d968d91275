"""Report: figures with units, what was assumed, and advice; as an aligned table and as JSON."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Unit = Literal["bytes", "count", "FLOP", "s", "hours", "$", "share", "each", "number", "text"]


@dataclass(frozen=True)
class Figure:
    """One line: a value of a unit, and what it rests on. A value of None is not known, which the note explains."""

    value: float | str | None
    unit: Unit
    note: str = ""


@dataclass
class CostReport:
    """Figures by section and name; assumptions and advice as sentences."""

    title: str
    sections: dict[str, dict[str, Figure]] = field(default_factory=dict)
    assumptions: list[str] = field(default_factory=list)
    advice: list[str] = field(default_factory=list)

    def add(self, section: str, name: str, value: float | str | None, unit: Unit, note: str = "") -> None:
        self.sections.setdefault(section, {})[name] = Figure(value, unit, note)

    def __str__(self) -> str:
        lines = [self.title]
        widest = max((len(name) for figures in self.sections.values() for name in figures), default=0)
        for section, figures in self.sections.items():
            lines += ["", section]
            for name, figure in figures.items():
                text = f"  {name:{widest}}  {shown(figure):>24}  {figure.note}"
                lines.append(text.rstrip())
        for heading, sentences in (("advice", self.advice), ("assumed", self.assumptions)):
            if sentences:
                lines += ["", heading, *(f"  - {sentence}" for sentence in sentences)]
        return "\n".join(lines)

    def tree(self) -> dict[str, Any]:
        """The same as plain values, with the unit of each."""
        return {
            "plan": self.title,
            **{
                section: {
                    name: {"value": f.value, "unit": f.unit, **({"note": f.note} if f.note else {})}
                    for name, f in figures.items()
                }
                for section, figures in self.sections.items()
            },
            "advice": self.advice,
            "assumed": self.assumptions,
        }

    def as_json(self) -> str:
        return json.dumps(self.tree(), indent=1)

    def texts(self) -> dict[str, Any]:
        """The same as texts, for a plan in YAML."""
        sections: Mapping[str, Any] = {
            section: {
                name: f"{shown(figure)}{f' ({figure.note})' if figure.note else ''}" for name, figure in figures.items()
            }
            for section, figures in self.sections.items()
        }
        return {**sections, "advice": self.advice, "assumed": self.assumptions}


def shown(figure: Figure) -> str:
    """A value with its unit, in at most a few digits."""
    value = figure.value
    if value is None:
        return "not known"
    if isinstance(value, str):
        return value
    match figure.unit:
        case "bytes":
            return bytes_text(value)
        case "count":
            return f"{value:,.0f}"
        case "FLOP":
            return f"{value:.3g} FLOP"
        case "s":
            return time_text(value)
        case "hours":
            return f"{value:,.3g} hours" if value < 1000 else f"{value:,.0f} hours"
        case "$":
            return f"${value:,.2f}"
        case "share":
            return f"{value:.1%}"
        case "each":
            return f"{value:,.1f} bytes"
        case _:
            return f"{value:.3g}"


def bytes_text(size: float) -> str:
    """Bytes in the unit that suits them: 4.66 TiB."""
    for unit in ("bytes", "KiB", "MiB", "GiB", "TiB"):
        if abs(size) < 1024:
            return f"{size:,.0f} bytes" if unit == "bytes" else f"{size:,.2f} {unit}"
        size /= 1024
    return f"{size:,.2f} PiB"


def time_text(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    if seconds < 2 * 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 2 * 86400 else f"{seconds / 86400:,.1f} days"

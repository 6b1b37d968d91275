"""Page: the report as one HTML file that loads nothing, and runs nothing."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from stillroom.evaluate.report import charts, content, words
from stillroom.evaluate.report.changes import QUESTION_LENGTH
from stillroom.evaluate.report.content import ReportContent
from stillroom.evaluate.results import Passage

HERE = Path(__file__).parent
MARKS = {
    "o": '<circle cx="19" cy="9" r="4.5" PAINT/>',
    "s": '<path d="M15 5h8v8h-8z" PAINT/>',
    "^": '<path d="M19 3.5l5 9.5h-10z" PAINT/>',
    "D": '<path d="M19 3l6 6-6 6-6-6z" PAINT/>',
    "v": '<path d="M19 14.5l5-9.5h-10z" PAINT/>',
    "P": '<path d="M17 4h4v3h3v4h-3v3h-4v-3h-3v-4h3z" PAINT/>',
}
"""The marks of the plotting library, for legends."""


def to_page(report: ReportContent) -> str:
    """The whole page. What comes from files is text there, whatever it holds.

    Raises:
        MissingError: the plotting library is not installed.
    """
    charts.check()
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_finalize,
        loader=FileSystemLoader(HERE),
        keep_trailing_newline=True,
    )
    return environment.get_template("page.html.jinja").render(
        report=report,
        charts=_charts(report),
        style=Markup((HERE / "style.css").read_text(encoding="utf-8")),
        paints=Markup(_paints(report)),
        marks={name: Markup(mark) for name, mark in MARKS.items()},
        levels=content.level_names(),
        far=f"{content.FAR:g}",
        level=content.level,
        tokens=_tokens,
        tail=_tail,
        shown=lambda groups: {name for group in groups for name in group.numbers},
        trained={curve.model for panel in report.training.panels for curve in panel.curves},
        broken={name for one in report.results.breakdowns for name in one.forward_kl_nats},
    )


def _finalize(value: Any) -> Any:
    """What the page shows of a value: texts without signs that a browser would obey or hide."""
    return words.visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _charts(report: ReportContent) -> dict[str, Markup]:
    found: dict[str, str] = {}
    if report.task_groups:
        found["tasks"] = charts.bars(
            report.task_groups, report.looks, "tasks", "Scores of each benchmark", report.task_axis
        )
    if report.agreement_groups:
        found["agreement"] = charts.bars(report.agreement_groups, report.looks, "agreement", "Agreement")
    if report.training.panels:
        panels = report.training.panels
        found["training"] = charts.curves(panels, report.looks, "training", "Training curves", report.teacher)
    if report.results.breakdowns:
        title = "KL to the teacher by kind of token and place"
        found["dots"] = charts.dots(report.results.breakdowns, report.looks, "dots", title)
    return {name: Markup(svg) for name, svg in found.items()}


def _paints(report: ReportContent) -> str:
    """The colours of the models, on a light page (which paper is) and on a dark one."""

    def rules(shade: int) -> str:
        return " ".join(
            f"--fill-{i}: {look.paint.fill[shade]}; --line-{i}: {look.paint.line[shade]};"
            for i, look in enumerate(report.looks)
        )

    dark = f"@media screen and (prefers-color-scheme: dark) {{ :root {{ {rules(1)} }} }}"
    return f":root {{ {rules(0)} }}\n{dark}"


def _tokens(passage: Passage) -> Iterator[tuple[str, float]]:
    """The texts of the tokens, with line ends made visible, and their nats."""
    for text, nats in zip(passage.tokens, passage.kl_nats, strict=True):
        yield (text.replace("\n", "↵\n") or "∅"), nats


def _tail(text: str) -> str:
    """The end of a long text, where a question stands."""
    return text if len(text) <= QUESTION_LENGTH else f"… {text[-QUESTION_LENGTH:]}"

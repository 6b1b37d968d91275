"""The files of a report: report.md, and the page report.html that loads nothing and runs nothing."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from pydantic import ValidationError

from stillroom.errors import DataError, MissingError
from stillroom.evaluate.report import charts, content, words
from stillroom.evaluate.report.content import ReportContent, make_report
from stillroom.evaluate.report.markdown import to_markdown
from stillroom.evaluate.results import Results
from stillroom.runs import writing

QUESTION_LENGTH = 400
"""The most characters of a question that the page shows; a longer one loses its beginning."""
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
    """Makes the whole page. All that comes from files is text there, whatever it holds.

    Raises:
        MissingError: the plotting library is not installed.
    """
    charts.check()

    def visible(value: Any) -> Any:  # texts are shown without signs that a browser would obey or hide
        return words.visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value

    def tail(text: str) -> str:  # a question stands at the end of a long text
        return text if len(text) <= QUESTION_LENGTH else f"… {text[-QUESTION_LENGTH:]}"

    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        finalize=visible,
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
        tokens=lambda passage: [
            (text.replace("\n", "↵\n") or "∅", nats) for text, nats in zip(passage.tokens, passage.kl_nats, strict=True)
        ],
        tail=tail,
        shown=lambda groups: {name for group in groups for name in group.numbers},
        trained={curve.model for panel in report.training.panels for curve in panel.curves},
        broken={name for one in report.results.breakdowns for name in one.forward_kl_nats},
    )


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
    """The colors of the models, on a light page (which paper is) and on a dark one."""

    def rules(shade: int) -> str:
        return " ".join(
            f"--fill-{i}: {look.paint.fill[shade]}; --line-{i}: {look.paint.line[shade]};"
            for i, look in enumerate(report.looks)
        )

    dark = f"@media screen and (prefers-color-scheme: dark) {{ :root {{ {rules(1)} }} }}"
    return f":root {{ {rules(0)} }}\n{dark}"


# --- the files -------------------------------------------------------------------------------------------------------


def write_report(results: Results, out: Path, runs: Mapping[str, Path]) -> list[Path]:
    """Writes ``out/report.md`` and ``out/report.html``; returns their paths.

    Args:
        results: the results; the items that they name lie in ``out``.
        runs: the folder by model of the run that made it. A folder that is not there is named in the report.

    Raises:
        MissingError: the plotting library is not installed; report.md is written all the same.
    """
    report = make_report(results, out, runs)
    written = [out / "report.md"]
    _write(written[0], to_markdown(report))
    try:
        page = to_page(report)
    except MissingError as error:
        raise MissingError(
            error.what, error.values, why=f"{written[0]} is written; the page has charts.", fix=f"{error.fix} Then run "
            f"`stillroom report {out}`.",
        ) from None  # fmt: skip
    written.append(out / "report.html")
    _write(written[1], page)
    return written


def rebuild(folder: Path) -> list[Path]:
    """Writes the reports of an evaluation anew from its files.

    Raises:
        MissingError: the folder holds no results.json, or the plotting library is not installed.
        DataError: results.json was not written by an evaluation.
    """
    results = read_results(folder)
    return write_report(results, folder, {name: Path(run) for name, run in results.runs.items()})


def read_results(folder: Path) -> Results:
    """The results in the folder of an evaluation.

    Raises:
        MissingError: they are not there.
        DataError: they were not written by an evaluation.
    """
    path = folder / "results.json"
    if not path.is_file():
        raise MissingError(
            f"{folder} holds no evaluation",
            {"expected": path, "found": "nothing of that name"},
            why="A report is made of the results of `stillroom evaluate`.",
            fix="Name the folder that was its `out`.",
        )
    try:
        return Results.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        raise DataError(
            f"{path} is not the results of an evaluation",
            {"at": ".".join(map(str, first["loc"])) or "the top", "problem": first["msg"]},
            why="A report must not show what nobody measured.",
            fix="Restore the file, or evaluate again.",
        ) from None


def _write(path: Path, text: str) -> None:
    """Writes a file under a temporary name and renames it."""
    temporary = path.with_name(f".{path.name}.tmp")
    with writing(path):
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)

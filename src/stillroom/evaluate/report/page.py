"""The files of a report: report.md, and the page report.html that loads nothing and runs nothing."""

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from pydantic import ValidationError

from stillroom.errors import DataError, MissingError
from stillroom.evaluate.report import charts
from stillroom.evaluate.report.content import FAR, LEVEL_NAMES, LEVELS, make_report
from stillroom.evaluate.report.tables import shortened, visible
from stillroom.evaluate.results import Passage, Results, write_text

QUESTION_LENGTH = 400
"""The most characters of a question that the page shows; a longer one loses its beginning."""
MARKED = LEVELS[2]
"""The nats from which on a token is marked in a passage of report.md."""
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


def _rendered(template: str, plain: Callable[[str], str], **values: Any) -> str:
    """The text of a template, in which all texts that are not ``Markup`` go through ``plain``."""
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: plain(value) if isinstance(value, str) and not isinstance(value, Markup) else value,
        loader=FileSystemLoader(HERE),
        keep_trailing_newline=True,
    )
    return environment.get_template(template).render(far=f"{FAR:g}", **values)


# --- the page --------------------------------------------------------------------------------------------------------


def to_page(report: SimpleNamespace) -> str:
    """Makes the whole page. All that comes from files is text there, whatever it holds, without signs that a browser
    would obey or hide.

    Raises:
        MissingError: the plotting library is not installed.
    """
    charts.check()
    results, looks, drawn = report.results, report.looks, {}
    if report.task_groups:
        drawn["tasks"] = charts.bars(report.task_groups, looks, "tasks", "Scores of each benchmark", report.task_axis)
    if report.agreement_groups:
        drawn["agreement"] = charts.bars(report.agreement_groups, looks, "agreement", "Agreement")
    if report.training.panels:
        teacher = next((looks[i] for i, facts in enumerate(results.models) if facts.role == "teacher"), None)
        drawn["training"] = charts.curves(report.training.panels, looks, "training", "Training curves", teacher)
    if results.breakdowns:
        drawn["dots"] = charts.dots(results.breakdowns, looks, "dots", "KL to the teacher by kind of token and place")
    rules = [  # the colors of the models, on a light page (which paper is) and on a dark one
        " ".join(f"--fill-{i}: {one.paint.fill[k]}; --line-{i}: {one.paint.line[k]};" for i, one in enumerate(looks))
        for k in range(2)
    ]

    def tail(text: str) -> str:  # a question stands at the end of a long text
        return text if len(text) <= QUESTION_LENGTH else f"… {text[-QUESTION_LENGTH:]}"

    return _rendered(
        "page.html.jinja",
        visible,
        report=report,
        charts={name: Markup(svg) for name, svg in drawn.items()},
        style=Markup((HERE / "style.css").read_text(encoding="utf-8")),
        paints=Markup(
            f":root {{ {rules[0]} }}\n@media screen and (prefers-color-scheme: dark) {{ :root {{ {rules[1]} }} }}"
        ),
        marks={name: Markup(mark) for name, mark in MARKS.items()},
        levels=LEVEL_NAMES,
        level=lambda nats: sum(nats >= start for start in LEVELS),
        tokens=lambda passage: [
            (text.replace("\n", "↵\n") or "∅", nats) for text, nats in zip(passage.tokens, passage.kl_nats, strict=True)
        ],
        tail=tail,
        shown=lambda groups: {name for group in groups for name in group.numbers},
        trained={curve.model for panel in report.training.panels for curve in panel.curves},
        broken={name for one in results.breakdowns for name in one.forward_kl_nats},
    )


# --- Markdown --------------------------------------------------------------------------------------------------------


def to_markdown(report: SimpleNamespace) -> str:
    """The report as a text that any viewer of Markdown shows, with the numbers of its charts as tables."""
    shown = {"shortened": shortened, "passage": _passage, "code": code}
    return _rendered("report.md.jinja", escaped, report=report, marked=f"{MARKED:g}", **shown)


def escaped(text: str) -> Markup:
    """The text as Markdown shows it unchanged, on one line."""
    text = visible(" ".join(text.split()))
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return Markup(re.sub(r"([\\`*_{}\[\]|~$#])", r"\\\1", text))


def code(text: str) -> Markup:
    """The text as a block of code, fenced by more backticks than it holds."""
    fence = "`" * max(3, 1 + max(map(len, re.findall(r"`+", text)), default=0))
    return Markup(f"{fence}\n{visible(text)}\n{fence}")


def _passage(passage: Passage) -> Markup:
    """The tokens, those that are far from the teacher bold; line ends are shown, and white space stands outside."""
    parts = []
    for token, nats in zip(passage.tokens, passage.kl_nats, strict=True):
        text = token.replace("\r\n", "\n").replace("\n", "↵") or "∅"
        before = " " if text[:1].isspace() else ""
        after = " " if text.strip() and text[-1:].isspace() else ""
        text = escaped(text.strip())
        marked = f"<b>{text or '␣'}</b>⟨{nats:.1f}⟩" if nats >= MARKED else text
        parts.append(f"{before}{marked}{after}")
    return Markup("".join(parts).strip())


# --- the files -------------------------------------------------------------------------------------------------------


def write_report(results: Results, out: Path) -> list[Path]:
    """Writes ``out/report.md`` and ``out/report.html``, where the items lie too; returns their paths. The folder of a
    run that is not there is named in the report.

    Raises:
        MissingError: the plotting library is not installed; report.md is written all the same.
    """
    report, written = make_report(results, out), [out / "report.md", out / "report.html"]
    write_text(written[0], [to_markdown(report)])
    try:
        page = to_page(report)
    except MissingError as error:
        why, fix = f"{written[0]} is written; the page has charts.", f"{error.fix} Then run `stillroom report {out}`."
        raise MissingError(error.what, error.values, why=why, fix=fix) from None
    write_text(written[1], [page])
    return written


def rebuild(folder: Path) -> list[Path]:
    """Writes the reports of an evaluation anew from its files. Raises what ``read_results`` and ``write_report`` do."""
    return write_report(read_results(folder), folder)


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

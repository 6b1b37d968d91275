"""Markdown: the report as a text that any viewer of Markdown shows, with the numbers of its charts as tables."""

import re
from collections.abc import Iterator, Sequence

from stillroom.evaluate.report import words
from stillroom.evaluate.report.content import FAR, LEVELS, Changes, ReportContent
from stillroom.evaluate.report.tables import Cell, Table
from stillroom.evaluate.results import Passage

MARKED = LEVELS[2]
"""The nats from which on a token is marked in a passage."""


def to_markdown(report: ReportContent) -> str:
    """The whole report."""
    parts = [f"# {report.title}", escaped(report.about)]
    for one in report.headlines:
        values = ", ".join(f"{escaped(name)} {_cell(found)}" for _, name, found in one.rows)
        parts.append(f"- **{escaped(one.title)}** ({escaped(one.about)}): {values}")
    parts += [f"- {escaped(sentence)}" for sentence in report.sentences]
    of_metrics = report.metric_differences
    distance = [_table(report.metrics) if report.metrics.rows else "No text was read."]
    no_curves = [f"{escaped(name)} has no curves: {escaped(why)}." for name, why in report.training.missing.items()]
    more = (report.fingerprints, *(table for table in (report.versions, report.machine) if table.rows))
    for title, found in (
        ("Benchmarks", _benchmarks(report)),
        ("Distance to the teacher", distance if of_metrics is None else [*distance, _table(of_metrics)]),
        ("Training", [*map(_table, report.training_tables), *no_curves]),
        ("Where the student differs from the teacher", map(_table, report.breakdown_tables)),
        ("Worst passages", _worst(report)),
        ("Items that changed", _changes(report.changes)),
        ("Size, speed, memory", [_table(report.sizes)]),
        ("To repeat it", [code(report.results.command), *map(_table, more)]),
    ):
        if texts := list(found):
            parts += [f"## {title}", *texts]
    text = ""
    for before, part in zip(["", *parts], parts, strict=False):
        text += part if not before else ("\n" if before.startswith("- ") and part.startswith("- ") else "\n\n") + part
    return text + "\n"


def escaped(text: str) -> str:
    """The text as Markdown shows it unchanged, on one line."""
    text = words.visible(" ".join(text.split()))
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_{}\[\]|~$#])", r"\\\1", text)


def code(text: str) -> str:
    """The text as a block of code, fenced by more backticks than it holds."""
    fence = "`" * max(3, 1 + max(map(len, re.findall(r"`+", text)), default=0))
    return f"{fence}\n{words.visible(text)}\n{fence}"


def _cell(cell: Cell) -> str:
    text = " ".join([escaped(cell.text), *map(escaped, cell.small)])
    return f"{text} ({cell.mark})" if cell.mark else text


def _table(table: Table) -> str:
    """A table of pipes, with its caption above and its notes below."""
    rows = [[_cell(cell) for cell in row] for row in table.rows]
    rule = ["---" if i < table.num_texts else "---:" for i in range(len(table.head))]
    lines = ["| " + " | ".join(row) + " |" for row in ([escaped(name) for name in table.head], rule, *rows)]
    notes = [f"({i}) {escaped(note)}" for i, note in enumerate(table.notes, 1)]
    return "\n\n".join([*([f"**{escaped(table.caption)}**"] if table.caption else []), "\n".join(lines), *notes])


def _benchmarks(report: ReportContent) -> Iterator[str]:
    if not report.results.tasks:
        yield "No benchmark was asked for."
        return
    yield from (f"- {escaped(failed)}" for failed in report.failed)
    if report.tasks.rows:
        yield _table(report.tasks)
    yield from map(_table, report.more_scores)
    if report.task_differences is not None:
        yield _table(report.task_differences)


def _worst(report: ReportContent) -> Iterator[str]:
    if report.worst:
        yield f"Tokens of which the KL is {MARKED:g} nats and more are <b>bold</b>, with the nats behind them."
    for name, passages in report.worst:
        yield f"### {escaped(name)}"
        yield from map(_passage, passages)
        if not passages:
            yield f"None: no passage is {FAR:g} nats a token or more from the teacher."


def _passage(passage: Passage) -> str:
    place = f"{escaped(passage.document)}, from token {passage.first:,}, mean {passage.mean_kl_nats:.2f} nats"
    parts = []
    for token, nats in zip(passage.tokens, passage.kl_nats, strict=True):
        text = token.replace("\r\n", "\n").replace("\n", "↵") or "∅"  # line ends are shown
        before = " " if text[:1].isspace() else ""  # white space stands outside of what is bold
        after = " " if text.strip() and text[-1:].isspace() else ""
        text = escaped(text.strip())
        marked = f"<b>{text or '␣'}</b>⟨{nats:.1f}⟩" if nats >= MARKED else text
        parts.append(f"{before}{marked}{after}")
    return f"{place}:\n\n> … {''.join(parts).strip()} …"


def _changes(changes: Sequence[Changes]) -> Iterator[str]:
    for one in changes:
        yield f"### {escaped(one.task)}: {escaped(one.a)} → {escaped(one.b)}"
        if one.missing is not None:
            yield f"Not shown: {escaped(one.missing)}."
            continue
        yield (
            f"Of {one.num_items:,} items {escaped(one.b)} has {one.gained:,} right that {escaped(one.a)} has wrong, "
            f"and {one.lost:,} wrong that {escaped(one.a)} has right. {len(one.shown)} of them; all are in "
            f"{escaped(one.file)}."
        )
        for change in one.shown:
            question = escaped(words.shortened(change.item.question, 240))
            said = f"{escaped(one.a)}: {escaped(change.a.prediction)}; {escaped(one.b)}: {escaped(change.b.prediction)}"
            yield (
                f"- {change.kind}, {escaped(change.item.id)}{': ' if question else ''}{question} "
                f"Right: {escaped(change.item.gold)}; {said}"
            )

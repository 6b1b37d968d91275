"""Tables: the numbers of an evaluation as rows of text, the same for the page and for Markdown."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from stillroom.evaluate.report import words
from stillroom.evaluate.report.charts import BY, Panel
from stillroom.evaluate.results import Breakdown, Difference, Number, Results, TaskResult

NONE = "–"
PER_TOKEN = ("cross_entropy_nats", "perplexity", "entropy_nats", "calibration_error")
"""Metrics that models with different tokenizers count in different tokens."""
OWN_TOKENS = "counted in its own tokens; compare bits per byte"


class Cell(NamedTuple):
    """A number, or a text, and small texts beside it."""

    text: str
    small: tuple[str, ...] = ()
    mark: str = ""
    """The number of a note."""


class Table(NamedTuple):
    """Rows under headings. The first ``num_texts`` columns are texts, all others numbers."""

    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    notes: tuple[str, ...] = ()
    num_texts: int = 1
    minor: tuple[int, ...] = ()
    """Columns that a narrow page leaves out."""


def cell(number: Number | None, unit: str = "") -> Cell:
    if number is None:
        return Cell(NONE)
    interval = words.interval(number, unit)
    small = (words.error(number, unit), f"[{interval}]" if interval else "")
    return Cell(words.value(number, unit), tuple(filter(None, small)))


def headline_cell(number: Number, unit: str) -> Cell:
    """The value, its error small beside it, and the unit behind both."""
    error = words.error(number, unit)
    text, share = words.value(number, unit), f" {words.SHARE}" if unit == words.SHARE else ""
    return Cell(text.removesuffix(share), (f"{error}{share}",)) if error else Cell(text)


class _Notes:
    """Notes in the order in which they are first needed, each once."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def mark(self, text: str) -> str:
        if text not in self.texts:
            self.texts.append(text)
        return str(self.texts.index(text) + 1)


def metric_table(results: Results) -> Table:
    """A row for each metric that was measured or refused, a column for each model."""
    names, notes, rows = _names(results), _Notes(), []
    base = next((facts.tokenizer for facts in sorted(results.models, key=lambda one: one.role != "teacher")), None)
    foreign = {facts.name for facts in results.models if base and facts.tokenizer and facts.tokenizer != base}
    known = [*words.METRICS, *{key for numbers in results.metrics.values() for key in numbers} - {*words.METRICS}]
    for key in known:
        numbers = {name: results.metrics.get(name, {}).get(key) for name in names}
        refused = {name: results.refused.get(name, {}).get(key) for name in names}
        if not any(numbers.values()) and not any(refused.values()):
            continue
        metric, cells = words.metric(key), []
        for name in names:
            found, note = cell(numbers[name], metric.unit), None
            if numbers[name] is None:
                note = f"{name}: {refused[name]}" if refused[name] else None
            elif key in PER_TOKEN and name in foreign:
                note = OWN_TOKENS
            cells.append(found if note is None else found._replace(mark=notes.mark(note)))
        rows.append((Cell(metric.title), Cell(metric.unit), Cell(metric.better), *cells))
    caption = "Each number with its standard error and [95 % interval], by a bootstrap over documents"
    return Table(caption, ("metric", "unit", "better", *names), tuple(rows), tuple(notes.texts), 3)


def task_table(results: Results) -> Table:
    """A row for each task that has any score: its raw scores, and below them the normalised ones."""
    names, notes, rows = _names(results), _Notes(), []
    for task in results.tasks:
        if not task.scores:
            continue
        unit = unit_of(task)
        about = (Cell(str(task.shots)), Cell(words.count(task.num_items)))
        raw = [cell(task.scores.get(name, {}).get(task.metric), unit) for name in names]
        if task.failed is not None:
            mark = notes.mark(failure(task))
            raw = [one if one.text != NONE else one._replace(mark=mark) for one in raw]
        better = "" if task.higher_is_better else ", lower is better"
        rows.append((Cell(task.name), Cell(task.version), Cell(f"{task.metric}{better}"), *about, *raw))
        if task.normalised:
            normalised = [cell(task.normalised.get(name), words.SHARE) for name in names]
            rows.append((Cell(""), Cell(""), Cell("normalised"), Cell(""), Cell(""), *normalised))
    caption = "Raw scores, and below them those that are 0 at chance and 100 at perfect"
    head = ("task", "version", "score", "shots", "items", *names)
    return Table(caption, head, tuple(rows), tuple(notes.texts), 3, minor=(1, 3, 4))


def failure(task: TaskResult) -> str:
    """The sentence that a task failed, and why."""
    return f"{task.name} failed: {task.failed}"


def unit_of(task: TaskResult) -> str:
    """The unit % where the main metric of a task is a share of 1, as far as its numbers tell."""
    numbers = [scores[task.metric] for scores in task.scores.values() if task.metric in scores]
    if "perplexity" in task.metric or "bits" in task.metric:
        return ""
    return words.SHARE if all(0 <= number.value <= 1 for number in numbers) else ""


def more_scores(task: TaskResult, names: Sequence[str]) -> Table | None:
    """The scores of a task besides the main one: other metrics, and its groups."""
    keys = list(dict.fromkeys(key for scores in task.scores.values() for key in scores if key != task.metric))
    if not keys:
        return None
    rows = []
    for key in keys:
        unit = unit_of(task) if key.split()[0] == task.metric or key.startswith(("acc", "exact")) else ""
        rows.append((Cell(key), *(cell(task.scores.get(name, {}).get(key), unit) for name in names)))
    notes = () if task.failed is None else (failure(task),)
    return Table(f"{task.name}: all scores", ("score", *names), tuple(rows), notes)


def difference_table(differences: Sequence[Difference]) -> Table | None:
    """Every difference with its p-value, where there is one; None where there is no difference."""
    if not differences:
        return None
    rows = []
    for one in differences:
        p = NONE if one.p_value is None else "below 0.0001" if one.p_value < 1e-4 else f"{one.p_value:.4f}"
        rows.append((Cell(words.what(one.what)), Cell(one.sentence), Cell(p)))
    return Table("On the same items, by paired bootstrap", ("of", "in words", "McNemar's p"), tuple(rows), (), 2)


def size_table(results: Results) -> Table:
    """Parameters, bytes, speed and memory of each model, and their ratio to the teacher's."""
    teacher = next((facts for facts in results.models if facts.role == "teacher"), None)

    def beside(value: float | None, base: float | None) -> tuple[str, ...]:
        return (f"{value / base:.2f} ×",) if value is not None and base else ()

    rows = []
    for facts in results.models:
        memory = facts.peak_memory_bytes
        speed = NONE if facts.tokens_per_s is None else f"{facts.tokens_per_s:,.0f}"
        base = teacher if facts is not teacher else None
        rows.append(
            (
                Cell(facts.name),
                Cell(words.count(facts.num_parameters), beside(facts.num_parameters, base and base.num_parameters)),
                Cell(words.size(facts.size_bytes), beside(facts.size_bytes, base and base.size_bytes)),
                Cell(speed, beside(facts.tokens_per_s, base and base.tokens_per_s)),
                Cell(words.size(memory), beside(memory, base and base.peak_memory_bytes)),
            )
        )  # fmt: skip
    head = ("model", "parameters", "weights on disk", "tokens/s, scoring", "peak memory")
    return Table("Small: how many times the teacher's", head, tuple(rows))


def breakdown_tables(breakdowns: Sequence[Breakdown]) -> Iterator[Table]:
    for one in breakdowns:
        names = tuple(one.forward_kl_nats)
        rows = []
        for i, label in enumerate(one.labels):
            numbers = [one.forward_kl_nats[name][i] for name in names]
            values = [Cell(NONE if x is None else f"{x:.3f}") for x in numbers]
            rows.append((Cell(label), Cell(words.count(one.num_tokens[i])), *values))
        yield Table(f"KL to the teacher in nats a token, {BY[one.by]}", ("bin", "tokens", *names), tuple(rows))


def training_tables(panels: Sequence[Panel]) -> Iterator[Table]:
    """The first, the last and some steps between of each panel's curves."""
    for panel in panels:
        names = tuple(curve.model for curve in panel.curves)
        steps = sorted({step for curve in panel.curves for step in curve.steps})
        chosen = [steps[round(i * (len(steps) - 1) / 7)] for i in range(8)] if len(steps) > 8 else steps
        at = [dict(zip(curve.steps, curve.values, strict=True)) for curve in panel.curves]
        rows = [
            (Cell(f"{step:,}"), *(Cell(f"{one[step]:.4f}" if step in one else NONE) for one in at)) for step in chosen
        ]
        level = () if panel.level is None else (f"the teacher's is {panel.level:.4f}",)
        yield Table(f"{panel.title}, nats a token", ("step", *names), tuple(rows), level)


def fingerprint_table(results: Results) -> Table:
    rows = [
        (Cell(f.name), Cell(f.role), Cell(f.model), Cell(f.fingerprint), Cell(f.tokenizer or NONE))
        for f in results.models
    ]
    if (text := results.text) is not None:
        rows.append((Cell("held-out text"), Cell(NONE), Cell(text.name), Cell(text.fingerprint), Cell(NONE)))
    rows += [
        (Cell(f"task {task.name}"), Cell(NONE), Cell(task.source), Cell(task.fingerprint), Cell(NONE))
        for task in results.tasks
        if task.fingerprint is not None
    ]
    return Table("", ("", "role", "from", "fingerprint", "tokenizer's fingerprint"), tuple(rows), (), 5)


def pair_table(caption: str, values: dict[str, str] | dict[str, str | int]) -> Table:
    rows = tuple((Cell(key.replace("_", " ")), Cell(str(item))) for key, item in values.items())
    return Table(caption, ("", ""), rows, (), 2)


def _names(results: Results) -> tuple[str, ...]:
    return tuple(facts.name for facts in results.models)

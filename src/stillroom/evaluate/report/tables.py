"""Tables: the numbers of an evaluation as texts and rows of texts, the same for the page and for Markdown."""

import math
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

from stillroom.evaluate.results import Breakdown, Difference, Number, Results, TaskResult
from stillroom.statistics import Z_95

NONE = "–"
SHARE = "%"
PER_TOKEN = ("cross_entropy_nats", "perplexity", "entropy_nats", "calibration_error")
"""Metrics that models with different tokenizers count in different tokens."""
OWN_TOKENS = "counted in its own tokens; compare bits per byte"


# --- what is shown ---------------------------------------------------------------------------------------------------


class Metric(NamedTuple):
    """The facts that a reader has to know of a metric."""

    title: str
    unit: str = ""
    """The unit; none is a plain number, % is a share of 1, shown times a hundred."""
    better: Literal["lower", "higher", "nearer 1", "as the teacher"] = "lower"


METRICS = {
    "cross_entropy_nats": Metric("cross-entropy", "nats a token"),
    "perplexity": Metric("perplexity"),
    "bits_per_byte": Metric("bits per byte", "bits"),
    "forward_kl_nats": Metric("KL to the teacher", "nats a token"),
    "forward_kl_p95_nats": Metric("KL to the teacher, 95th percentile", "nats"),
    "reverse_kl_nats": Metric("reverse KL", "nats a token"),
    "reverse_kl_p95_nats": Metric("reverse KL, 95th percentile", "nats"),
    "top1_agreement": Metric("same top token as the teacher", "%", "higher"),
    "top10_overlap": Metric("overlap of the top 10 tokens", "%", "higher"),
    "accepted_mass": Metric("accepted mass Σ min(t, s)", "%", "higher"),
    "speculative_tokens": Metric("speculative decoding, γ = 4", "tokens a step", "higher"),
    "entropy_nats": Metric("entropy", "nats a token", "as the teacher"),
    "entropy_ratio": Metric("entropy ÷ the teacher's", "", "nearer 1"),
    "calibration_error": Metric("calibration error (ECE, 15 bins)", "%"),
    "recovered_gap": Metric("recovered gap", "%", "higher"),
}
BY = {
    "token_frequency": "by how often the token comes",
    "position": "by the tokens read before it",
    "teacher_entropy": "by the teacher's entropy, nats",
}
"""The titles of breakdowns."""


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


# --- numbers and names as texts --------------------------------------------------------------------------------------


def metric(name: str) -> Metric:
    """A metric by its name in the results; one that is not known here is called by that name."""
    return METRICS.get(name, Metric(name.replace("_", " ")))


def what(name: str) -> str:
    """The title of a metric; a task and its metric as they are called."""
    return METRICS[name].title if name in METRICS else name


def value_text(number: Number, unit: str = "") -> str:
    """The value with its unit of measure where that is %, and as many digits as its error bears."""
    return f"{_plain(number.value, number, unit)}{' %' if unit == SHARE else ''}"


def error_text(number: Number, unit: str = "") -> str:
    """± the standard error; empty where it is not known."""
    return "" if number.error is None else f"± {_plain(number.error, number, unit)}"


def interval_text(number: Number, unit: str = "") -> str:
    """The 95 % interval; empty where it is not known."""
    if number.low is None or number.high is None:
        return ""
    return f"{_plain(number.low, number, unit)} to {_plain(number.high, number, unit)}"


def _plain(x: float, number: Number, unit: str) -> str:
    """A value with two digits of the number's error: at least one decimal, at most four, or two of a percentage."""
    if not math.isfinite(x):
        return "not a number" if math.isnan(x) else "∞" if x > 0 else "−∞"
    most, scale = (2, 100) if unit == SHARE else (4, 1)
    if number.error is not None and 0 < number.error < math.inf:
        digits = max(1, min(most, 1 - _magnitude(number.error * scale)))
    else:
        digits = 1 if unit == SHARE else max(1, min(4, 3 - _magnitude(number.value)))
    text = f"{x * scale:,.{digits}f}"
    return text.replace("-", "−") if float(text.replace(",", "")) else text.lstrip("-")


def _magnitude(x: float) -> int:
    return math.floor(math.log10(abs(x))) if x and math.isfinite(x) else 0


def ends_of(number: Number) -> tuple[float, float]:
    """The ends of the 95 % interval, or those by the standard error, or the value alone."""
    if number.low is not None and number.high is not None:
        return min(number.low, number.value), max(number.high, number.value)
    half = Z_95 * (number.error or 0.0)
    return number.value - half, number.value + half


def count(number: int | None) -> str:
    return NONE if number is None else f"{number:,}"


def size(size_bytes: int | None) -> str:
    """Bytes in the unit that suits them."""
    if size_bytes is None:
        return NONE
    amount, units = float(size_bytes), ["bytes", "KiB", "MiB", "GiB", "TiB"]
    while amount >= 1024 and len(units) > 1:
        amount, units = amount / 1024, units[1:]
    return f"{amount:,.0f} {units[0]}" if units[0] == "bytes" else f"{amount:,.1f} {units[0]}"


HARMLESS = "\n\t\u200c\u200d"
"""Newline and tab, and the joiners that scripts and emoji are spelled with."""


def visible(text: str) -> str:
    """The text with each sign that a screen would obey or hide, such as an escape or a change of direction, as a code;
    newlines and tabs stay."""

    def harmless(sign: str) -> bool:
        return sign.isprintable() or sign in HARMLESS or unicodedata.category(sign) == "Zs"

    return "".join(sign if harmless(sign) else f"⟨U+{ord(sign):04X}⟩" for sign in text)


def shortened(text: str, length: int) -> str:
    """The text on one line and ``visible``, with its middle left out where it is longer than ``length``."""
    text = visible(" ".join(text.split()))
    if len(text) <= length:
        return text
    tail = (length - 1) // 2
    return f"{text[: length - 1 - tail]}…{text[len(text) - tail :]}"


# --- tables ----------------------------------------------------------------------------------------------------------


def _row(*cells: Cell | str) -> tuple[Cell, ...]:
    return tuple(Cell(one) if isinstance(one, str) else one for one in cells)


def cell(number: Number | None, unit: str = "") -> Cell:
    if number is None:
        return Cell(NONE)
    interval = interval_text(number, unit)
    small = (error_text(number, unit), f"[{interval}]" if interval else "")
    return Cell(value_text(number, unit), tuple(filter(None, small)))


def headline_cell(number: Number, unit: str) -> Cell:
    """The value, its error small beside it, and the unit behind both."""
    error = error_text(number, unit)
    text, share = value_text(number, unit), f" {SHARE}" if unit == SHARE else ""
    return Cell(text.removesuffix(share), (f"{error}{share}",)) if error else Cell(text)


def metric_table(results: Results) -> Table:
    """A row for each metric that was measured or refused, a column for each model."""
    names, rows = _names(results), []
    notes: dict[str, int] = {}  # in the order in which they are first needed
    base = next((facts.tokenizer for facts in sorted(results.models, key=lambda one: one.role != "teacher")), None)
    foreign = {facts.name for facts in results.models if base and facts.tokenizer and facts.tokenizer != base}
    for key in dict.fromkeys([*METRICS, *(key for numbers in results.metrics.values() for key in numbers)]):
        numbers = {name: results.metrics.get(name, {}).get(key) for name in names}
        refused = {name: results.refused.get(name, {}).get(key) for name in names}
        if not any(numbers.values()) and not any(refused.values()):
            continue
        about, cells = metric(key), []
        for name in names:
            found, note = cell(numbers[name], about.unit), None
            if numbers[name] is None:
                note = f"{name}: {refused[name]}" if refused[name] else None
            elif key in PER_TOKEN and name in foreign:
                note = OWN_TOKENS
            mark = "" if note is None else str(notes.setdefault(note, len(notes) + 1))
            cells.append(found._replace(mark=mark))
        rows.append(_row(about.title, about.unit, about.better, *cells))
    caption = "Each number with its standard error and [95 % interval], by a bootstrap over documents"
    return Table(caption, ("metric", "unit", "better", *names), tuple(rows), tuple(notes), 3)


def task_table(results: Results) -> Table:
    """A row for each task that has any score: its raw scores, and below them the normalised ones."""
    names, rows = _names(results), []
    notes: dict[str, int] = {}
    for task in results.tasks:
        if not task.scores:
            continue
        unit = unit_of(task)
        raw = [cell(task.scores.get(name, {}).get(task.metric), unit) for name in names]
        if task.failed is not None:
            mark = str(notes.setdefault(failure(task), len(notes) + 1))
            raw = [one if one.text != NONE else one._replace(mark=mark) for one in raw]
        better = "" if task.higher_is_better else ", lower is better"
        rows.append(
            _row(task.name, task.version, f"{task.metric}{better}", str(task.shots), count(task.num_items), *raw)
        )
        if task.normalised:
            rows.append(_row("", "", "normalised", "", "", *(cell(task.normalised.get(one), SHARE) for one in names)))
    caption = "Raw scores, and below them those that are 0 at chance and 100 at perfect"
    head = ("task", "version", "score", "shots", "items", *names)
    return Table(caption, head, tuple(rows), tuple(notes), 3, minor=(1, 3, 4))


def failure(task: TaskResult) -> str:
    """The sentence that a task failed, and why."""
    return f"{task.name} failed: {task.failed}"


def unit_of(task: TaskResult) -> str:
    """The unit % where the main metric of a task is a share of 1, as far as its numbers tell."""
    numbers = [scores[task.metric] for scores in task.scores.values() if task.metric in scores]
    if "perplexity" in task.metric or "bits" in task.metric:
        return ""
    return SHARE if all(0 <= number.value <= 1 for number in numbers) else ""


def more_scores(task: TaskResult, names: Sequence[str]) -> Table | None:
    """The scores of a task besides the main one: other metrics, and its groups."""
    keys = list(dict.fromkeys(key for scores in task.scores.values() for key in scores if key != task.metric))
    if not keys:
        return None
    rows = []
    for key in keys:
        unit = unit_of(task) if key.split()[0] == task.metric or key.startswith(("acc", "exact")) else ""
        rows.append(_row(key, *(cell(task.scores.get(name, {}).get(key), unit) for name in names)))
    notes = () if task.failed is None else (failure(task),)
    return Table(f"{task.name}: all scores", ("score", *names), tuple(rows), notes)


def difference_table(differences: Sequence[Difference]) -> Table | None:
    """Every difference with its p-value, where there is one; None where there is no difference."""
    if not differences:
        return None
    rows = []
    for one in differences:
        p = NONE if one.p_value is None else "below 0.0001" if one.p_value < 1e-4 else f"{one.p_value:.4f}"
        rows.append(_row(what(one.what), one.sentence, p))
    return Table("On the same items, by paired bootstrap", ("of", "in words", "McNemar's p"), tuple(rows), (), 2)


def size_table(results: Results) -> Table:
    """Parameters, bytes, speed and memory of each model, and their ratio to the teacher's."""
    teacher = next((facts for facts in results.models if facts.role == "teacher"), None)
    shown = {
        "num_parameters": count,
        "size_bytes": size,
        "tokens_per_s": lambda speed: NONE if speed is None else f"{speed:,.0f}",
        "peak_memory_bytes": size,
    }
    rows = []
    for facts in results.models:
        cells = []
        for key, text in shown.items():
            value, base = getattr(facts, key), None if facts is teacher else getattr(teacher, key, None)
            cells.append(Cell(text(value), (f"{value / base:.2f} ×",) if value is not None and base else ()))
        rows.append(_row(facts.name, *cells))
    head = ("model", "parameters", "weights on disk", "tokens/s, scoring", "peak memory")
    return Table("Small: how many times the teacher's", head, tuple(rows))


def breakdown_tables(breakdowns: Sequence[Breakdown]) -> Iterator[Table]:
    for one in breakdowns:
        rows = []
        for label, num_tokens, *means in zip(one.labels, one.num_tokens, *one.forward_kl_nats.values(), strict=True):
            rows.append(_row(label, count(num_tokens), *(NONE if x is None else f"{x:.3f}" for x in means)))
        head = ("bin", "tokens", *one.forward_kl_nats)
        yield Table(f"KL to the teacher in nats a token, {BY[one.by]}", head, tuple(rows))


def training_tables(panels: Sequence[Panel]) -> Iterator[Table]:
    """The first, the last and some steps between of each panel's curves."""
    for panel in panels:
        names = tuple(curve.model for curve in panel.curves)
        steps = sorted({step for curve in panel.curves for step in curve.steps})
        chosen = [steps[round(i * (len(steps) - 1) / 7)] for i in range(8)] if len(steps) > 8 else steps
        at = [dict(zip(curve.steps, curve.values, strict=True)) for curve in panel.curves]
        rows = [_row(f"{step:,}", *(f"{one[step]:.4f}" if step in one else NONE for one in at)) for step in chosen]
        level = () if panel.level is None else (f"the teacher's is {panel.level:.4f}",)
        yield Table(f"{panel.title}, nats a token", ("step", *names), tuple(rows), level)


def fingerprint_table(results: Results) -> Table:
    rows = [_row(f.name, f.role, f.model, f.fingerprint, f.tokenizer or NONE) for f in results.models]
    if (text := results.text) is not None:
        rows.append(_row("held-out text", NONE, text.name, text.fingerprint, NONE))
    asked = [task for task in results.tasks if task.fingerprint is not None]
    rows += [_row(f"task {task.name}", NONE, task.source, str(task.fingerprint), NONE) for task in asked]
    return Table("", ("", "role", "from", "fingerprint", "tokenizer's fingerprint"), tuple(rows), (), 5)


def pair_table(caption: str, values: Mapping[str, str | int]) -> Table:
    rows = tuple(_row(key.replace("_", " "), str(item)) for key, item in values.items())
    return Table(caption, ("", ""), rows, (), 2)


def _names(results: Results) -> tuple[str, ...]:
    return tuple(facts.name for facts in results.models)

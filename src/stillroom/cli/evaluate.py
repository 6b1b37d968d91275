"""``stillroom evaluate``."""

from typing import Any

from stillroom.cli.arguments import Arguments
from stillroom.cli.verb import run_verb
from stillroom.evaluate.config import EvaluateConfig

ROWS = {
    "cross_entropy_nats": "cross-entropy, nats a token",
    "perplexity": "perplexity",
    "bits_per_byte": "bits a byte",
    "forward_kl_nats": "KL to the teacher, nats a token",
    "forward_kl_p95_nats": "its 95th percentile",
    "reverse_kl_nats": "reverse KL, nats a token",
    "top1_agreement": "same top token",
    "top10_overlap": "overlap of the top 10",
    "accepted_mass": "accepted mass",
    "speculative_tokens": "tokens a speculative step",
    "entropy_ratio": "entropy, of the teacher's",
    "calibration_error": "calibration error",
    "recovered_gap": "recovered gap",
}
"""The metrics that are printed."""
SHARES = {"top1_agreement", "top10_overlap", "accepted_mass", "calibration_error", "recovered_gap"}


def main(arguments: Arguments) -> int:
    return run_verb("evaluate", EvaluateConfig, summary, arguments, lambda record: 2 if record["failed_tasks"] else 0)


def summary(record: dict[str, Any]) -> str:
    """The results in a table: a row for each metric and task, a column for each model; and what differs, in words."""
    names = list(record["config"]["models"])
    rows = []
    for metric, title in ROWS.items():
        values = [record["metrics"].get(name, {}).get(metric) for name in names]
        if any(value is not None for value in values):
            rows.append([title, *(_value(metric, value) for value in values)])
    for task, found in record["tasks"].items():
        form = ".1%" if found["unit"] else ".4f"
        about = f"{found['metric']}, {found['shots']} shots, version {found['version']}"
        rows.append([f"{task}: {about}", *_formatted(names, found["scores"], form)])
        if found["normalised"]:
            rows.append([f"{task}: normalised", *_formatted(names, found["normalised"], ".1%")])
    lines = _table([["", *names], *rows])
    reasons: dict[tuple[str, str], list[str]] = {}
    for name, why in record["refused"].items():
        for metric, reason in why.items():
            reasons.setdefault((name, reason), []).append(metric)
    for (name, reason), metrics in reasons.items():
        shown = ", ".join(ROWS.get(metric, metric) for metric in metrics[:2]) + (" …" if len(metrics) > 2 else "")
        lines += ["", f"{name} has no {shown}: {reason}"]
    if record["sentences"]:
        lines += ["", *record["sentences"]]
    for task, reason in record["failed_tasks"].items():
        lines += ["", f"the task {task} failed: {reason}"]
    lines += ["", f"results   {record['config']['out']}/results.json"]
    return "\n".join([*lines, *(f"report    {path}" for path in record["reports"])])


def _formatted(names: list[str], values: dict[str, float], form: str) -> list[str]:
    return [format(values[name], form) if name in values else "-" for name in names]


def _value(metric: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1%}" if metric in SHARES else f"{value:.4f}"


def _table(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]).rstrip()
        for row in rows
    ]

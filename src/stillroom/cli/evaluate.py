"""``stillroom evaluate``."""

from typing import Any

from stillroom.cli.arguments import Arguments, run_verb
from stillroom.evaluate.config import EvaluateConfig


def main(arguments: Arguments) -> int:
    return run_verb("evaluate", EvaluateConfig, summary, arguments, lambda record: 2 if record["failed_tasks"] else 0)


def summary(record: dict[str, Any]) -> str:
    """The results in a table: a row for each metric and task, a column for each model; and the differences in words."""
    from stillroom.evaluate.report.tables import METRICS, SHARE, metric

    names = list(record["config"]["models"])
    rows = []
    for key, about in METRICS.items():
        values = {name: found[key] for name, found in record["metrics"].items() if key in found}
        if values:
            share = about.unit == SHARE
            title = about.title if share or not about.unit else f"{about.title}, {about.unit}"
            rows.append([title, *_formatted(names, values, ".1%" if share else ".4f")])
    for task, found in record["tasks"].items():
        form = ".1%" if found["unit"] else ".4f"
        about = f"{found['metric']}, {found['shots']} shots, version {found['version']}"
        rows.append([f"{task}: {about}", *_formatted(names, found["scores"], form)])
        if found["normalised"]:
            rows.append([f"{task}: normalised", *_formatted(names, found["normalised"], ".1%")])
    rows.insert(0, ["", *names])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    reasons: dict[tuple[str, str], list[str]] = {}
    for name, why in record["refused"].items():
        for key, reason in why.items():
            reasons.setdefault((name, reason), []).append(key)
    for (name, reason), keys in reasons.items():
        shown = ", ".join(metric(key).title for key in keys[:2]) + (" …" if len(keys) > 2 else "")
        lines += ["", f"{name} has no {shown}: {reason}"]
    if record["sentences"]:
        lines += ["", *record["sentences"]]
    for task, reason in record["failed_tasks"].items():
        lines += ["", f"the task {task} failed: {reason}"]
    lines += ["", f"results   {record['config']['out']}/results.json"]
    return "\n".join([*lines, *(f"report    {path}" for path in record["reports"])])


def _formatted(names: list[str], values: dict[str, float], form: str) -> list[str]:
    return [format(values[name], form) if name in values else "-" for name in names]

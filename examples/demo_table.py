"""The table that the demo ends with, from what its runs left."""

import json
from pathlib import Path

RUNS = {
    "teacher": "demo-teacher",
    "hard labels": "demo-hard-labels",
    "distilled": "demo-distilled",
    "+ hidden": "demo-hidden",
    "cut": "demo-cut",
}
"""The demo's runs by name, with the recipe of each."""


def table(folder: Path) -> str:
    """What the runs measured on the held-out modules."""
    columns = ("", "cross-entropy", "KL to teacher", "same top token", "parameters", "tokens/s")
    units = ("held out", "nats/token", "nats/token", "as teacher", "", "training")
    lines = ["{:12} {:>13} {:>13} {:>14} {:>11} {:>8}".format(*row) for row in (columns, units)]
    for name, recipe in RUNS.items():
        run = json.loads((folder / recipe / "run.json").read_text())
        held_out = run["held_out"]
        kl, agreement = held_out.get("forward_kl_nats"), held_out.get("top1_agreement")
        lines.append(
            f"{name:12} {held_out['cross_entropy_nats']:13.4f} {'-' if kl is None else format(kl, '.4f'):>13} "
            f"{'-' if agreement is None else format(agreement, '.1%'):>14} {run['student']['num_parameters']:11,} "
            f"{run['num_kept'] / run['time_s']:8,.0f}"
        )
    return "\n".join(lines)

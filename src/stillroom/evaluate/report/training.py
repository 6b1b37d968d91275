"""Training: the curves of the runs that made the models, from their metrics.jsonl."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from stillroom.errors import StillroomError
from stillroom.evaluate.report.charts import Curve, Panel
from stillroom.runs import read_metrics

POINTS = 240
"""At the most of one curve."""
HELD_OUT = {"cross_entropy_nats": "held-out cross-entropy", "forward_kl_nats": "held-out KL to the teacher"}


class Training(NamedTuple):
    """What is known of how the models were trained."""

    panels: tuple[Panel, ...]
    missing: dict[str, str]
    """By model: why its curves are not there."""


def read_training(runs: Mapping[str, Path]) -> Training:
    """The training loss and the held-out curves of each run. One that is not there, or is damaged, is told of."""
    rows: dict[str, list[dict[str, Any]]] = {}
    missing: dict[str, str] = {}
    for name, run in runs.items():
        path = run / "metrics.jsonl"
        try:
            rows[name] = read_metrics(path)
        except FileNotFoundError:
            missing[name] = f"{path} is not there"
        except StillroomError as error:
            missing[name] = f"{error.what}, line {error.values.get('line', 'unknown')}"
        except OSError as error:
            missing[name] = f"{path} could not be read: {error.strerror}"
    return Training(tuple(_panels(rows)), missing)


def _panels(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterator[Panel]:
    for key, title in HELD_OUT.items():
        curves, level = [], None
        for name, lines in rows.items():
            points = [(r["step"], r["held_out"]) for r in lines if isinstance(r.get("held_out"), dict)]
            here = [(step, one[key]) for step, one in points if isinstance(one.get(key), int | float)]
            if here:
                curves.append(Curve(name, *map(list, zip(*here, strict=True))))
            for _, one in points:
                level = one.get(f"teacher_{key}", level)
        if curves:
            yield Panel(title, curves, level)
    losses = [curve for name, lines in rows.items() if (curve := _loss(name, lines)) is not None]
    if losses:
        yield Panel("training loss, each run's own objective", losses)


def _loss(name: str, lines: Sequence[Mapping[str, Any]]) -> Curve | None:
    """The loss of each step, thinned out, and its running mean over a fiftieth of the run to either side."""
    found = [(r["step"], r["loss_nats"]) for r in lines if isinstance(r.get("loss_nats"), int | float)]
    if not found:
        return None
    steps, losses = np.array([s for s, _ in found]), np.array([x for _, x in found], dtype=np.float64)
    n, half = len(losses), max(1, len(losses) // 50)
    total = np.concatenate(([0.0], np.cumsum(losses)))
    first, last = np.clip(np.arange(n) - half, 0, n), np.clip(np.arange(n) + half + 1, 0, n)
    smooth = (total[last] - total[first]) / (last - first)
    chosen = np.unique(np.linspace(0, n - 1, min(n, POINTS)).round().astype(int))
    return Curve(name, steps[chosen].tolist(), smooth[chosen].tolist(), losses[chosen].tolist())

"""Metrics: from what a model makes of each predicted token to numbers with their errors.

Tokens of one document are not independent, so intervals are taken over documents: the sums over each document are
drawn again together (a cluster bootstrap), and every metric is a function of such sums. All models' are drawn alike, so
differences between them are paired.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from stillroom.evaluate.results import Difference, Number
from stillroom.evaluate.scoring import Predicted, Scores
from stillroom.statistics import compared, interval, resampled_totals

BINS = 15
"""Of the confidence, equally wide, for the calibration error (arXiv 1706.04599)."""
DRAFTED = 4
"""Tokens that speculative decoding drafts at a time (γ)."""
FEWEST_ROWS = 20
"""A text of fewer rows, such as one long file, is drawn again by its pieces instead."""
QUANTILE = 0.95
QUANTILES = ("forward_kl", "reverse_kl")
"""What the 95th percentile over the tokens is given of."""
COMPARED = {
    "cross_entropy_nats": (False, "nats"),
    "bits_per_byte": (False, "bits"),
    "forward_kl_nats": (False, "nats"),
    "top1_agreement": (True, "points"),
    "accepted_mass": (True, "points"),
}
"""The metrics whose differences are told: whether higher is better, and the unit."""


@dataclass(frozen=True)
class Units:
    """What is drawn again: the rows of the source; or pieces of at most a row's length, where there are few rows."""

    of: np.ndarray
    """int64 [n]: the unit of each predicted token."""
    number: int
    noun: str

    def sums(self, values: np.ndarray) -> np.ndarray:
        """Over the tokens of each unit, float64 [units]."""
        return np.bincount(self.of, weights=values, minlength=self.number)


def units_of(predicted: Predicted) -> Units:
    rows, row_of = np.unique(predicted.documents.rows, return_inverse=True)
    if len(rows) >= FEWEST_ROWS or len(rows) == len(predicted.documents):
        return Units(row_of[predicted.document], len(rows), "documents")
    return Units(predicted.document, len(predicted.documents), "pieces")


@dataclass(frozen=True)
class Measured:
    """A model's metrics."""

    numbers: dict[str, Number]
    draws: dict[str, np.ndarray]
    """By metric, its value of each resample, float64 [resamples]; of metrics that are functions of sums."""
    units: Units


def measure(
    scores: Scores,
    units: Units,
    seed: int,
    *,
    num_bytes: np.ndarray | None,
    teacher: Scores | None = None,
    baseline: Scores | None = None,
) -> Measured:
    """All metrics that can be told.

    Args:
        num_bytes: what each predicted token stands for; None where that is not known.
        teacher: its own scores of the same tokens, where it is another model.
        baseline: its scores of the same tokens; there is a recovered gap where the teacher's are given too.
    """
    columns = _columns(scores, units, num_bytes, teacher, baseline)
    stacked = np.column_stack([*columns.values()])
    edges = np.cumsum([0, *(1 if c.ndim == 1 else c.shape[1] for c in columns.values())])

    def of(totals: np.ndarray) -> dict[str, np.ndarray]:
        parts = zip(columns, edges[:-1], edges[1:], strict=True)
        return _of_totals({name: totals[:, a:b].squeeze(1) if b - a == 1 else totals[:, a:b] for name, a, b in parts})

    values = {name: float(value[0]) for name, value in of(stacked.sum(0, keepdims=True)).items()}
    draws = of(resampled_totals(stacked, seed)) if units.number > 1 else {}
    shares = {q: (values.pop(f"below_{q}"), draws.pop(f"below_{q}", None)) for q in QUANTILES if q in scores}
    numbers = {name: _number(value, draws.get(name)) for name, value in values.items()}
    for name, (share, drawn) in shares.items():
        numbers[f"{name}_p95_nats"] = _quantile(scores[name], share, drawn)
    return Measured(numbers, draws, units)


def _columns(
    scores: Scores, units: Units, num_bytes: np.ndarray | None, teacher: Scores | None, baseline: Scores | None
) -> dict[str, np.ndarray]:
    """What metrics are functions of, by name: the sums over each unit, float64 [units] or [units, bins]."""
    columns = {name: units.sums(values) for name, values in scores.items() if name not in ("confidence", "correct")}
    columns["tokens"] = np.bincount(units.of, minlength=units.number).astype(np.float64)
    columns["too_confident"] = _too_confident(scores, units)
    if num_bytes is not None:
        columns["bytes"] = units.sums(num_bytes)
    for name in QUANTILES:
        if name in scores:
            columns[f"below_{name}"] = units.sums(scores[name] <= np.quantile(scores[name], QUANTILE))
    if teacher is not None:
        columns |= {f"teacher_{name}": units.sums(teacher[name]) for name in ("cross_entropy", "entropy")}
    if teacher is not None and baseline is not None:
        columns["baseline_cross_entropy"] = units.sums(baseline["cross_entropy"])
    return columns


def _too_confident(scores: Scores, units: Units) -> np.ndarray:
    """Σ (confidence − correct) of each unit's tokens in each bin of the confidence, float64 [units, bins]."""
    confidence = scores["confidence"].astype(np.float64)
    bins = np.clip((confidence * BINS).astype(np.int64), 0, BINS - 1)
    sums = np.bincount(units.of * BINS + bins, confidence - scores["correct"], units.number * BINS)
    return sums.reshape(units.number, BINS)


def _of_totals(t: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Every metric from the sums over a text, each of any number of texts at once: [texts], or [texts, bins]."""
    cross_entropy = t["cross_entropy"] / t["tokens"]
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        found = {
            "cross_entropy_nats": cross_entropy,
            "perplexity": np.exp(cross_entropy),
            "entropy_nats": t["entropy"] / t["tokens"],
            "calibration_error": np.abs(t["too_confident"]).sum(-1) / t["tokens"],
        }
        if "bytes" in t:
            found["bits_per_byte"] = t["cross_entropy"] / math.log(2) / t["bytes"]
        if "forward_kl" in t:
            found |= {f"{name}_nats": t[name] / t["tokens"] for name in ("forward_kl", "reverse_kl")}
            found |= {f"below_{name}": t[f"below_{name}"] / t["tokens"] for name in QUANTILES}
            found |= {name: t[name] / t["tokens"] for name in ("top1_agreement", "top10_overlap", "accepted_mass")}
            found["speculative_tokens"] = speculative_tokens(found["accepted_mass"])
        if "teacher_entropy" in t:
            found["entropy_ratio"] = t["entropy"] / t["teacher_entropy"]
        if "baseline_cross_entropy" in t:
            gap = t["baseline_cross_entropy"] - t["teacher_cross_entropy"]
            found["recovered_gap"] = (t["baseline_cross_entropy"] - t["cross_entropy"]) / gap
    return found


def speculative_tokens(accepted: np.ndarray) -> np.ndarray:
    """``(1 − α^(γ+1)) / (1 − α)`` with γ = 4: the tokens that a step of speculative decoding gives in expectation,
    where each drafted token is accepted with the mean probability α, whatever came before (arXiv 2211.17192, eq. 1)."""
    return sum((accepted**i for i in range(1, DRAFTED + 1)), start=np.ones_like(accepted))


def _number(value: float, draws: np.ndarray | None) -> Number:
    if draws is None or not math.isfinite(value):
        return Number(value=value)
    low, high = interval(draws, value)
    return Number(value=value, error=float(draws.std()), low=low, high=high)


def _quantile(values: np.ndarray, share: float, draws: np.ndarray | None) -> Number:
    """The 95th percentile of the tokens' values. Its interval is Woodruff's (doi 10.1080/01621459.1952.10483443): that
    of the share of tokens below it, carried over to values."""
    value = float(np.quantile(values, QUANTILE))
    if draws is None:
        return Number(value=value)
    low, high = interval(draws, share)
    error = float(draws.std())
    shares = np.clip(QUANTILE + np.array([share - high, share - low, -error, error]), 0, 1)
    below, above, *one_error = np.quantile(values, shares).astype(float).tolist()
    return Number(value=value, error=(one_error[1] - one_error[0]) / 2, low=min(below, value), high=max(above, value))


def no_gap(teacher: Measured, baseline: Measured) -> str | None:
    """Why there is no gap between baseline and teacher that a student could recover; None where there is one."""
    name = "cross_entropy_nats"
    value = baseline.numbers[name].value - teacher.numbers[name].value
    low = float(np.percentile(baseline.draws[name] - teacher.draws[name], 2.5)) if baseline.draws else value
    return None if low > 0 else "the baseline's cross-entropy is not above the teacher's beyond chance"


def differences(measured: Mapping[str, Measured], alike: Sequence[str]) -> Iterable[Difference]:
    """Of every two models, in the metrics that both have: the cross-entropy of those that are ``alike``, which read the
    same tokens, and the bits per byte of others. Those that are not drawn by the same documents are left out."""
    names = list(measured)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            x, y = measured[a], measured[b]
            both_alike = a in alike and b in alike
            if x.units.number != y.units.number or not (both_alike or x.units.noun == y.units.noun == "documents"):
                continue
            left_out = "bits_per_byte" if both_alike else "cross_entropy_nats"
            for metric, (higher_is_better, unit) in COMPARED.items():
                if metric == left_out or metric not in x.draws or metric not in y.draws:
                    continue
                value = x.numbers[metric].value - y.numbers[metric].value
                numbers = (value, *interval(x.draws[metric] - y.draws[metric], value))
                found = compared(metric, a, b, numbers, x.units.number, None, higher_is_better, unit, x.units.noun)
                yield Difference.model_validate(found._asdict())

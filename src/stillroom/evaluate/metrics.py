"""Metrics: the scores of every predicted token become numbers with errors, breakdowns and worst passages.

Tokens of one document are not independent, so intervals are taken over documents: the sums over each document are
drawn again together (a cluster bootstrap), and every metric is a function of such sums. All models' are drawn alike, so
differences between them are paired.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from stillroom.evaluate.results import Breakdown, Difference, Number, Passage
from stillroom.evaluate.scoring import Predicted, Scores
from stillroom.statistics import compared, interval, resampled_totals

BINS = 15
"""The number of bins of the confidence, equally wide, for the calibration error (arXiv 1706.04599)."""
DRAFTED = 4
"""Tokens that speculative decoding drafts at a time (γ)."""
FEWEST_ROWS = 20
"""A text of fewer rows, such as one long file, is drawn again by its pieces instead."""
QUANTILE = 0.95
QUANTILES = ("forward_kl", "reverse_kl")
"""The scores whose 95th percentile over the tokens is a metric."""
COMPARED = {
    "cross_entropy_nats": (False, "nats"),
    "bits_per_byte": (False, "bits"),
    "forward_kl_nats": (False, "nats"),
    "top1_agreement": (True, "points"),
    "accepted_mass": (True, "points"),
}
"""The metrics whose differences are given: whether higher is better, and the unit."""


@dataclass(frozen=True)
class Units:
    """The units of the bootstrap: rows of the source, or, where those are few, pieces of a row's length."""

    unit: np.ndarray
    """int64 [n]: the unit of each predicted token."""
    number: int
    noun: str

    def sums(self, values: np.ndarray) -> np.ndarray:
        """The sum over the tokens of each unit, float64 [units]."""
        return np.bincount(self.unit, weights=values, minlength=self.number)


def units_of(predicted: Predicted) -> Units:
    rows, row_of = np.unique(predicted.documents.source_rows, return_inverse=True)
    if len(rows) >= FEWEST_ROWS or len(rows) == len(predicted.documents):
        return Units(row_of[predicted.document], len(rows), "documents")
    return Units(predicted.document, len(predicted.documents), "pieces")


@dataclass(frozen=True)
class Measured:
    """A model's metrics."""

    numbers: dict[str, Number]
    draws: dict[str, np.ndarray]
    """The value of each resample by metric, float64 [resamples], for metrics that are functions of sums."""
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
    """All metrics that the scores give.

    Args:
        num_bytes: the bytes of each predicted token; None where they are not known.
        teacher: its own scores of the same tokens, where it is another model.
        baseline: its scores of the same tokens; there is a recovered gap where the teacher's are given too.
    """
    columns = _columns(scores, units, num_bytes, teacher, baseline)
    stacked = np.column_stack([*columns.values()])
    edges = np.cumsum([0, *(1 if c.ndim == 1 else c.shape[1] for c in columns.values())])
    parts = [*zip(columns, edges[:-1], edges[1:], strict=True)]

    def of(totals: np.ndarray) -> dict[str, np.ndarray]:
        return _of_totals({name: totals[:, a:b].squeeze(1) if b - a == 1 else totals[:, a:b] for name, a, b in parts})

    values = {name: float(value[0]) for name, value in of(stacked.sum(0, keepdims=True)).items()}
    draws = of(resampled_totals(stacked, seed)) if units.number > 1 else {}
    shares = {q: (values.pop(f"below_{q}"), draws.pop(f"below_{q}", None)) for q in QUANTILES if q in scores}
    numbers = {}
    for name, value in values.items():
        numbers[name] = Number(value=value)
        if name in draws and math.isfinite(value):
            low, high = interval(draws[name], value)
            numbers[name] = Number(value=value, error=float(draws[name].std()), low=low, high=high)
    for name, (share, drawn) in shares.items():
        numbers[f"{name}_p95_nats"] = _quantile(scores[name], share, drawn)
    return Measured(numbers, draws, units)


def _columns(
    scores: Scores, units: Units, num_bytes: np.ndarray | None, teacher: Scores | None, baseline: Scores | None
) -> dict[str, np.ndarray]:
    """The sums over each unit that metrics are functions of, by name, float64 [units] or [units, bins]."""
    columns = {name: units.sums(values) for name, values in scores.items() if name not in ("confidence", "correct")}
    columns["tokens"] = np.bincount(units.unit, minlength=units.number).astype(np.float64)
    confidence = scores["confidence"].astype(np.float64)
    bins = np.clip((confidence * BINS).astype(np.int64), 0, BINS - 1)
    sums = np.bincount(units.unit * BINS + bins, confidence - scores["correct"], units.number * BINS)
    columns["too_confident"] = sums.reshape(units.number, BINS)  # Σ (confidence − correct) of each unit in each bin
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


def no_gap(
    measured: Mapping[str, Measured], refused: Mapping[str, Mapping[str, str]], teacher: str, baseline: str | None
) -> str | None:
    """The reason why there is no gap between baseline and teacher to recover; None where there is one."""
    if baseline is None or baseline not in measured:
        return "no model is said to be the baseline" if baseline is None else f"{baseline} does not run here"
    if "recovered_gap" in refused[baseline]:
        return f"of {baseline}, {refused[baseline]['recovered_gap']}"
    name, above, below = "cross_entropy_nats", measured[baseline], measured[teacher]
    value = above.numbers[name].value - below.numbers[name].value
    low = float(np.percentile(above.draws[name] - below.draws[name], 2.5)) if above.draws else value
    return None if low > 0 else "the baseline's cross-entropy is not above the teacher's beyond chance"


def differences(measured: Mapping[str, Measured], alike: Sequence[str]) -> Iterable[Difference]:
    """The differences of every two models in the metrics that both have: the cross-entropy of those that are ``alike``,
    which read the same tokens, and the bits per byte of others. Those that are not drawn by the same documents are left
    out."""
    for a, b in combinations(measured, 2):
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
            yield compared(metric, a, b, numbers, x.units.number, None, higher_is_better, unit, x.units.noun)


# --- where a model differs from its teacher ---------------------------------------------------------------------------

DECILES = 10
POSITIONS = (0, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
"""The beginnings of the bins of positions."""
ENTROPIES = (0.0, 0.1, 0.5, 1.0, 2.0, 3.0, 4.0, 6.0)
"""The beginnings of the bins of the teacher's entropy, in nats."""
NUM_PASSAGES = 10
PASSAGE_TOKENS = 64


def breakdowns(
    predicted: Predicted, teacher_entropy: np.ndarray, forward_kl: Mapping[str, np.ndarray]
) -> tuple[Breakdown, ...]:
    """The mean forward KL of each model by the frequency of the token that is predicted, by the number of tokens read
    before it (in its piece, where its document was split), and by the teacher's entropy."""
    frequency, frequency_labels = _by_frequency(predicted.tokens)
    position = np.digitize(predicted.position, POSITIONS) - 1
    places = [f"{a:,}–{b - 1:,}" for a, b in pairwise([*POSITIONS, 2**31])][: int(position.max()) + 1]
    entropy = np.clip(np.digitize(teacher_entropy, ENTROPIES) - 1, 0, None)
    inner = [f"{a:g}–{b:g}" for a, b in pairwise(ENTROPIES[1:])]
    entropies = (f"under {ENTROPIES[1]:g}", *inner, f"{ENTROPIES[-1]:g} and more")
    found: list[Breakdown] = []
    by_kind = {
        "token_frequency": (frequency, frequency_labels),
        "position": (position, tuple(places)),
        "teacher_entropy": (entropy, entropies),
    }
    for by, (bins, labels) in by_kind.items():
        counts, means = np.bincount(bins, minlength=len(labels)).tolist(), {}
        for name, values in forward_kl.items():
            sums = np.bincount(bins, weights=values, minlength=len(labels)).tolist()
            means[name] = tuple(s / n if n else None for s, n in zip(sums, counts, strict=True))
        about: dict[str, Any] = {"by": by, "labels": labels, "num_tokens": tuple(counts)}
        found.append(Breakdown(**about, forward_kl_nats=means))
    return tuple(found)


def _by_frequency(tokens: np.ndarray) -> tuple[np.ndarray, tuple[str, ...]]:
    """The bin of each predicted token, rarest first, and the bins' labels.

    A bin holds a tenth of all predicted tokens, as nearly as may be: every token of one id, and all ids that come
    equally often, fall into the bin in which the middle of them lies.
    """
    counts = np.bincount(tokens)
    often, num_ids = np.unique(counts[counts > 0], return_counts=True)
    mass = often * num_ids
    middle = (np.cumsum(mass) - mass / 2) / mass.sum()
    decile = np.minimum((middle * DECILES).astype(np.int64), DECILES - 1)
    _, bins = np.unique(decile, return_inverse=True)
    labels = []
    for b in range(int(bins.max()) + 1):
        least, most = int(often[bins == b].min()), int(often[bins == b].max())
        labels.append(f"{least:,}×" if least == most else f"{least:,}–{most:,}×")
    return bins[np.searchsorted(often, counts[tokens])], tuple(labels)


def worst_passages(
    predicted: Predicted, forward_kl: np.ndarray, tokenizer: PreTrainedTokenizerBase
) -> tuple[Passage, ...]:
    """The ten passages of at most 64 predicted tokens of one document with the largest sum of forward KL, worst first;
    none overlaps another. A sum, so that no short document is among them for its shortness."""
    n = len(predicted)
    total = np.concatenate(([0.0], np.cumsum(forward_kl, dtype=np.float64)))
    ends_of_documents = np.searchsorted(predicted.document, predicted.document, side="right")
    starts = np.arange(n)
    ends = np.minimum(starts + PASSAGE_TOKENS, ends_of_documents)
    sums = total[ends] - total[starts]
    passages = []
    while len(passages) < NUM_PASSAGES and np.isfinite(best := sums.max()):
        start = int(np.flatnonzero(sums == best)[0])
        end, document = int(ends[start]), int(predicted.document[start])
        values = forward_kl[start:end].astype(np.float64)
        passages.append(
            Passage(
                document=predicted.documents.name(document),
                first=predicted.documents.first(document) + int(predicted.position[start]) + 1,
                mean_kl_nats=float(values.mean()),
                tokens=token_texts(tokenizer, predicted.tokens[start:end].tolist()),
                kl_nats=tuple(values.tolist()),
            )
        )
        sums[(ends > start) & (starts < end)] = -np.inf
    return tuple(passages)


def token_texts(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> tuple[str, ...]:
    """Each token's own part of the text: what it adds to those before it. One that is no whole character, or adds
    nothing, is given by its name in the vocabulary."""

    texts, before = [], ""
    names = tokenizer.convert_ids_to_tokens(tokens)
    for i in range(len(tokens)):
        now = tokenizer.decode(tokens[: i + 1], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        now = now if isinstance(now, str) else now[0]
        added = now[len(before) :]
        whole = added and now.startswith(before) and not added.endswith("\ufffd")
        texts.append(added if whole else names[i])
        before = now
    return tuple(texts)

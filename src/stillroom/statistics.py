"""Statistics: the uncertainty of a measured score, and whether two models differ by more than chance.

Models are compared on the same items, so what counts is the difference on each item (a paired test): items that are
hard for both say nothing about which is better.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from pydantic import BaseModel, ConfigDict

from stillroom.errors import MismatchError

NUM_RESAMPLES = 10_000
"""The number of resamples of a bootstrap."""
RESAMPLE_BYTES = 64 * 2**20
"""The budget for the resamples that are drawn at a time."""
Z_95 = 1.959963984540054
"""The number of standard deviations that hold 95 % of the normal distribution."""
SIGNIFICANCE = 0.05
FEWEST_ITEMS = 6
"""No winner is named with fewer: a fair coin falls on one side five times in a row, either one, in 1 of 16 trials."""
FEW_DISCORDANT = 25
"""McNemar's test is exact with fewer items on which two models differ."""


class Record(BaseModel):
    """A part of what an evaluation writes down."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Number(Record):
    """A measured number with what is known of its error."""

    value: float
    error: float | None = None
    """Its standard error; None for a single item."""
    low: float | None = None
    """The 95 % interval."""
    high: float | None = None


class Difference(Record):
    """Two models on the same items."""

    what: str
    """The metric, or task and metric."""
    a: str
    b: str
    value: float
    """a less b."""
    low: float
    high: float
    """The 95 % interval by paired bootstrap."""
    num_items: int
    p_value: float | None = None
    """McNemar's, for scores of 0 and 1."""
    sentence: str
    """The difference in words; no winner is named where the interval spans zero."""


def standard_error(values: ArrayLike) -> float:
    """The standard error of the mean of at least two independent values: √(Σ (x − mean)² / (n − 1) / n)."""
    x = np.asarray(values, dtype=np.float64)
    return float(x.std(ddof=1) / math.sqrt(len(x)))


def normal(value: float, error: float | None) -> Number:
    """A number with the interval of ±1.96 standard errors."""
    if error is None:
        return Number(value=value)
    return Number(value=value, error=error, low=value - Z_95 * error, high=value + Z_95 * error)


def mean(values: ArrayLike) -> Number:
    """The mean of independent values with its 95 % interval.

    For values of 0 and 1 the interval is Wilson's (doi 10.1080/01621459.1927.10502953), which stays within 0 and 1 and
    does not shrink to nothing where all are right; for others it is ±1.96 standard errors.
    """
    x = np.asarray(values, dtype=np.float64)
    value, n = float(x.mean()), len(x)
    if n < 2:
        return Number(value=value)
    error = standard_error(x)
    if not _zero_one(x):
        return normal(value, error)
    shrink = 1 + Z_95**2 / n
    center = (value + Z_95**2 / (2 * n)) / shrink
    half = Z_95 / shrink * math.sqrt(value * (1 - value) / n + (Z_95 / (2 * n)) ** 2)
    low, high = min(max(center - half, 0.0), value), max(min(center + half, 1.0), value)
    return Number(value=value, error=error, low=low, high=high)


def paired_bootstrap(
    a: ArrayLike, b: ArrayLike, seed: int, weights: ArrayLike | None = None
) -> tuple[float, float, float]:
    """Mean of a less mean of b, with its 95 % percentile interval over 10,000 resamples of the items.

    An item is drawn with both of its scores. The same seed gives the same interval.

    Args:
        weights: what each item counts in the means; for a mean over tokens, whose errors go together within a document,
            the items are documents, their scores the means over their tokens, and the weights their numbers of tokens.

    Raises:
        MismatchError: a and b are not of the same items, or there are none.
    """
    x, y = _paired(a, b)
    w = np.ones(len(x)) if weights is None else np.asarray(weights, dtype=np.float64)
    columns = np.stack([w * (x - y), w], axis=1)
    gain, weight = columns.sum(axis=0)
    gains, weighed = resampled_totals(columns, seed).T
    value = float(gain / weight)
    low, high = interval(gains / weighed, value)
    return value, low, high


def resampled_totals(columns: ArrayLike, seed: int) -> np.ndarray:
    """The sums of k numbers of each of n items over 10,000 resamples of the items, float64 [10000, k].

    They give the bootstrap of any function of sums: a ratio, the exponent of a mean, a share. The same seed and number
    of items give the same resamples, so results of different models can be subtracted in pairs.

    Args:
        columns: [n, k].
    """
    x = np.asarray(columns, dtype=np.float64)
    n = len(x)
    generator = np.random.Generator(np.random.PCG64(seed))
    at_a_time = max(1, RESAMPLE_BYTES // (20 * n))  # an index of 4 bytes, two numbers of 8
    totals = []
    for start in range(0, NUM_RESAMPLES, at_a_time):
        size = min(at_a_time, NUM_RESAMPLES - start)
        drawn = generator.integers(n, size=(size, n), dtype=np.uint32)
        places = (drawn + np.arange(size)[:, None] * n).ravel()
        totals.append(np.bincount(places, minlength=size * n).reshape(size, n) @ x)
    return np.concatenate(totals)


def interval(resampled: np.ndarray, value: float) -> tuple[float, float]:
    """The 95 % percentile interval of resampled values, extended to include the value itself."""
    low, high = np.percentile(resampled, [2.5, 97.5])
    return min(float(low), value), max(float(high), value)


def mcnemar(a: ArrayLike, b: ArrayLike) -> float:
    """The two-sided p-value of McNemar's test that two models are equally often right.

    Only the items count on which one is right and the other wrong. With fewer than 25 of them it is the exact binomial
    test, otherwise χ² = (\\|n₁₀ − n₀₁\\| − 1)² / (n₁₀ + n₀₁) with one degree of freedom.

    Args:
        a, b: 1 or True where the model is right, in the same order of items.
    """
    x, y = _paired(a, b)
    only_a, only_b = int(np.sum(x > y)), int(np.sum(x < y))
    discordant = only_a + only_b
    if discordant < FEW_DISCORDANT:
        tail = sum(math.comb(discordant, i) for i in range(min(only_a, only_b) + 1))
        return min(1.0, 2 * tail / 2**discordant)
    excess = max(abs(only_a - only_b) - 1, 0)
    return math.erfc(math.sqrt(excess**2 / discordant / 2))


def difference(
    what: str,
    a_name: str,
    b_name: str,
    a: ArrayLike,
    b: ArrayLike,
    *,
    seed: int,
    higher_is_better: bool = True,
    unit: str = "points",
    items: str = "questions",
) -> Difference:
    """Compares two models on the same items, as ``compared`` does.

    Raises:
        MismatchError: the scores are not of the same items, or there are none.
    """
    x, y = _paired(a, b)
    p_value = mcnemar(x, y) if _zero_one(x) and _zero_one(y) else None
    numbers = paired_bootstrap(x, y, seed)
    return compared(what, a_name, b_name, numbers, len(x), p_value, higher_is_better, unit, items)


def compared(
    what: str,
    a_name: str,
    b_name: str,
    numbers: tuple[float, float, float],
    num_items: int,
    p_value: float | None,
    higher_is_better: bool,
    unit: str,
    items: str,
) -> Difference:
    """States the result of a comparison on the same items in words.

    A winner is named only where the interval excludes zero, McNemar's test (for scores of 0 and 1) does not call it
    chance, and there are enough items.

    Args:
        what: the metric, or task and metric.
        numbers: a less b, and its 95 % interval.
        unit: the unit of the scores; points are hundredths.
        items: a word for them, in the plural.
    """
    value, low, high = numbers
    beyond_chance = not low <= 0 <= high and (p_value is None or p_value < SIGNIFICANCE)
    count = f"{num_items:,} {items}"
    if not beyond_chance or num_items < FEWEST_ITEMS:
        sentence = f"{a_name} and {b_name} do not differ beyond chance: {_in_words(numbers, unit)}, {count}"
    else:
        winner, loser = (a_name, b_name) if (value > 0) == higher_is_better else (b_name, a_name)
        positive = numbers if value > 0 else (-value, -high, -low)
        sentence = f"{winner} beats {loser} by {_in_words(positive, unit)}, {count}"
    ends = {"value": value, "low": low, "high": high}
    return Difference(what=what, a=a_name, b=b_name, num_items=num_items, p_value=p_value, sentence=sentence, **ends)


def _in_words(numbers: tuple[float, float, float], unit: str) -> str:
    """Value and interval, with two digits of the interval's width and at least one of its end that is nearer zero."""
    value, low, high = (100 * x if unit == "points" else x for x in numbers)
    sizes = [(high - low) / 10, min(abs(low), abs(high))]
    decimals = min(max([1, *(-math.floor(math.log10(size)) for size in sizes if size > 0)]), 6)

    def number(x: float) -> str:
        return f"{round(x, decimals) + 0.0:.{decimals}f}".replace("-", "−")

    return f"{number(value)} {unit}, 95 % interval {number(low)} to {number(high)}"


def _zero_one(x: np.ndarray) -> bool:
    return bool(np.all((x == 0) | (x == 1)))


def _paired(a: ArrayLike, b: ArrayLike) -> Sequence[np.ndarray]:
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if x.shape == y.shape and x.ndim == 1 and len(x):
        return x, y
    raise MismatchError(
        "the scores of two models cannot be compared",
        {"one has": f"{x.size} items", "the other": f"{y.size} items"},
        why="Each item's difference counts, so both must have answered the same items, and at least one.",
        fix="Evaluate both on the same items, in one run.",
    )

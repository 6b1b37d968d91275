"""Summary: what many items come to, as numbers with their errors and differences between models."""

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from stillroom.evaluate.results import Difference, Number
from stillroom.evaluate.tasks.local import LOG_LIKELIHOOD
from stillroom.statistics import difference, mean

Values = Mapping[str, Sequence[float]]
"""By metric: what each item counts."""


def number(values: Sequence[float]) -> Number:
    """The mean of the items with its standard error and 95 % interval."""
    return Number(**mean(values)._asdict())


def scores(values: Values, groups: Sequence[str | None], metric: str) -> dict[str, Number]:
    """The mean of each metric, and of ``metric`` in each group as "METRIC GROUP".

    Log-likelihoods are told as a perplexity too: exp(−mean), where that is a number that a computer can hold.
    """
    found = {name: number(one) for name, one in values.items()}
    if LOG_LIKELIHOOD in found and (perplexity := _perplexity(found[LOG_LIKELIHOOD])) is not None:
        found["perplexity"] = perplexity
    main = np.asarray(values[metric])
    for group in dict.fromkeys(groups):
        if group is not None:
            found[f"{metric} {group}"] = number(main[[other == group for other in groups]].tolist())
    return found


def _perplexity(log_likelihood: Number) -> Number | None:
    ends = (log_likelihood.value, log_likelihood.high, log_likelihood.low)
    value, low, high = (None if x is None else _exp(-x) for x in ends)
    if value is None or not math.isfinite(value) or (high is not None and not math.isfinite(high)):
        return None
    error = None if log_likelihood.error is None else value * log_likelihood.error
    return Number(value=value, error=error, low=low, high=high)


def _exp(x: float) -> float:
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf


def normalise(raw: Number, chance: float, *, clip: bool = False) -> Number:
    """(raw − chance) / (1 − chance): 0 at chance and 1 at perfect.

    Args:
        clip: what is below chance counts as chance.
    """

    def scaled(value: float | None) -> float | None:
        if value is None:
            return None
        found = (value - chance) / (1 - chance)
        return max(found, 0.0) if clip else found

    error = None if raw.error is None else raw.error / (1 - chance)
    return Number(value=scaled(raw.value) or 0.0, error=error, low=scaled(raw.low), high=scaled(raw.high))


def differences(
    task: str,
    metric: str,
    by_model: Mapping[str, Sequence[float]],
    seed: int,
    *,
    higher_is_better: bool = True,
) -> tuple[Difference, ...]:
    """Every two models compared on the same items: shares of 1 in points, other scores in the units of the metric."""
    shares = all(0 <= value <= 1 for values in by_model.values() for value in values)
    about: dict[str, Any] = {"higher_is_better": higher_is_better, "unit": "points" if shares else metric}
    found: list[Any] = []
    for a, b in combinations(by_model, 2):
        found.append(difference(f"{task} {metric}", a, b, by_model[a], by_model[b], seed=seed, **about))
    return tuple(Difference(**one._asdict()) for one in found)

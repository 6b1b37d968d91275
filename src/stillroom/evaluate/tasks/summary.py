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

    Log-likelihoods are told as a perplexity: exp(−mean).
    """
    found = {name: number(one) for name, one in values.items() if name != LOG_LIKELIHOOD}
    if LOG_LIKELIHOOD in values:
        found["perplexity"] = _perplexity(number(values[LOG_LIKELIHOOD]))
    main = np.asarray(values[metric])
    for group in dict.fromkeys(groups):
        if group is not None:
            found[f"{metric} {group}"] = number(main[[other == group for other in groups]].tolist())
    return found


def _perplexity(log_likelihood: Number) -> Number:
    value = math.exp(-log_likelihood.value)
    if log_likelihood.error is None or log_likelihood.low is None or log_likelihood.high is None:
        return Number(value=value)
    ends = {"low": math.exp(-log_likelihood.high), "high": math.exp(-log_likelihood.low)}
    return Number(value=value, error=value * log_likelihood.error, **ends)


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


def differences(task: str, metric: str, by_model: Mapping[str, Sequence[float]], seed: int) -> tuple[Difference, ...]:
    """Every two models compared on the same items."""
    found: list[Any] = []
    for a, b in combinations(by_model, 2):
        found.append(difference(f"{task} {metric}", a, b, by_model[a], by_model[b], seed=seed))
    return tuple(Difference(**one._asdict()) for one in found)

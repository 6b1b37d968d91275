"""Items: each model's answer to each item of a task, as a file, as scores with errors, and as changes."""

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from stillroom.errors import DataError, MissingError
from stillroom.evaluate.results import Difference, Number
from stillroom.runs import writing
from stillroom.statistics import difference, mean

FOLDER = "items"
LOG_LIKELIHOOD = "log_likelihood_nats"


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelAnswer(_Part):
    """The answer of a model to an item."""

    prediction: str
    scores: tuple[float, ...] = ()
    """The log-likelihood of each option, in nats; none where the model wrote."""
    correct: float
    """The score by the metric that is shown first: 1 or 0, or another number."""
    num_cut: int = 0
    """Tokens of the question that were too far back for the model to read."""


class Item(_Part):
    """An item of a task."""

    id: str
    group: str | None = None
    question: str
    """The question without instruction and examples."""
    options: tuple[str, ...] = ()
    gold: str
    models: dict[str, ModelAnswer] = Field(default_factory=dict)
    """The answers by the model's name."""


def write_items(path: Path, items: Iterable[Item]) -> None:
    """Writes items under a temporary name, syncs the file and renames it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with writing(path), temporary.open("w", encoding="utf-8") as file:
        for item in items:
            file.write(json.dumps(item.model_dump(), ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
        temporary.replace(path)


def read_items(path: Path) -> Iterator[Item]:
    """The items in a file, streamed.

    Raises:
        MissingError: it is not there.
        DataError: a line is not an item.
    """
    if not path.is_file():
        raise MissingError(
            f"the items {path} are not there",
            why="They tell what each model said of each item.",
            fix="Check the path; `stillroom evaluate` writes them into OUT/items.",
        )
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield Item.model_validate_json(line)
            except ValidationError as error:
                raise DataError(
                    f"{path} line {number} is not an item",
                    {"problem": " ".join(error.errors()[0]["msg"].split())[:200]},
                    why="Every line is the result of one item.",
                    fix="Evaluate again, or restore the file.",
                ) from None


class Change(NamedTuple):
    """An item that one model has right and the other wrong."""

    item: Item
    kind: Literal["gained", "lost"]
    """Whether b has right what a had wrong, or the other way about."""
    a: ModelAnswer
    b: ModelAnswer


def changes(path: Path, a: str, b: str) -> Iterator[Change]:
    """The items that changed from model ``a`` to model ``b``, in the order of the file.

    Raises:
        MissingError: the file is not there, or tells nothing of one of the models.
        DataError: a line of it is not an item.
    """
    for item in read_items(path):
        for name in (a, b):
            if name not in item.models:
                raise MissingError(
                    f"{path} tells nothing of {name}",
                    {"item": item.id, "models": ", ".join(item.models)},
                    why="Only models that answered the same items can be compared.",
                    fix="Name two of these models, or evaluate again with both.",
                )
        one, other = item.models[a], item.models[b]
        if one.correct != other.correct:
            yield Change(item, "gained" if other.correct > one.correct else "lost", one, other)


def as_text(change: Change, a: str, b: str) -> str:
    """A change in a few lines, for a terminal."""
    question = " ".join(change.item.question.split())
    lines = [
        f"{'+' if change.kind == 'gained' else '-'} {change.item.id}: {question[-160:]}",
        f"    right: {change.item.gold}",
    ]
    return "\n".join([*lines, *(f"    {name}: {one.prediction}" for name, one in ((a, change.a), (b, change.b)))])


# --- scores ----------------------------------------------------------------------------------------------------------

Values = Mapping[str, Sequence[float]]
"""The score of each item, by metric."""


def number(values: Sequence[float]) -> Number:
    """The mean of the items with its standard error and 95 % interval."""
    return Number(**mean(values)._asdict())


def scores(values: Values, groups: Sequence[str | None], metric: str) -> dict[str, Number]:
    """The mean of each metric, and of ``metric`` in each group as "METRIC GROUP".

    Log-likelihoods are given as a perplexity too: exp(−mean), where that is a number that a computer can hold.
    """
    found = {name: number(one) for name, one in values.items()}
    if LOG_LIKELIHOOD in found:
        mean_nats = found[LOG_LIKELIHOOD]
        ends = (mean_nats.value, mean_nats.high, mean_nats.low)
        value, low, high = (None if x is None else _exp(-x) for x in ends)
        if value is not None and math.isfinite(value) and (high is None or math.isfinite(high)):
            error = None if mean_nats.error is None else value * mean_nats.error
            found["perplexity"] = Number(value=value, error=error, low=low, high=high)
    main = np.asarray(values[metric])
    for group in dict.fromkeys(groups):
        if group is not None:
            found[f"{metric} {group}"] = number(main[[other == group for other in groups]].tolist())
    return found


def _exp(x: float) -> float:  # kept: OverflowError has to be caught for three numbers
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf


def normalize(raw: Number, chance: float, *, clip: bool = False) -> Number:
    """(raw − chance) / (1 − chance): 0 at chance and 1 at perfect.

    Args:
        clip: whether a score below chance counts as chance.
    """

    def scaled(value: float | None) -> float | None:
        if value is None:
            return None
        return max((value - chance) / (1 - chance), 0.0) if clip else (value - chance) / (1 - chance)

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
    found = [
        difference(f"{task} {metric}", a, b, by_model[a], by_model[b], seed=seed, **about)
        for a, b in combinations(by_model, 2)
    ]
    return tuple(Difference(**one._asdict()) for one in found)

"""Results: everything that an evaluation found, as results.json and the files of items hold it. The report is made of
them alone."""

import json
import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Literal, NamedTuple, Self

import numpy as np
from pydantic import Field, ValidationError, model_validator

from stillroom.errors import DataError, MissingError
from stillroom.evaluate.config import Role
from stillroom.runs import writing
from stillroom.statistics import Difference, Number, Record, difference, mean


class ModelFacts(Record):
    """A model that was evaluated."""

    name: str
    """The name in the command: teacher, distilled, baseline or any other."""
    role: Role
    model: str
    """Its folder, hub name or address."""
    fingerprint: str
    tokenizer: str | None
    """The fingerprint of its tokenizer; None for a server."""
    num_parameters: int | None
    size_bytes: int | None
    """The size of its weight files."""
    tokens_per_s: float | None = None
    """Scored in the pass over the held-out text."""
    peak_memory_bytes: int | None = None


class Text(Record):
    """The held-out text."""

    name: str
    fingerprint: str
    num_documents: int
    num_tokens: int
    """Predicted tokens, in the teacher's tokens."""
    num_bytes: int | None
    """UTF-8 bytes of them; None where the tokenizer drops some of the text."""


class TaskResult(Record):
    """One benchmark."""

    name: str
    source: Literal["local", "lm-eval"]
    version: str
    shots: int
    num_items: int
    metric: str
    """The metric that is shown first."""
    higher_is_better: bool = True
    scores: dict[str, dict[str, Number]] = Field(default_factory=dict)
    """The numbers by model and metric, in the units of the metric (shares of 1, not percent)."""
    normalised: dict[str, Number] = Field(default_factory=dict)
    """The score by model that is 0 at chance and 1 at perfect, where there is an official normalization or a
    known chance level."""
    differences: tuple[Difference, ...] = ()
    fingerprint: str | None = None
    """The fingerprint of a local task: of its questions and of the answers that count as right."""
    items: str | None = None
    """The file of per-item results, beside results.json."""
    failed: str | None = None
    """The reason why it was not run for the models that have no scores."""


class Breakdown(Record):
    """The mean KL of a model to the teacher in bins of tokens."""

    by: Literal["token_frequency", "position", "teacher_entropy"]
    labels: tuple[str, ...]
    """The labels of the bins, in order."""
    num_tokens: tuple[int, ...]
    forward_kl_nats: dict[str, tuple[float | None, ...]]
    """The mean of each bin by model; None where a bin is empty."""

    @model_validator(mode="after")
    def _check_lengths(self) -> Self:
        for name, values in (("num_tokens", self.num_tokens), *self.forward_kl_nats.items()):
            if len(values) != len(self.labels):
                raise ValueError(f"{name} has {len(values)} values for {len(self.labels)} labels")
        return self


class Passage(Record):
    """A passage of the text in which a model is far from the teacher."""

    document: str
    first: int
    """The place of its first token in the document."""
    mean_kl_nats: float
    tokens: tuple[str, ...]
    kl_nats: tuple[float, ...]
    """The KL of the prediction of each token."""

    @model_validator(mode="after")
    def _check_lengths(self) -> Self:
        if len(self.kl_nats) != len(self.tokens):
            raise ValueError(f"kl_nats has {len(self.kl_nats)} values for {len(self.tokens)} tokens")
        return self


class Results(Record):
    """Everything that the report shows."""

    format: Literal[1] = 1
    models: tuple[ModelFacts, ...]
    text: Text | None = None
    metrics: dict[str, dict[str, Number]] = Field(default_factory=dict)
    """The numbers by model and metric: cross_entropy_nats, perplexity, bits_per_byte, forward_kl_nats,
    forward_kl_p95_nats, reverse_kl_nats, reverse_kl_p95_nats, top1_agreement, top10_overlap, accepted_mass,
    speculative_tokens (expected tokens a step at γ = 4), entropy_nats, entropy_ratio, calibration_error,
    recovered_gap."""
    refused: dict[str, dict[str, str]] = Field(default_factory=dict)
    """The reason by model and metric why it was not measured."""
    differences: tuple[Difference, ...] = ()
    """The differences of the metrics."""
    tasks: tuple[TaskResult, ...] = ()
    breakdowns: tuple[Breakdown, ...] = ()
    worst: dict[str, tuple[Passage, ...]] = Field(default_factory=dict)
    """The passages by model in which it is furthest from the teacher."""
    runs: dict[str, str] = Field(default_factory=dict)
    """The folder by model of the run that made it, whose metrics.jsonl are drawn, where it is known."""
    command: str
    """The command that repeats the evaluation."""
    versions: dict[str, str] = Field(default_factory=dict)
    machine: dict[str, str | int] = Field(default_factory=dict)


# --- items -----------------------------------------------------------------------------------------------------------

FOLDER = "items"
LOG_LIKELIHOOD = "log_likelihood_nats"


class ModelAnswer(Record):
    """The answer of a model to an item."""

    prediction: str
    scores: tuple[float, ...] = ()
    """The log-likelihood of each option, in nats; none where the model wrote."""
    correct: float
    """The score by the metric that is shown first: 1 or 0, or another number."""
    num_cut: int = 0
    """Tokens of the question that were too far back for the model to read."""


class Item(Record):
    """An item of a task."""

    id: str
    group: str | None = None
    question: str
    """The question without instruction and examples."""
    options: tuple[str, ...] = ()
    gold: str
    models: dict[str, ModelAnswer] = Field(default_factory=dict)
    """The answers by the model's name."""


def write_text(path: Path, texts: Iterable[str]) -> None:
    """Writes texts under a temporary name, syncs the file and renames it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with writing(path), temporary.open("w", encoding="utf-8") as file:
        file.writelines(texts)
        file.flush()
        os.fsync(file.fileno())
        temporary.replace(path)


def write_items(path: Path, items: Iterable[Item]) -> None:
    """Writes a line of JSON for each item."""
    write_text(path, (json.dumps(item.model_dump(), ensure_ascii=False) + "\n" for item in items))


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
    with path.open("rb") as file:
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
    """Whether b's score is better than a's, or worse."""
    a: ModelAnswer
    b: ModelAnswer


def changes(path: Path, a: str, b: str, *, higher_is_better: bool = True) -> Iterator[Change]:
    """The items whose score changed from model ``a`` to model ``b``, in the order of the file.

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
            better = (other.correct > one.correct) == higher_is_better
            yield Change(item, "gained" if better else "lost", one, other)


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


def scores(values: Values, groups: Sequence[str | None], metric: str) -> dict[str, Number]:
    """The mean of each metric, and of ``metric`` in each group as "METRIC GROUP".

    Log-likelihoods are given as a perplexity too: exp(−mean), where that is a number that a computer can hold.
    """
    found = {name: mean(one) for name, one in values.items()}
    if LOG_LIKELIHOOD in found:
        mean_nats = found[LOG_LIKELIHOOD]
        ends = (mean_nats.high, mean_nats.low)
        if all(x is None or -x <= math.log(sys.float_info.max) for x in (mean_nats.value, *ends)):
            value = math.exp(-mean_nats.value)
            low, high = (None if x is None else math.exp(-x) for x in ends)
            error = None if mean_nats.error is None else value * mean_nats.error
            found["perplexity"] = Number(value=value, error=error, low=low, high=high)
    main = np.asarray(values[metric])
    for group in dict.fromkeys(groups):
        if group is not None:
            found[f"{metric} {group}"] = mean(main[[other == group for other in groups]])
    return found


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
    task: str, metric: str, by_model: Mapping[str, Sequence[float]], seed: int, *, higher_is_better: bool = True
) -> tuple[Difference, ...]:
    """Every two models compared on the same items: shares of 1 in points, other scores in the units of the metric."""
    unit = "points" if all(0 <= value <= 1 for values in by_model.values() for value in values) else metric
    compare = partial(difference, f"{task} {metric}", seed=seed, higher_is_better=higher_is_better, unit=unit)
    return tuple(compare(a, b, by_model[a], by_model[b]) for a, b in combinations(by_model, 2))

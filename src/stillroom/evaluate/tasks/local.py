"""Local tasks: questions put to a model, and what it said of each, scored."""

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from stillroom.evaluate.tasks.description import Description, ExactMatch, Filter, LastWord, MinimalPairs, MultipleChoice
from stillroom.evaluate.tasks.likelihood import Likelihood
from stillroom.evaluate.tasks.lm import EvalModel, answers, likelihoods
from stillroom.evaluate.tasks.questions import Question

LOG_LIKELIHOOD = "log_likelihood_nats"
NUMBER = re.compile(r"(?:(?<![\w.)])-)?(?:(?:\d{1,3}(?:,\d{3})+(?![\d,])|\d+)(?:\.\d+)?|\.\d+)")
"""A minus that follows a number or a word, as in 10-12, is none; a comma parts thousands."""


class ModelReply(NamedTuple):
    """What a model said of one question."""

    prediction: str
    scores: tuple[float, ...]
    """The log-likelihood of each option, in nats; none where the model wrote."""
    metrics: dict[str, float]
    num_cut: int
    """Tokens of the question that the model could not read, being too far back."""


def metric(description: Description) -> str:
    """The metric that is shown first."""
    match description:
        case MultipleChoice():
            return description.metric
        case ExactMatch():
            return "exact_match"
        case _:
            return "acc"


def chance(description: Description, questions: Sequence[Question]) -> float | None:
    """The score of blind guessing, where it is known: the mean of one over the number of options."""
    if isinstance(description, MultipleChoice | MinimalPairs):
        return float(np.mean([1 / len(question.options) for question in questions]))
    return None


def ask(
    description: Description, questions: Sequence[Question], model: EvalModel, done: Callable[[int], object]
) -> list[ModelReply]:
    """Puts all questions to a model.

    Args:
        done: is told of the number of answers so far.

    Raises:
        StillroomError: the model cannot be asked such questions.
    """
    if isinstance(description, ExactMatch):
        limits = {"until": description.until, "max_tokens": description.max_tokens}
        written = answers(model, [question.context for question in questions], **limits, done=done)
        return [
            _compare(description, question, text, num_cut)
            for question, (text, num_cut) in zip(questions, written, strict=True)
        ]
    pairs = [(question.context, option) for question in questions for option in question.options]
    owners = [question.id for question in questions for _ in question.options]
    told = iter(likelihoods(model, pairs, owners.__getitem__, done))
    judge = _last_word if isinstance(description, LastWord) else partial(_choose, description)
    return [judge(question, [next(told) for _ in question.options]) for question in questions]


def _choose(description: Description, question: Question, told: Sequence[Likelihood]) -> ModelReply:
    """The likeliest option by each measure; of equals the first, as in lm-eval."""
    sums = np.array([one.log_likelihood for one in told])
    lengths = {"acc": np.ones(len(told))}
    if isinstance(description, MultipleChoice):
        lengths |= {
            "acc_norm": np.array([len(label) for label in question.labels]),
            "acc_bytes": np.array([len(label.encode()) for label in question.labels]),
            "acc_tokens": np.array([one.num_tokens for one in told]),
        }
    chosen = {name: int(np.argmax(sums / length)) for name, length in lengths.items()}
    metrics = {name: float(choice == question.gold) for name, choice in chosen.items()}
    prediction = question.labels[chosen[metric(description)]]
    return ModelReply(prediction, tuple(sums.tolist()), metrics, max(one.num_cut for one in told))


def _last_word(question: Question, told: Sequence[Likelihood]) -> ModelReply:
    (one,) = told
    prediction = question.labels[0] if one.greedy else ""
    metrics = {"acc": float(one.greedy), LOG_LIKELIHOOD: one.log_likelihood}
    return ModelReply(prediction, (one.log_likelihood,), metrics, one.num_cut)


def _compare(description: ExactMatch, question: Question, text: str, num_cut: int) -> ModelReply:
    prediction = apply(description.filters, text)
    right = [apply(description.target_filters, answer) for answer in question.answers]
    return ModelReply(prediction, (), {"exact_match": float(prediction in right)}, num_cut)


def apply(filters: Sequence[Filter], text: str) -> str:
    """What filters make of a text, in turn."""
    for one in filters:
        if one == "strip":
            text = text.strip()
        elif one == "lower":
            text = text.lower()
        elif one == "last_number":
            found = NUMBER.findall(text)
            text = _plain_number(found[-1]) if found else ""
        else:
            matches = list(re.finditer(one.pattern, text))
            text = (matches[-1][1 if matches[-1].re.groups else 0] or "") if matches else ""
    return text


def _plain_number(text: str) -> str:
    """1,234.50 as 1234.5 and .5 as 0.5, so that equal numbers are equal texts."""
    sign, digits = ("-" if text.startswith("-") else ""), text.removeprefix("-").replace(",", "")
    whole, _, part = digits.partition(".")
    whole, part = whole.lstrip("0") or "0", part.rstrip("0")
    number = f"{whole}.{part}" if part else whole
    return number if number == "0" else sign + number

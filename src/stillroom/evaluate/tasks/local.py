"""Local tasks: items become questions, each checked, and a model's replies to them become scores."""

import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from stillroom.data.chat_templates import Name, Row, Template, text_in, value_in
from stillroom.data.sources import FileSource, files_of
from stillroom.errors import ConfigError, DataError, MissingError
from stillroom.evaluate.tasks.config import Description, ExactMatch, Filter, LastWord, MinimalPairs, MultipleChoice
from stillroom.evaluate.tasks.items import LOG_LIKELIHOOD
from stillroom.evaluate.tasks.likelihood import Likelihood
from stillroom.evaluate.tasks.lm import EvalModel, answers, likelihoods

NUMBER = re.compile(r"(?:(?<![\w.)])-)?(?:(?:\d{1,3}(?:,\d{3})+(?![\d,])|\d+)(?:\.\d+)?|\.\d+)")
"""A minus that follows a number or a word, as in 10-12, is none; a comma parts thousands."""


class Question(NamedTuple):
    """One item of a task."""

    id: str
    group: str | None
    """The part of the task that it belongs to."""
    shown: str
    """The question without instruction and examples."""
    context: str
    """All that the model reads before its answer."""
    options: tuple[str, ...]
    """The answers whose likelihood is compared, as they follow the context; none where the model writes."""
    labels: tuple[str, ...]
    """The options without the delimiter before them."""
    gold: int
    """The right option."""
    answers: tuple[str, ...]
    """The right answers, where the model writes."""


class Parts(NamedTuple):
    """An item as a description makes it, before examples are put before it."""

    context: str
    options: tuple[str, ...]
    gold: int
    answers: tuple[str, ...]


Parser = Callable[[Row, Name], Parts]


def questions(description: Description, limit: int | None = None) -> list[Question]:
    """All items of a task, or the first ``limit``, in their order.

    Raises:
        MissingError, DataError: a file is not there or cannot be read; an item lacks a column, or what it holds cannot
            be asked, with file, line and column; two items have the same id.
        ConfigError: the description cannot be meant.
    """
    parse = _parser(description)
    before = _before(description, parse)
    delimiter = description.delimiter if isinstance(description, MultipleChoice | ExactMatch) else ""
    found, seen = [], set[str]()
    for file, place, row in islice(_rows(description.items), limit):
        name = partial("{} {}".format, file, place)
        parts = parse(row, name)
        number = f"{file.name} {place}" if description.id is None else _plain(row, description.id, name)
        if number in seen:
            raise _error(name(), f"an item `{number}` came before", {"column": description.id, "value": number})
        seen.add(number)
        group = None if description.group is None else _plain(row, description.group, name)
        options = tuple(delimiter + option for option in parts.options)
        context, shown = before + parts.context, parts.context
        found.append(Question(number, group, shown, context, options, parts.options, parts.gold, parts.answers))
    if not found:
        raise MissingError(
            f"{description.items} has no items",
            why="There is nothing to ask.",
            fix="Check the path in the description.",
        )
    return found


def _rows(path: str) -> Iterator[tuple[Path, str, Row]]:
    return FileSource(files_of(Path(path))).places()


def _template(description: Description, field: str) -> Template:
    return Template(f"{field} of {description.name}", getattr(description, field))


# --- the kinds of questions ------------------------------------------------------------------------------------------


def _parser(description: Description) -> Parser:
    match description:
        case MultipleChoice():
            return _multiple_choice(description)
        case MinimalPairs():
            good, bad = (_template(description, field) for field in ("good", "bad"))
            return lambda row, name: Parts("", _not_empty((good(row, name), bad(row, name)), name), 0, ())
        case ExactMatch():
            context = _template(description, "context")
            return lambda row, name: Parts(context(row, name), (), 0, _answers(description, row, name))
        case LastWord():
            return partial(_last_word_parts, _template(description, "text"))


def _multiple_choice(description: MultipleChoice) -> Parser:
    context, column = _template(description, "context"), description.choices
    templates: list[str | Template] = []
    for text in () if isinstance(column, str) else column:
        filled_in = "{" in text or "}" in text
        templates.append(Template(f"choices of {description.name}", text) if filled_in else text)

    def parse(row: Row, name: Name) -> Parts:
        choices = [text if isinstance(text, str) else text(row, name) for text in templates]
        if isinstance(column, str):
            value = value_in(row, column, name)
            texts = isinstance(value, list) and all(isinstance(choice, str) for choice in value)
            if not texts or len(value) < 2:
                given = f"a list of {len(value)}" if texts else f"{value!r:.60}"
                values = {f"column `{column}`": given, "needed": "two texts or more"}
                raise _error(name(), "there is nothing to choose", values)
            choices = value
        options = _not_empty(choices, name)
        for i, choice in enumerate(options):
            if choice in options[:i]:
                both = f"{options.index(choice)} and {i}"
                raise _error(name(), "two choices are the same", {"choices": both, "text": f"{choice!r:.60}"})
        return Parts(context(row, name), options, _gold(row, description.target, choices, name), ())

    return parse


def _not_empty(choices: Sequence[str], name: Name) -> tuple[str, ...]:
    for i, choice in enumerate(choices):
        if not choice.strip():
            raise _error(name(), "a choice is empty", {"choice": i, "text": repr(choice)})
    return tuple(choices)


def _gold(row: Row, column: str, choices: Sequence[str], name: Name) -> int:
    value = value_in(row, column, name)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(choices):
        return value
    if isinstance(value, str) and value in choices:
        return choices.index(value)
    raise _error(
        name(),
        "the target is none of the choices",
        {f"column `{column}`": f"{value!r:.60}", "choices": f"0 to {len(choices) - 1}, or {', '.join(choices)}"[:200]},
    )


def _answers(description: ExactMatch, row: Row, name: Name) -> tuple[str, ...]:
    target = description.target
    if "{" in target or "}" in target:
        return (_template(description, "target")(row, name),)
    value = value_in(row, target, name)
    values = value if isinstance(value, list) else [value]
    if values and all(isinstance(answer, str | int | float) and not isinstance(answer, bool) for answer in values):
        return tuple(str(answer) for answer in values)
    raise _error(
        name(), "the target is no answer", {f"column `{target}`": f"{value!r:.60}", "needed": "a text or a number"}
    )


def _last_word_parts(template: Template, row: Row, name: Name) -> Parts:  # kept: a kind of question
    text = template(row, name).rstrip()
    match = re.fullmatch(r"(.*\S)(\s+\S+)", text, re.DOTALL)
    if match is None:
        raise _error(name(), "there is no last word after others", {"text": f"{text!r:.60}", "needed": "two words"})
    return Parts(match[1], (match[2],), 0, ())


# --- examples, columns, errors ----------------------------------------------------------------------------------------


def _before(description: Description, parse: Parser) -> str:
    """The instruction and examples that stand before every question."""
    if not isinstance(description, MultipleChoice | ExactMatch):
        return ""
    examples: list[tuple[Name, Row]] = []
    if isinstance(description.examples, str) and description.shots:
        for file, place, row in islice(_rows(description.examples), description.shots):
            examples.append((lambda file=file, place=place: f"{file} {place}", row))
    elif description.shots:
        given: Any = description.examples or ()
        for i, row in enumerate(given[: description.shots], 1):
            examples.append((lambda i=i: f"example {i} of {description.name}", row))
    if len(examples) < description.shots:
        raise ConfigError(
            f"the task {description.name} has too few examples",
            {"shots": description.shots, "examples": len(examples)},
            why="As many stand before each question as shots says.",
            fix="Set `examples` in the description to a list or a file with enough of them, or lower shots.",
        )
    text = description.instruction
    for name, row in examples:
        parts = parse(row, name)
        answer = parts.options[parts.gold] if parts.options else parts.answers[0]
        text += parts.context + description.delimiter + answer + description.separator
    return text


def _plain(row: Row, column: str, name: Name) -> str:
    value = value_in(row, column, name)
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else text_in(row, column, name)


def _error(place: str, what: str, values: dict[str, Any]) -> DataError:
    return DataError(
        f"{place}: {what}",
        values,
        why="The item cannot be asked, and none is left out without a word.",
        fix="Mend or delete it, or name another column in the description.",
    )


# --- replies and scores ----------------------------------------------------------------------------------------------


class ModelReply(NamedTuple):
    """The reply of a model to one question."""

    prediction: str
    scores: tuple[float, ...]
    """The log-likelihood of each option, in nats; none where the model wrote."""
    metrics: dict[str, float]
    num_cut: int
    """Tokens of the question that were too far back for the model to read."""


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
        done: is called with the number of answers so far.

    Raises:
        StillroomError: the model cannot be asked such questions.
    """
    if isinstance(description, ExactMatch):
        limits = {"until": description.until, "max_tokens": description.max_tokens}
        replies = []
        generations = answers(model, [question.context for question in questions], **limits, done=done)
        for question, (text, num_cut) in zip(questions, generations, strict=True):
            prediction = apply(description.filters, text)
            right = [apply(description.target_filters, answer) for answer in question.answers]
            replies.append(ModelReply(prediction, (), {"exact_match": float(prediction in right)}, num_cut))
        return replies
    pairs = [(question.context, option) for question in questions for option in question.options]
    owners = [question.id for question in questions for _ in question.options]
    scored = iter(likelihoods(model, pairs, owners.__getitem__, done))
    judge = _last_word if isinstance(description, LastWord) else partial(_choose, description)
    return [judge(question, [next(scored) for _ in question.options]) for question in questions]


def _choose(description: Description, question: Question, options: Sequence[Likelihood]) -> ModelReply:
    """Chooses the top option by each measure; of equals the first, as in lm-eval."""
    sums = np.array([one.log_likelihood for one in options])
    lengths = {"acc": np.ones(len(options))}
    if isinstance(description, MultipleChoice):
        lengths |= {
            "acc_norm": np.array([len(label) for label in question.labels]),
            "acc_bytes": np.array([len(label.encode()) for label in question.labels]),
            "acc_tokens": np.array([one.num_tokens for one in options]),
        }
    chosen = {name: int(np.argmax(sums / length)) for name, length in lengths.items()}
    metrics = {name: float(choice == question.gold) for name, choice in chosen.items()}
    prediction = question.labels[chosen[metric(description)]]
    return ModelReply(prediction, tuple(sums.tolist()), metrics, max(one.num_cut for one in options))


def _last_word(question: Question, options: Sequence[Likelihood]) -> ModelReply:  # kept: a kind of question
    (one,) = options
    prediction = question.labels[0] if one.greedy else ""
    metrics = {"acc": float(one.greedy), LOG_LIKELIHOOD: one.log_likelihood}
    return ModelReply(prediction, (one.log_likelihood,), metrics, one.num_cut)


def apply(filters: Sequence[Filter], text: str) -> str:
    """Applies filters to a text, in turn."""
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


def _plain_number(text: str) -> str:  # kept: a filter
    """1,234.50 as 1234.5 and .5 as 0.5, so that equal numbers are equal texts."""
    sign, digits = ("-" if text.startswith("-") else ""), text.removeprefix("-").replace(",", "")
    whole, _, part = digits.partition(".")
    whole, part = whole.lstrip("0") or "0", part.rstrip("0")
    number = f"{whole}.{part}" if part else whole
    return number if number == "0" else sign + number

"""Local tasks: items become questions, each checked, and a model's replies to them become scores."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import regex

from stillroom.data.chat_templates import Name, Row, Template, text_in, value_in
from stillroom.data.sources import FileSource, files_of
from stillroom.errors import ConfigError, DataError, MissingError
from stillroom.evaluate import results
from stillroom.evaluate.config import (
    Description,
    ExactMatch,
    Filter,
    LastWord,
    LocalTask,
    MinimalPairs,
    MultipleChoice,
    read_description,
)
from stillroom.evaluate.results import FOLDER, LOG_LIKELIHOOD, Item, ModelAnswer, TaskResult, write_items
from stillroom.evaluate.tasks.likelihood import Likelihood
from stillroom.evaluate.tasks.lm import EvalModel, answers, likelihoods
from stillroom.verbs import Report

NUMBER = re.compile(r"(?:(?<![\w.)])-)?(?:(?:\d{1,3}(?:,\d{3})+(?![\d,])|\d+)(?:\.\d+)?|\.\d+)")
"""A minus that follows a number or a word, as in 10-12, is none; a comma parts thousands."""


class Question(NamedTuple):
    """One item of a task."""

    context: str
    """All that the model reads before its answer."""
    labels: tuple[str, ...] = ()
    """The options without the delimiter before them."""
    gold: int = 0
    """The right option."""
    answers: tuple[str, ...] = ()
    """The right answers, where the model writes."""
    options: tuple[str, ...] = ()
    """The answers whose likelihood is compared, as they follow the context; none where the model writes."""
    shown: str = ""
    """The question without instruction and examples."""
    id: str = ""
    group: str | None = None
    """The part of the task that it belongs to."""


def questions(description: Description, limit: int | None = None) -> list[Question]:
    """All items of a task, or the first ``limit``, in their order.

    Raises:
        MissingError, DataError: a file is not there or cannot be read; an item lacks a column, or what it holds cannot
            be asked, with file, line and column; two items have the same id.
        ConfigError: the description cannot be meant.
    """
    before = _before(description)
    delimiter = description.delimiter if isinstance(description, MultipleChoice | ExactMatch) else ""
    found, seen = [], set[str]()
    for file, place, row in islice(_rows(description.items), limit):
        name = partial("{} {}".format, file, place)
        asked = _question(description, row, name)
        number = f"{file.name} {place}" if description.id is None else _plain(row, description.id, name)
        if number in seen:
            raise _error(name, f"an item `{number}` came before", {"column": description.id, "value": number})
        seen.add(number)
        whole = {"shown": asked.context, "context": before + asked.context, "id": number}
        group = None if description.group is None else _plain(row, description.group, name)
        options = tuple(delimiter + label for label in asked.labels)
        found.append(asked._replace(group=group, options=options, **whole))
    if not found:
        why, fix = "There is nothing to ask.", "Check the path in the description."
        raise MissingError(f"{description.items} has no items", why=why, fix=fix)
    return found


def _rows(path: str) -> Iterator[tuple[Path, str, Row]]:
    return FileSource(files_of(Path(path))).places()


# --- the kinds of questions ------------------------------------------------------------------------------------------

_template = cache(Template)


def _question(description: Description, row: Row, name: Name) -> Question:
    """An item as the description makes it, before examples are put before it."""

    def filled(field: str) -> str:
        return _template(f"{field} of {description.name}", getattr(description, field))(row, name)

    match description:
        case MultipleChoice():
            choices = _choices(description, row, name)
            return Question(filled("context"), choices, _gold(row, description.target, choices, name))
        case MinimalPairs():
            return Question("", _not_empty((filled("good"), filled("bad")), name))
        case ExactMatch(target=target) if "{" in target or "}" in target:
            return Question(filled("context"), answers=(filled("target"),))
        case ExactMatch(target=target):
            context, value = filled("context"), value_in(row, target, name)
            values = value if isinstance(value, list) else [value]
            if values and all(isinstance(one, str | int | float) and not isinstance(one, bool) for one in values):
                return Question(context, answers=tuple(map(str, values)))
            found = {f"column `{target}`": f"{value!r:.60}", "needed": "a text or a number"}
            raise _error(name, "the target is no answer", found)
        case LastWord():
            text = filled("text").rstrip()
            if (match := re.fullmatch(r"(.*\S)(\s+\S+)", text, re.DOTALL)) is not None:
                return Question(match[1], (match[2],))
            raise _error(name, "there is no last word after others", {"text": f"{text!r:.60}", "needed": "two words"})


def _choices(description: MultipleChoice, row: Row, name: Name) -> tuple[str, ...]:
    column = description.choices
    if isinstance(column, str):
        choices = value_in(row, column, name)
        texts = isinstance(choices, list) and all(isinstance(choice, str) for choice in choices)
        if not texts or len(choices) < 2:
            given = f"a list of {len(choices)}" if texts else f"{choices!r:.60}"
            values = {f"column `{column}`": given, "needed": "two texts or more"}
            raise _error(name, "there is nothing to choose", values)
    else:
        label = f"choices of {description.name}"
        choices = [_template(label, text)(row, name) if "{" in text or "}" in text else text for text in column]
    options = _not_empty(choices, name)
    for i, choice in enumerate(options):
        if choice in options[:i]:
            both = f"{options.index(choice)} and {i}"
            raise _error(name, "two choices are the same", {"choices": both, "text": f"{choice!r:.60}"})
    return options


def _not_empty(choices: Sequence[str], name: Name) -> tuple[str, ...]:
    for i, choice in enumerate(choices):
        if not choice.strip():
            raise _error(name, "a choice is empty", {"choice": i, "text": repr(choice)})
    return tuple(choices)


def _gold(row: Row, column: str, choices: Sequence[str], name: Name) -> int:
    value = value_in(row, column, name)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(choices):
        return value
    if isinstance(value, str) and value in choices:
        return choices.index(value)
    known = f"0 to {len(choices) - 1}, or {', '.join(choices)}"[:200]
    raise _error(name, "the target is none of the choices", {f"column `{column}`": f"{value!r:.60}", "choices": known})


# --- examples, columns, errors ----------------------------------------------------------------------------------------


def _before(description: Description) -> str:
    """The instruction and examples that stand before every question."""
    if not isinstance(description, MultipleChoice | ExactMatch):
        return ""
    text, shots = description.instruction, description.shots
    given, examples = description.examples, list[tuple[str, Row]]()
    if isinstance(given, str) and shots:
        examples = [(f"{file} {place}", row) for file, place, row in islice(_rows(given), shots)]
    elif shots and not isinstance(given, str):
        examples = [(f"example {i} of {description.name}", row) for i, row in enumerate((given or ())[:shots], 1)]
    if len(examples) < shots:
        raise ConfigError(
            f"the task {description.name} has too few examples",
            {"shots": shots, "examples": len(examples)},
            why="As many stand before each question as shots says.",
            fix="Set `examples` in the description to a list or a file with enough of them, or lower shots.",
        )
    for place, row in examples:
        one = _question(description, row, partial(str, place))
        answer = one.labels[one.gold] if one.labels else one.answers[0]
        text += one.context + description.delimiter + answer + description.separator
    return text


def _plain(row: Row, column: str, name: Name) -> str:
    value = value_in(row, column, name)
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else text_in(row, column, name)


def _error(name: Name, what: str, values: dict[str, Any]) -> DataError:
    return DataError(
        f"{name()}: {what}",
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


class LocalBenchmark(NamedTuple):
    """A benchmark that a description file describes."""

    description: Description
    questions: tuple[Question, ...]
    files: tuple[str, ...]
    """The files that it was read from."""

    @classmethod
    def open(cls, config: LocalTask) -> "LocalBenchmark":
        """Reads description and items. Raises what ``read_description`` and ``questions`` do."""
        description = read_description(config)
        examples = getattr(description, "examples", None)
        files = (config.path, description.items, *([examples] if isinstance(examples, str) else []))
        return cls(description, tuple(questions(description, config.limit)), files)

    @property
    def name(self) -> str:
        return self.description.name

    @property
    def metric(self) -> str:
        """The metric that is shown first."""
        return getattr(self.description, "metric", "exact_match" if isinstance(self.description, ExactMatch) else "acc")

    @property
    def chance(self) -> float | None:
        """The score of blind guessing, where it is known: the mean of one over the number of options."""
        if isinstance(self.description, MultipleChoice | MinimalPairs):
            return float(np.mean([1 / len(question.options) for question in self.questions]))
        return None

    def ask(self, model: EvalModel, report: Report) -> list[ModelReply]:
        """The reply of a model to every question.

        Raises:
            StillroomError: it cannot be asked such questions.
        """
        pairs = [(question.context, option) for question in self.questions for option in question.options]
        total = len(pairs) or len(self.questions)

        def done(number: int) -> None:
            report("task", {"task": self.name, "model": model.name, "done": number, "total": total})

        replies = []
        if isinstance(one := self.description, ExactMatch):
            prompts = [question.context for question in self.questions]
            written = answers(model, prompts, until=one.until, max_tokens=one.max_tokens, done=done)
            for question, (text, num_cut) in zip(self.questions, written, strict=True):
                prediction = apply(one.filters, text)
                right = prediction in [apply(one.target_filters, answer) for answer in question.answers]
                replies.append(ModelReply(prediction, (), {"exact_match": float(right)}, num_cut))
        else:
            owners = [question.id for question in self.questions for _ in question.options]
            scored = iter(likelihoods(model, pairs, owners.__getitem__, done))
            replies += [self._reply(question, [next(scored) for _ in question.options]) for question in self.questions]
        if num_cut := sum(one.num_cut > 0 for one in replies):
            text = f"{self.name}: {num_cut} of {len(replies)} questions were too long for {model.name} and cut"
            report("note", {"text": f"{text} at their beginning"})
        return replies

    def _reply(self, question: Question, options: Sequence[Likelihood]) -> ModelReply:  # kept: the top option
        """Chooses the top option by each measure; of equals the first, as in lm-eval."""
        sums, first = np.array([one.log_likelihood for one in options]), options[0]
        if isinstance(self.description, LastWord):
            metrics = {"acc": float(first.greedy), LOG_LIKELIHOOD: first.log_likelihood}
            prediction = question.labels[0] if first.greedy else ""
        else:
            lengths = {"acc": np.ones(len(options))}
            if isinstance(self.description, MultipleChoice):
                lengths["acc_norm"] = np.array([len(label) for label in question.labels])
                lengths["acc_bytes"] = np.array([len(label.encode()) for label in question.labels])
                lengths["acc_tokens"] = np.array([one.num_tokens for one in options])
            chosen = {name: int(np.argmax(sums / length)) for name, length in lengths.items()}
            metrics = {name: float(choice == question.gold) for name, choice in chosen.items()}
            prediction = question.labels[chosen[self.metric]]
        return ModelReply(prediction, tuple(sums.tolist()), metrics, max(one.num_cut for one in options))

    def results(
        self, replies: Mapping[str, list[ModelReply]], failed: str | None, out: Path, seed: int
    ) -> Sequence[TaskResult]:
        """One result, whose items are written; ``failed`` says why the models without replies have none."""
        main, chance, file = self.metric, self.chance, f"{FOLDER}/{self.name}.jsonl"
        if replies:
            write_items(out / file, (self._item(i, replies) for i in range(len(self.questions))))
        values = {name: {key: [one.metrics[key] for one in all_of] for key in all_of[0].metrics}
                  for name, all_of in replies.items()}  # fmt: skip
        groups = [question.group for question in self.questions]
        scores = {name: results.scores(by_metric, groups, main) for name, by_metric in values.items()}
        settings = self.description.model_dump(mode="json", exclude={"items", "examples"})
        asked = [question._asdict() for question in self.questions]  # with all that stands before each
        result = TaskResult(
            name=self.name,
            source="local",
            version=self.description.version,
            shots=getattr(self.description, "shots", 0),
            num_items=len(self.questions),
            metric=main,
            scores=scores,
            normalised={}
            if chance is None
            else {name: results.normalize(one[main], chance) for name, one in scores.items()},
            differences=results.differences(self.name, main, {name: one[main] for name, one in values.items()}, seed),
            items=file if replies else None,
            fingerprint=hashlib.sha256(json.dumps([settings, asked], sort_keys=True).encode()).hexdigest(),
            failed=failed,
        )
        return [result]

    def _item(self, i: int, replies: Mapping[str, Sequence[ModelReply]]) -> Item:
        answers = {}
        for name, all_of in replies.items():
            prediction, scores, metrics, num_cut = all_of[i]
            correct = metrics[self.metric]
            answers[name] = ModelAnswer(prediction=prediction, scores=scores, correct=correct, num_cut=num_cut)
        one = self.questions[i]
        gold = one.labels[one.gold] if one.labels else " | ".join(one.answers)
        parts: dict[str, Any] = {"question": one.shown, "options": one.labels, "gold": gold}
        return Item(id=one.id, group=one.group, models=answers, **parts)


LONGEST_MATCH_S = 10.0
"""The time that a regular expression of a task may take for one answer."""


def apply(filters: Sequence[Filter], text: str) -> str:
    """Applies filters to a text, in turn. Raises DataError where a regular expression does not end."""
    for one in filters:
        if one == "strip":
            text = text.strip()
        elif one == "lower":
            text = text.lower()
        elif one == "last_number":
            found = NUMBER.findall(text)
            text = _plain_number(found[-1]) if found else ""
        else:
            try:
                matches = list(regex.finditer(one.pattern, text, timeout=LONGEST_MATCH_S))
            except TimeoutError:
                raise DataError(
                    "a filter's regular expression takes too long",
                    {"pattern": f"{one.pattern:.100}", "tried for": f"{LONGEST_MATCH_S:g} s", "on": f"{text!r:.60}"},
                    why="It tries more ways than there is time for, as where two of its parts can match the same text.",
                    fix="Write it so that only one part can match each text: ^(a|aa)+$ as ^a+$, say.",
                ) from None
            text = (matches[-1][1 if matches[-1].re.groups else 0] or "") if matches else ""
    return text


def _plain_number(text: str) -> str:  # kept: a filter
    """1,234.50 as 1234.5 and .5 as 0.5, so that equal numbers are equal texts."""
    sign, digits = ("-" if text.startswith("-") else ""), text.removeprefix("-").replace(",", "")
    whole, _, part = digits.partition(".")
    whole, part = whole.lstrip("0") or "0", part.rstrip("0")
    number = f"{whole}.{part}" if part else whole
    return number if number == "0" else sign + number

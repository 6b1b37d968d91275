"""Benchmarks: a task that is put to each model by itself; the replies of all of them become results."""

import gc
import hashlib
import json
import traceback
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from stillroom.errors import StillroomError
from stillroom.evaluate.results import TaskResult
from stillroom.evaluate.tasks import items
from stillroom.evaluate.tasks.config import (
    AnyTask,
    Description,
    ExactMatch,
    HarnessTask,
    LocalTask,
    MultipleChoice,
    read_description,
)
from stillroom.evaluate.tasks.harness import HarnessBenchmark
from stillroom.evaluate.tasks.items import FOLDER, Item, ModelAnswer, write_items
from stillroom.evaluate.tasks.lm import EvalModel, Report
from stillroom.evaluate.tasks.local import ModelReply, Question, chance, metric, questions
from stillroom.evaluate.tasks.local import ask as ask_questions

FAILURES = "failures"
"""The folder of the tracebacks of errors that nobody foresaw."""


class Benchmark(Protocol):
    """A task that is put to every model."""

    @property
    def name(self) -> str: ...

    @property
    def files(self) -> tuple[str, ...]:
        """The files that it is read from, as far as they are known."""
        ...

    def ask(self, model: EvalModel, report: Report) -> Any:
        """The replies of a model, as ``results`` takes them."""
        ...

    def results(self, replies: Mapping[str, Any], failed: str | None, out: Path, seed: int) -> Sequence[TaskResult]:
        """The results of the replies by model, with differences; writes the items into ``out``."""
        ...


class Failure(NamedTuple):
    """The reason why a model has no replies."""

    reason: str


class LocalBenchmark(NamedTuple):
    """A benchmark that a description file describes."""

    description: Description
    questions: tuple[Question, ...]
    files: tuple[str, ...]
    """The files that it was read from."""

    @classmethod
    def open(cls, config: LocalTask) -> "LocalBenchmark":
        """Reads description and items.

        Raises:
            ConfigError: the description cannot be meant.
            DataError: an item cannot be asked, with file, line and column.
            MissingError: a file is not there.
        """
        description = read_description(config)
        examples = getattr(description, "examples", None)
        files = (config.path, description.items, *([examples] if isinstance(examples, str) else []))
        return cls(description, tuple(questions(description, config.limit)), files)

    @property
    def name(self) -> str:
        return self.description.name

    def ask(self, model: EvalModel, report: Report) -> list[ModelReply]:
        """The reply of a model to every question.

        Raises:
            StillroomError: it cannot be asked such questions.
        """
        options = sum(len(question.options) for question in self.questions)
        total = len(self.questions) if isinstance(self.description, ExactMatch) else options

        def done(number: int) -> None:
            report("task", {"task": self.name, "model": model.name, "done": number, "total": total})

        replies = ask_questions(self.description, self.questions, model, done)
        if num_cut := sum(one.num_cut > 0 for one in replies):
            text = f"{self.name}: {num_cut} of {len(replies)} questions were too long for {model.name} and cut"
            report("note", {"text": f"{text} at their beginning"})
        return replies

    def results(
        self, replies: Mapping[str, list[ModelReply]], failed: str | None, out: Path, seed: int
    ) -> Sequence[TaskResult]:
        """One result, whose items are written; ``failed`` says why the models without replies have none."""
        main = metric(self.description)
        if replies:
            write_items(out / FOLDER / f"{self.name}.jsonl", self._items(replies, main))
        values = {name: {key: [one.metrics[key] for one in all_of] for key in all_of[0].metrics}
                  for name, all_of in replies.items()}  # fmt: skip
        groups = [question.group for question in self.questions]
        scores = {name: items.scores(by_metric, groups, main) for name, by_metric in values.items()}
        guess = chance(self.description, self.questions)
        normalize = partial(items.normalize, chance=guess) if guess is not None else None
        settings = self.description.model_dump(mode="json", exclude={"items", "examples"})
        asked = [question._asdict() for question in self.questions]  # with all that stands before each
        result = TaskResult(
            name=self.name,
            source="local",
            version=self.description.version,
            shots=self.description.shots if isinstance(self.description, MultipleChoice | ExactMatch) else 0,
            num_items=len(self.questions),
            metric=main,
            scores=scores,
            normalised={} if normalize is None else {name: normalize(one[main]) for name, one in scores.items()},
            differences=items.differences(self.name, main, {name: one[main] for name, one in values.items()}, seed),
            items=f"{FOLDER}/{self.name}.jsonl" if replies else None,
            fingerprint=hashlib.sha256(json.dumps([settings, asked], sort_keys=True).encode()).hexdigest(),
            failed=failed,
        )
        return [result]

    def _items(self, replies: Mapping[str, Sequence[ModelReply]], main: str) -> list[Item]:
        found = []
        for i, question in enumerate(self.questions):
            answers = {}
            for name, all_of in replies.items():
                prediction, scores, metrics, num_cut = all_of[i]
                correct = metrics[main]
                answers[name] = ModelAnswer(prediction=prediction, scores=scores, correct=correct, num_cut=num_cut)
            gold = question.labels[question.gold] if question.labels else " | ".join(question.answers)
            found.append(
                Item(
                    id=question.id,
                    group=question.group,
                    question=question.shown,
                    options=question.labels,
                    gold=gold,
                    models=answers,
                )
            )
        return found


def open_benchmark(config: AnyTask) -> Benchmark:
    """Reads all that a task needs and asks no model.

    Raises:
        ConfigError: the description cannot be meant; lm-eval knows no such task.
        DataError: an item cannot be asked, with file, line and column.
        MissingError: a file is not there, or lm-eval is not installed.
    """
    return HarnessBenchmark.open(config) if isinstance(config, HarnessTask) else LocalBenchmark.open(config)


def ask(benchmark: Benchmark, model: EvalModel, out: Path, report: Report = lambda *_: None) -> Any | Failure:
    """The replies of a model to a benchmark, or why it has none: whatever goes wrong, the others are still asked.

    An error that nobody foresaw leaves its traceback in ``out``/failures/NAME-MODEL.txt.
    """
    try:
        return benchmark.ask(model, report)
    except StillroomError as error:
        return Failure(f"{error.what}. {error.why}")
    except torch.OutOfMemoryError as error:
        reason = f"the device has too little memory for it ({str(error).split('. ')[0][:160]})"
    except Exception as error:
        path = out / FAILURES / f"{benchmark.name}-{model.name}.txt"
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]} (traceback in {path})"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(traceback.format_exc())
    gc.collect()
    report("note", {"text": f"{benchmark.name}: {model.name} failed: {reason}"})
    return Failure(reason)


def results(benchmark: Benchmark, answers: Mapping[str, Any | Failure], out: Path, seed: int) -> Sequence[TaskResult]:
    """The results of a benchmark, and the file of its items in ``out``/items.

    Args:
        answers: the result of ``ask`` by model. ``failed`` of the results says which are failures.
        seed: the seed of the bootstrap.
    """
    replies = {name: answer for name, answer in answers.items() if not isinstance(answer, Failure)}
    failures = {name: answer.reason for name, answer in answers.items() if isinstance(answer, Failure)}
    alike = not replies and len(set(failures.values())) == 1
    named = [reason if alike else f"{name}: {reason}" for name, reason in failures.items()]
    return benchmark.results(replies, "; ".join(dict.fromkeys(named)) or None, out, seed)

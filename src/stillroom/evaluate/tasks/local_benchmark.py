"""A local benchmark: its questions, and what every model said of them as a result with a file of items."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from stillroom.evaluate.results import TaskResult
from stillroom.evaluate.tasks import summary
from stillroom.evaluate.tasks.config import LocalTask
from stillroom.evaluate.tasks.description import Description, ExactMatch, MultipleChoice, read_description
from stillroom.evaluate.tasks.items import FOLDER, Item, ModelAnswer, write_items
from stillroom.evaluate.tasks.lm import EvalModel, Report
from stillroom.evaluate.tasks.local import ModelReply, ask, chance, metric
from stillroom.evaluate.tasks.questions import Question, questions


class LocalBenchmark(NamedTuple):
    """A benchmark that a description file describes."""

    description: Description
    questions: tuple[Question, ...]
    files: tuple[str, ...]
    """What it was read from."""

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
        """What a model says of every question.

        Raises:
            StillroomError: it cannot be asked such questions.
        """
        options = sum(len(question.options) for question in self.questions)
        total = len(self.questions) if isinstance(self.description, ExactMatch) else options

        def done(number: int) -> None:
            report("task", {"task": self.name, "model": model.name, "done": number, "total": total})

        said = ask(self.description, self.questions, model, done)
        if num_cut := sum(one.num_cut > 0 for one in said):
            text = f"{self.name}: {num_cut} of {len(said)} questions were too long for {model.name} and cut"
            report("note", {"text": f"{text} at their beginning"})
        return said

    def results(
        self, said: Mapping[str, list[ModelReply]], failed: str | None, out: Path, seed: int
    ) -> Sequence[TaskResult]:
        """One result, whose items are written; ``failed`` says why models that are not in ``said`` are not."""
        main = metric(self.description)
        if said:
            write_items(out / FOLDER / f"{self.name}.jsonl", self._items(said, main))
        values = {name: {key: [one.metrics[key] for one in all_of] for key in all_of[0].metrics}
                  for name, all_of in said.items()}  # fmt: skip
        groups = [question.group for question in self.questions]
        scores = {name: summary.scores(by_metric, groups, main) for name, by_metric in values.items()}
        guess = chance(self.description, self.questions)
        normalise = partial(summary.normalise, chance=guess) if guess is not None else None
        result = TaskResult(
            name=self.name,
            source="local",
            version=self.description.version,
            shots=self.description.shots if isinstance(self.description, MultipleChoice | ExactMatch) else 0,
            num_items=len(self.questions),
            metric=main,
            scores=scores,
            normalised={} if normalise is None else {name: normalise(one[main]) for name, one in scores.items()},
            differences=summary.differences(self.name, main, {name: one[main] for name, one in values.items()}, seed),
            items=f"{FOLDER}/{self.name}.jsonl" if said else None,
            fingerprint=self._fingerprint(),
            failed=failed,
        )
        return [result]

    def _fingerprint(self) -> str:
        """SHA-256 of the description without its paths, and of every question with all that stands before it."""
        settings = self.description.model_dump(mode="json", exclude={"items", "examples"})
        asked = [question._asdict() for question in self.questions]
        return hashlib.sha256(json.dumps([settings, asked], sort_keys=True).encode()).hexdigest()

    def _items(self, said: Mapping[str, Sequence[ModelReply]], main: str) -> list[Item]:
        found = []
        for i, question in enumerate(self.questions):
            answers = {
                name: ModelAnswer(
                    prediction=all_of[i].prediction,
                    scores=all_of[i].scores,
                    correct=all_of[i].metrics[main],
                    num_cut=all_of[i].num_cut,
                )
                for name, all_of in said.items()
            }
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

"""Running a task: every model is asked the same, and what came out is a result with a file of items."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from stillroom.errors import StillroomError
from stillroom.evaluate.results import TaskResult
from stillroom.evaluate.tasks import harness, summary
from stillroom.evaluate.tasks.asking import Evaluated
from stillroom.evaluate.tasks.config import AnyTask, HarnessTask, LocalTask
from stillroom.evaluate.tasks.description import Description, ExactMatch, MultipleChoice, read_description
from stillroom.evaluate.tasks.items import FOLDER, Item, ModelAnswer, write_items
from stillroom.evaluate.tasks.local import Said, ask, chance, metric
from stillroom.evaluate.tasks.questions import Question, questions

__all__ = ["Evaluated", "check_task", "run_task"]

Report = Callable[[str, Mapping[str, Any]], None]


def check_task(config: AnyTask) -> None:
    """Reads all that a task needs and asks no model.

    Raises:
        ConfigError: the description cannot be meant; lm-eval knows no such task.
        DataError: an item cannot be asked, with file, line and column.
        MissingError: a file is not there, or lm-eval is not installed.
    """
    if isinstance(config, HarnessTask):
        harness.check(config)
    else:
        questions(read_description(config), config.limit)


def run_task(
    config: AnyTask,
    models: Sequence[Evaluated],
    out: Path,
    *,
    seed: int,
    report: Report = lambda *_: None,
) -> TaskResult:
    """Asks every model and writes ``out``/items/NAME.jsonl.

    Where a model cannot be asked, or a task of lm-eval cannot be had, ``failed`` of the result says why; what the other
    models said is there.

    Args:
        out: the folder of the evaluation.
        seed: of the bootstrap.
        report: is told of the answers so far: "task" with task, model, done and total; "note" with text.

    Raises:
        StillroomError: as `check_task`.
    """
    if isinstance(config, HarnessTask):
        return harness.run(config, models, out, seed=seed, report=report)
    return _run_local(config, models, out, seed, report)


def _run_local(config: LocalTask, models: Sequence[Evaluated], out: Path, seed: int, report: Report) -> TaskResult:
    description = read_description(config)
    asked = questions(description, config.limit)
    said: dict[str, list[Said]] = {}
    failed = []
    total = len(asked) if isinstance(description, ExactMatch) else sum(len(question.options) for question in asked)
    for model in models:
        done = partial(_report_done, report, description.name, model.name, total)
        try:
            said[model.name] = ask(description, asked, model, done)
        except StillroomError as error:
            failed.append(f"{model.name}: {error.what}. {error.why}")
            continue
        if num_cut := sum(one.num_cut > 0 for one in said[model.name]):
            text = f"{description.name}: {num_cut} of {len(asked)} questions were too long for {model.name} and cut"
            report("note", {"text": f"{text} at their beginning"})
    if said:
        write_items(out / FOLDER / f"{description.name}.jsonl", _items(asked, said, metric(description)))
    return _result(description, asked, said, seed, "; ".join(failed) or None)


def _report_done(report: Report, task: str, model: str, total: int, done: int) -> None:
    report("task", {"task": task, "model": model, "done": done, "total": total})


def _items(asked: Sequence[Question], said: Mapping[str, Sequence[Said]], main: str) -> list[Item]:
    found = []
    for i, question in enumerate(asked):
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


def _result(
    description: Description,
    asked: Sequence[Question],
    said: Mapping[str, Sequence[Said]],
    seed: int,
    failed: str | None,
) -> TaskResult:
    main = metric(description)
    groups = [question.group for question in asked]
    values = {
        name: {key: [one.metrics[key] for one in all_of] for key in all_of[0].metrics} for name, all_of in said.items()
    }
    scores = {name: summary.scores(by_metric, groups, main) for name, by_metric in values.items()}
    guess = chance(description, asked)
    return TaskResult(
        name=description.name,
        source="local",
        version=description.version,
        shots=description.shots if isinstance(description, MultipleChoice | ExactMatch) else 0,
        num_items=len(asked),
        metric=main,
        scores=scores,
        normalised={} if guess is None else {n: summary.normalise(one[main], guess) for n, one in scores.items()},
        differences=summary.differences(description.name, main, {n: one[main] for n, one in values.items()}, seed),
        items=f"{FOLDER}/{description.name}.jsonl" if said else None,
        failed=failed,
    )

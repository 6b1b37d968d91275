"""A benchmark put to models in one call, for tests."""

from collections.abc import Sequence
from pathlib import Path

from stillroom.evaluate.config import AnyTask
from stillroom.evaluate.plan import open_benchmark
from stillroom.evaluate.results import TaskResult
from stillroom.evaluate.run import ask, task_results
from stillroom.evaluate.tasks.lm import EvalModel
from stillroom.verbs import Report


def run_tasks(
    config: AnyTask, models: Sequence[EvalModel], out: Path, *, seed: int, report: Report = lambda *_: None
) -> list[TaskResult]:
    """All results of a task or group."""
    benchmark = open_benchmark(config)
    answers = {model.name: ask(benchmark, model, out, report) for model in models}
    return list(task_results(benchmark, answers, out, seed))


def run_task(
    config: AnyTask, models: Sequence[EvalModel], out: Path, *, seed: int, report: Report = lambda *_: None
) -> TaskResult:
    """The one result of a task."""
    (result,) = run_tasks(config, models, out, seed=seed, report=report)
    return result

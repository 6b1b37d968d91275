"""Running benchmarks: each model is asked by itself, and what all of them said becomes results."""

import gc
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from stillroom.errors import StillroomError
from stillroom.evaluate.results import TaskResult
from stillroom.evaluate.tasks.config import AnyTask, HarnessTask
from stillroom.evaluate.tasks.harness import HarnessBenchmark
from stillroom.evaluate.tasks.lm import EvalModel, Report
from stillroom.evaluate.tasks.local_benchmark import LocalBenchmark

FAILURES = "failures"
"""The folder of the tracebacks of what nobody foresaw."""


class Benchmark(Protocol):
    """What is asked of every model."""

    @property
    def name(self) -> str: ...

    @property
    def files(self) -> tuple[str, ...]:
        """What it is read from, of files that are known."""
        ...

    def ask(self, model: EvalModel, report: Report) -> Any:
        """What a model says, as ``results`` takes it."""
        ...

    def results(self, said: Mapping[str, Any], failed: str | None, out: Path, seed: int) -> Sequence[TaskResult]:
        """What all of them said, by model, with differences; writes the items into ``out``."""
        ...


class Failure(NamedTuple):
    """Why a model has no answers."""

    reason: str


def open_benchmark(config: AnyTask) -> Benchmark:
    """Reads all that a task needs and asks no model.

    Raises:
        ConfigError: the description cannot be meant; lm-eval knows no such task.
        DataError: an item cannot be asked, with file, line and column.
        MissingError: a file is not there, or lm-eval is not installed.
    """
    return HarnessBenchmark.open(config) if isinstance(config, HarnessTask) else LocalBenchmark.open(config)


def ask(benchmark: Benchmark, model: EvalModel, out: Path, report: Report = lambda *_: None) -> Any | Failure:
    """What a model says of a benchmark, or why it says nothing: whatever goes wrong, the others are still asked.

    What nobody foresaw leaves its traceback in ``out``/failures/NAME-MODEL.txt.
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
        answers: by model, what ``ask`` gave. ``failed`` of the results says which are failures.
        seed: of the bootstrap.
    """
    said = {name: answer for name, answer in answers.items() if not isinstance(answer, Failure)}
    failures = {name: answer.reason for name, answer in answers.items() if isinstance(answer, Failure)}
    alike = not said and len(set(failures.values())) == 1
    named = [reason if alike else f"{name}: {reason}" for name, reason in failures.items()]
    return benchmark.results(said, "; ".join(dict.fromkeys(named)) or None, out, seed)

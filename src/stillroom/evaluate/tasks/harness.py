"""lm-eval's tasks, through its Python API: its prompts, its metrics, its filters; our engine for likelihoods.

The engine takes the tokens that lm-eval made and gives the numbers that its own would, without a tensor of all logits
and with a batch size that it finds by itself.
"""

import contextlib
import copy
import difflib
import importlib
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from stillroom.errors import ConfigError, DataError, StillroomError, require
from stillroom.evaluate.config import HarnessTask
from stillroom.evaluate.results import TaskResult
from stillroom.evaluate.tasks.harness_results import HarnessOutput, harness_results, no_score
from stillroom.evaluate.tasks.likelihood import Request, log_likelihoods
from stillroom.evaluate.tasks.lm import EvalModel, served_model
from stillroom.verbs import Report

CPU_BATCH = 8
"""Prompts that are answered at a time on a CPU; on other devices lm-eval finds the number."""


class HarnessBenchmark(NamedTuple):
    """A task or group of lm-eval."""

    config: HarnessTask
    files: tuple[str, ...]
    """The file of a task in lm-eval's own form."""

    @classmethod
    def open(cls, config: HarnessTask) -> "HarnessBenchmark":
        """Looks the task up in lm-eval.

        Raises:
            MissingError: lm-eval is not installed.
            ConfigError: it knows no such task.
        """
        require("lm_eval", "eval", f"the task {config.task}")
        if Path(config.task).is_file():
            return cls(config, (config.task,))
        known = _manager(whole=True).all_tasks
        if config.task in known:
            return cls(config, ())
        near = difflib.get_close_matches(config.task, known, n=1)
        raise ConfigError(
            f"lm-eval knows no task `{config.task}`",
            {"asked for": config.task, **({"did you mean": near[0]} if near else {"known": f"{len(known)} tasks"})},
            why="It has neither a task nor a group nor a tag of that name.",
            fix="`lm_eval ls tasks` lists them; a description of your own is given by its path, ending in .yaml.",
        )

    @property
    def name(self) -> str:
        return self.config.name or (Path(self.config.task).stem if self.files else self.config.task)

    def ask(self, model: EvalModel, report: Report) -> HarnessOutput:
        """The output of lm-eval for a model.

        Raises:
            StillroomError: its data or the model cannot be had, or something in it fails.
        """
        with _its_output() as stderr:

            def tell(event: str, values: Mapping[str, Any]) -> None:
                with contextlib.redirect_stderr(stderr):
                    report(event, values)

            if (reason := _why_not(self.config.task)) is not None:
                raise _stopped(self.name, reason)
            tell("note", {"text": f"{self.name}: asking {model.name} through lm-eval"})
            try:
                return _evaluate(self.config, model, self.name, tell)
            except StillroomError:
                raise
            except Exception as error:  # whatever the hub or a task's own code raises
                raise _stopped(self.name, in_words(error)) from error

    def results(
        self, replies: Mapping[str, HarnessOutput], failed: str | None, out: Path, seed: int
    ) -> Sequence[TaskResult]:
        """See `harness_results`."""
        try:
            if replies:
                key = self.name if self.files else self.config.task
                return harness_results(key, self.name, replies, failed, out, seed)
        except Exception as error:  # lm-eval's output may have any form; the other benchmarks keep their results
            failed = f"what lm-eval gave could not be read: {in_words(error)}"
        return [no_score(self.name, failed, self.config.shots or 0)]


@cache
def _manager(*, whole: bool) -> Any:
    """lm-eval's index of its tasks, which takes some seconds to make; an empty one is enough for a file."""
    return _lm_eval("tasks").TaskManager(include_defaults=whole)


@cache
def _why_not(task: str) -> str | None:  # kept: cached, since a far hub takes long to say no
    """The reason why the data of a task cannot be had; None where they can."""
    try:
        _manager(whole=not Path(task).is_file()).load([task])
    except Exception as error:  # whatever the hub or a task's own code raises
        return in_words(error)
    return None


def in_words(error: Exception) -> str:
    """An error that nobody foresaw, on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _stopped(name: str, reason: str) -> DataError:
    return DataError(
        f"lm-eval stopped at {name}: {reason}",
        why="Its data cannot be had here, or something in it does not go with the model.",
        fix="Check the network and access to the data set, or run lm-eval by itself.",
    )


def _lm_eval(module: str) -> Any:
    return importlib.import_module(f"lm_eval.{module}")


def _evaluate(config: HarnessTask, model: EvalModel, name: str, report: Report) -> HarnessOutput:
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if model.model is None:
        root = str(model.url).rstrip("/").removesuffix("/v1")
        tokenizer = None if model.tokenizer is None else model.tokenizer.name_or_path
        own = {"tokenizer": tokenizer} if tokenizer else {"tokenizer_backend": None, "tokenized_requests": False}
        address = {"model": served_model(model), "base_url": f"{root}/v1/completions", "num_concurrent": 8, **own}
        asked: dict[str, Any] = {"model": "local-completions", "model_args": address}
    else:
        asked = {"model": _engine(model, name, report)}
    found = _lm_eval("evaluator").simple_evaluate(
        **asked,
        tasks=[config.task],
        num_fewshot=config.shots,
        limit=config.limit,
        task_manager=_manager(whole=not Path(config.task).is_file()),
        log_samples=True,
        bootstrap_iters=1000,
    )
    assert found is not None
    for task, shots in found["n-shot"].items():
        if config.shots is not None and task in found["samples"] and shots != config.shots:
            report("note", {"text": f"{task} takes {shots} examples, not {config.shots}: lm-eval does not change it"})
    return dict(found)


@contextlib.contextmanager
def _its_output() -> Iterator[Any]:
    """Sends what lm-eval prints to stderr, or nowhere where that is no terminal: its bars would fill a log file."""
    stderr = sys.stderr
    with contextlib.ExitStack() as stack:
        sink = stderr if stderr.isatty() else stack.enter_context(Path(os.devnull).open("w"))
        stack.enter_context(contextlib.redirect_stdout(sink))
        stack.enter_context(contextlib.redirect_stderr(sink))
        yield stderr


def _engine(lm: EvalModel, name: str, report: Report) -> Any:
    """lm-eval's own model class, whose likelihoods are computed by our engine."""
    HFLM: Any = _lm_eval("models.huggingface").HFLM
    model = lm.model
    assert model is not None

    class Engine(HFLM):
        def _loglikelihood_tokens(self, requests: Any, *_: Any, **__: Any) -> list[tuple[float, bool]]:
            pairs = [Request(context, continuation) for _, context, continuation in requests]

            def done(number: int) -> None:
                report("task", {"task": name, "model": lm.name, "done": number, "total": len(pairs)})

            scored = log_likelihoods(model, pairs, limit=self.max_length, done=done)
            if num_cut := sum(one.num_cut > 0 for one in scored):
                text = f"{name}: {num_cut} of {len(scored)} texts were too long for {lm.name} and cut"
                report("note", {"text": f"{text} at their beginning"})
            return [(one.log_likelihood, one.greedy) for one in scored]

    tokenizer = copy.deepcopy(lm.tokenizer)  # lm-eval gives it a padding token
    return Engine(pretrained=model, tokenizer=tokenizer, batch_size=CPU_BATCH if model.device.type == "cpu" else "auto")

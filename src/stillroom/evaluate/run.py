"""`stillroom evaluate`: models -> scores and a report."""

import gc
import json
import platform
import shlex
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from os import cpu_count
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from stillroom import models
from stillroom.errors import MissingError
from stillroom.evaluate.config import EvaluateConfig
from stillroom.evaluate.plan import Plan, Reader, make_plan
from stillroom.evaluate.reading import Found, read_all, summarise
from stillroom.evaluate.report import write_report
from stillroom.evaluate.results import ModelFacts, Results, TaskResult
from stillroom.evaluate.sizes import sizes
from stillroom.evaluate.tasks.config import expand
from stillroom.evaluate.tasks.run import Evaluated, run_task
from stillroom.files import write_json
from stillroom.runs import RunFolder, check_place, scrub, versions
from stillroom.tokenizers import fingerprint, load_tokenizer

Report = Callable[[str, Mapping[str, Any]], None]
FREE_TO_CHANGE = ("out", "device", "batch_tokens", "logits_bytes")
"""Settings that change no score, but for rounding."""


def run(
    config: EvaluateConfig, *, resume: bool = False, overwrite: bool = False, report: Report = lambda *_: None
) -> dict[str, Any]:
    """Measures every model, and writes ``out/results.json`` and the reports; returns what run.json says.

    Where a task failed, all others are there, ``status`` is failed, and ``failed_tasks`` says which and why.

    Args:
        resume: where an evaluation in ``out`` was interrupted, or a task failed, make it again from its beginning.
        overwrite: delete what is in ``out`` first.
        report: is told of what is done, for a progress line.

    Raises:
        StillroomError: something that the user can mend.
        KeyboardInterrupt: Ctrl-C; nothing of an evaluation is kept before its end, but for the items of whole tasks.
    """
    check_place(config.out, may_exist=resume or overwrite)
    given, plan = config, make_plan(config)
    settings = plan.config.model_dump(mode="json")
    with RunFolder(config.out, settings, resume=resume, overwrite=overwrite, free=FREE_TO_CHANGE) as folder:
        if folder.done:
            report("note", {"text": f"the evaluation in {folder.path} is done already"})
            return folder.record
        if folder.resumed:
            report("note", {"text": "an evaluation is not resumed in the middle: it starts again from its beginning"})
        folder.update(status="started")
        try:
            results = _evaluate(plan, _command(given), folder.path, report)
            write_json(folder.path / "results.json", results.model_dump(mode="json"))
            reports = _write_report(results, folder.path, report)
        except BaseException as error:
            with suppress(OSError):  # what went wrong is told by the error that is under way
                folder.update(status="interrupted" if isinstance(error, KeyboardInterrupt) else "failed")
            raise
        failed = {task.name: task.failed for task in results.tasks if task.failed}
        folder.update(status="failed" if failed else "done", **_facts(results), failed_tasks=failed, reports=reports)
        return folder.record


def _write_report(results: Results, out: Path, report: Report) -> list[str]:
    """Writes the reports that can be made here; returns their paths."""
    try:
        return [
            str(path) for path in write_report(results, out, {name: Path(run) for name, run in results.runs.items()})
        ]
    except MissingError as error:
        report("note", {"text": f"there is no report.html: {error.what}. {error.fix}"})
        return [str(out / "report.md")]


class _Models:
    """Loads models when they are first asked for. The teacher stays; others do where ``keep`` says so."""

    def __init__(self, plan: Plan, keep: bool) -> None:
        self.config, self.keep = plan.config, keep
        self._kept: dict[str, PreTrainedModel] = {}

    def __call__(self, reader: Reader) -> PreTrainedModel:
        if reader.name in self._kept:
            return self._kept[reader.name]
        gc.collect()  # the model before may be part of a cycle
        asked = reader.config
        model = models.load_model(
            asked.model,
            dtype=getattr(torch, asked.dtype),
            device=self.config.device,
            attention=None if asked.attention == "auto" else asked.attention,
            revision=asked.revision,
            trust_remote_code=asked.trust_remote_code,
        ).requires_grad_(False)
        models.verify(model, reader.name, pack=self.config.data is not None and self.config.data.pack)
        if self.keep or reader.name == self.config.teacher:
            self._kept[reader.name] = model
        return model


def _evaluate(plan: Plan, command: str, out: Path, report: Report) -> Results:
    load = _Models(plan, keep=bool(plan.config.tasks))
    found = None
    if plan.config.data is not None and plan.readers:
        found = summarise(plan, read_all(plan, load, report))
    return Results(
        models=_model_facts(plan, found),
        text=found and found.text,
        metrics=found.metrics if found else {},
        refused=found.refused if found else {},
        differences=found.differences if found else (),
        tasks=tuple(_tasks(plan, load, out, report)),
        breakdowns=found.breakdowns if found else (),
        worst=found.worst if found else {},
        runs=plan.runs,
        command=command,
        versions=versions(),
        machine=_machine(plan.config.device),
    )


def _tasks(plan: Plan, load: _Models, out: Path, report: Report) -> Sequence[TaskResult]:
    readers = {reader.name: reader for reader in plan.readers}
    tasks = expand(plan.config.tasks)
    if not tasks:
        return []
    asked = []
    for name, model in plan.config.models.items():
        if name in readers:
            reader = readers[name]
            asked.append(Evaluated(name, load(reader), reader.tokenizer, None, model.model))
        else:
            tokenizer = None if model.tokenizer is None else load_tokenizer(model.tokenizer)
            asked.append(Evaluated(name, None, tokenizer, model.url, model.model))
    return [run_task(task, asked, out, seed=plan.config.seed, report=report) for task in tasks]


def _model_facts(plan: Plan, found: Found | None) -> tuple[ModelFacts, ...]:
    readers = {reader.name: reader for reader in plan.readers}
    facts = []
    for name, model in plan.config.models.items():
        reader, role = readers.get(name), plan.config.role(name)
        if reader is None:
            where = f"served as {model.model}"
            facts.append(
                ModelFacts(
                    name=name, role=role, model=str(scrub(f"{model.model} at {model.url}")), fingerprint=where,
                    tokenizer=None, num_parameters=None, size_bytes=None,
                )
            )  # fmt: skip
            continue
        size, speed = sizes(model.model, model.revision), found and found.speeds[name]
        facts.append(
            ModelFacts(
                name=name,
                role=role,
                model=model.model,
                fingerprint=reader.fingerprint,
                tokenizer=fingerprint(reader.tokenizer),
                num_parameters=size.num_parameters,
                size_bytes=size.size_bytes,
                tokens_per_s=speed and speed.tokens_per_s,
                peak_memory_bytes=speed and speed.peak_memory_bytes,
            )
        )
    return tuple(facts)


def _command(given: EvaluateConfig) -> str:
    """The command line that repeats an evaluation with the settings that were given."""

    def words(value: Any, key: str) -> list[str]:
        if isinstance(value, dict):
            return [word for name, item in value.items() for word in words(item, f"{key}.{name}" if key else name)]
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        return [shlex.quote(f"{key}={text}")]

    values = scrub(given.model_dump(mode="json", exclude_unset=True))
    return " ".join(["stillroom evaluate", *words(values, "")])


def _machine(device: str) -> dict[str, str | int]:
    found: dict[str, str | int] = {"platform": platform.platform(), "num_cores": cpu_count() or 1, "device": device}
    if device.startswith("cuda"):
        found["device_name"] = torch.cuda.get_device_name(device)
    return found


def _facts(results: Results) -> dict[str, Any]:
    """What run.json tells of the results."""
    return {
        "models": {facts.name: {"fingerprint": facts.fingerprint} for facts in results.models},
        "data": None if results.text is None else results.text.model_dump(),
        "metrics": {
            name: {metric: number.value for metric, number in numbers.items()}
            for name, numbers in results.metrics.items()
        },
        "refused": results.refused,
        "differences": [{"what": d.what, "sentence": d.sentence} for d in results.differences],
        "tasks": {
            task.name: {name: scores[task.metric].value for name, scores in task.scores.items()}
            for task in results.tasks
            if task.failed is None
        },
    }

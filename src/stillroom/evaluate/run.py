"""`stillroom evaluate`: models -> scores and a report."""

import gc
import json
import platform
import shlex
import shutil
from os import cpu_count
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from stillroom.errors import MissingError
from stillroom.evaluate.config import EvaluateConfig
from stillroom.evaluate.held_out import HeldOutEval, TextMetrics, summarise
from stillroom.evaluate.plan import EvaluatePlan, ModelReader, make_plan
from stillroom.evaluate.report import sentences, unit_of, write_report
from stillroom.evaluate.results import ModelFacts, Results
from stillroom.evaluate.sizes import sizes
from stillroom.evaluate.tasks.items import FOLDER
from stillroom.evaluate.tasks.lm import EvalModel
from stillroom.evaluate.tasks.run import FAILURES, ask, results
from stillroom.models import loading
from stillroom.models.hidden_states import verify
from stillroom.recipe import YAMLError, from_yaml
from stillroom.runs import RunFolder, check_place, redact, versions, write_json
from stillroom.tokenizers import fingerprint
from stillroom.verbs import Report, recorded

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
        for old in (FOLDER, FAILURES):  # of an evaluation that is made again
            shutil.rmtree(folder.path / old, ignore_errors=True)
        with recorded(folder):
            found = _evaluate(plan, _command(given), folder.path, report)
            write_json(folder.path / "results.json", found.model_dump(mode="json"))
            reports = _write_report(found, folder.path, report)
        failed = {task.name: task.failed for task in found.tasks if task.failed}
        folder.update(status="failed" if failed else "done", **_facts(found), failed_tasks=failed, reports=reports)
        return folder.record


def _write_report(found: Results, out: Path, report: Report) -> list[str]:
    """Writes the reports that can be made here; returns their paths."""
    try:
        return [str(path) for path in write_report(found, out, {name: Path(run) for name, run in found.runs.items()})]
    except MissingError as error:
        report("note", {"text": f"there is no report.html: {error.what}. {error.fix}"})
        return [str(out / "report.md")]


def _evaluate(plan: EvaluatePlan, command: str, out: Path, report: Report) -> Results:
    """Asks one model after the other, so that no more are held at a time than one and the teacher beside it."""
    reading = HeldOutEval(plan, report) if plan.config.data is not None and plan.readers else None
    said: dict[str, dict[str, Any]] = {benchmark.name: {} for benchmark in plan.benchmarks}
    for reader in plan.readers:
        model = _load(plan, reader)
        if reading is not None:
            reading.read(reader, model)
        _ask(plan, EvalModel(reader.name, model, reader.tokenizer, None, reader.config.model), said, out, report)
        del model
        gc.collect()  # a model may be part of a cycle
    for name, tokenizer in plan.served.items():
        served = plan.config.models[name]
        _ask(plan, EvalModel(name, None, tokenizer, served.url, served.model), said, out, report)
    found = None if reading is None else summarise(plan, reading.reads)
    tasks = []
    for benchmark in plan.benchmarks:
        answers = {name: said[benchmark.name][name] for name in plan.config.models}
        tasks += results(benchmark, answers, out, plan.config.seed)
    return Results(
        models=_model_facts(plan, found),
        text=found and found.text,
        metrics=found.metrics if found else {},
        refused=found.refused if found else {},
        differences=found.differences if found else (),
        tasks=tuple(tasks),
        breakdowns=found.breakdowns if found else (),
        worst=found.worst if found else {},
        runs=plan.runs,
        command=command,
        versions=versions(),
        machine=_machine(plan.config.device),
    )


def _load(plan: EvaluatePlan, reader: ModelReader) -> PreTrainedModel:
    asked = reader.config
    model = loading.load_model(
        asked.model,
        dtype=getattr(torch, asked.dtype),
        device=plan.config.device,
        attention=None if asked.attention == "auto" else asked.attention,
        revision=asked.revision,
        trust_remote_code=asked.trust_remote_code,
    ).requires_grad_(False)
    verify(model, reader.name, pack=plan.config.data is not None and plan.config.data.pack)
    return model


def _ask(plan: EvaluatePlan, model: EvalModel, said: dict[str, dict[str, Any]], out: Path, report: Report) -> None:
    for benchmark in plan.benchmarks:
        said[benchmark.name][model.name] = ask(benchmark, model, out, report)


def _model_facts(plan: EvaluatePlan, found: TextMetrics | None) -> tuple[ModelFacts, ...]:
    readers = {reader.name: reader for reader in plan.readers}
    facts = []
    for name, model in plan.config.models.items():
        reader, role = readers.get(name), plan.config.role(name)
        if reader is None:
            where = f"served as {model.model}"
            facts.append(
                ModelFacts(
                    name=name, role=role, model=str(redact(f"{model.model} at {model.url}")), fingerprint=where,
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
        text = value if isinstance(value, str) and _is_text(value) else json.dumps(value, ensure_ascii=False)
        return [shlex.quote(f"{key}={text}")]

    values = redact(given.model_dump(mode="json", exclude_unset=True))
    return " ".join(["stillroom evaluate", *words(values, "")])


def _is_text(value: str) -> bool:
    """Whether YAML reads it as the text that it is, and not as a number, for instance."""
    try:
        return from_yaml(value) == value
    except YAMLError:
        return False


def _machine(device: str) -> dict[str, str | int]:
    found: dict[str, str | int] = {"platform": platform.platform(), "num_cores": cpu_count() or 1, "device": device}
    found["working_folder"] = str(Path.cwd())
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
        "sentences": sentences(results),
        "tasks": {
            task.name: {
                "metric": task.metric,
                "shots": task.shots,
                "version": task.version,
                "unit": unit_of(task),
                "scores": {name: numbers[task.metric].value for name, numbers in task.scores.items()},
                "normalised": {name: number.value for name, number in task.normalised.items()},
            }
            for task in results.tasks
            if task.scores
        },
    }

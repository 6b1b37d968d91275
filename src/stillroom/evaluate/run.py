"""`stillroom evaluate`: models -> scores and a report."""

import gc
import json
import platform
import shlex
import shutil
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from os import cpu_count
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel
from transformers.utils.hub import cached_file

from stillroom.config import is_local
from stillroom.errors import MissingError, StillroomError
from stillroom.estimates.headers import numbers_of
from stillroom.evaluate.config import EvaluateConfig, ModelConfig, Role
from stillroom.evaluate.held_out import HeldOutEval
from stillroom.evaluate.plan import Benchmark, EvaluatePlan, LocalModel, make_plan
from stillroom.evaluate.report.content import sentences
from stillroom.evaluate.report.page import write_report
from stillroom.evaluate.report.tables import unit_of
from stillroom.evaluate.results import FOLDER, ModelFacts, Results, TaskResult
from stillroom.evaluate.scoring import Limits, Speed
from stillroom.evaluate.tasks.harness import in_words
from stillroom.evaluate.tasks.lm import EvalModel
from stillroom.models import loading
from stillroom.models.folder import weight_files
from stillroom.models.hidden_states import verify
from stillroom.recipe import YAMLError, from_yaml
from stillroom.runs import RunFolder, check_place, redact, versions, write_json
from stillroom.tokenizers import fingerprint
from stillroom.verbs import Report, recorded

FAILURES = "failures"
"""The folder of the tracebacks of errors that nobody foresaw."""
FREE_TO_CHANGE = ("out", "device", "batch_tokens", "logits_bytes")
"""Settings that change no score, but for rounding."""


def run(
    config: EvaluateConfig, *, resume: bool = False, overwrite: bool = False, report: Report = lambda *_: None
) -> dict[str, Any]:
    """Measures every model, and writes ``out/results.json`` and the reports; returns the record of run.json.

    Where a task failed, all others are there, ``status`` is failed, and ``failed_tasks`` says which and why.

    Args:
        resume: where an evaluation in ``out`` was interrupted, or a task failed, make it again from its beginning.
        overwrite: delete what is in ``out`` first.
        report: is called with each event and its values, for a progress line.

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
            found = _evaluate(plan, _command(given.model_dump(mode="json", exclude_unset=True)), folder.path, report)
            write_json(folder.path / "results.json", found.model_dump(mode="json"))
            reports = _write_report(found, folder.path, report)
        failed = {task.name: task.failed for task in found.tasks if task.failed}
        folder.update(status="failed" if failed else "done", **_facts(found), failed_tasks=failed, reports=reports)
        return folder.record


def _write_report(found: Results, out: Path, report: Report) -> list[str]:  # kept: has a test of its own
    """Writes the reports that can be made here; returns their paths."""
    try:
        return [str(path) for path in write_report(found, out)]
    except MissingError as error:
        report("note", {"text": f"there is no report.html: {error.what}. {error.fix}"})
        return [str(out / "report.md")]


def _evaluate(plan: EvaluatePlan, command: str, out: Path, report: Report) -> Results:
    """Loads one model after the other, so that no more are held at a time than one and the teacher beside it."""
    config, data = plan.config, plan.config.data
    evaluation = None
    if data is not None and plan.local_models:
        limits = Limits(plan.batch_tokens, plan.logits_bytes, config.device)
        evaluation = HeldOutEval(data, plan.local_models, config.teacher, limits, report)
    answers: dict[str, dict[str, Any]] = {benchmark.name: {} for benchmark in plan.benchmarks}
    for local in plan.local_models:
        model = _load(local, config.device, pack=data is not None and data.pack)
        if evaluation is not None:
            evaluation.score(local, model)
        lm = EvalModel(local.name, model, local.tokenizer, None, local.config.model)
        for benchmark in plan.benchmarks:
            answers[benchmark.name][local.name] = ask(benchmark, lm, out, report)
        del model, lm
        gc.collect()  # a model may be part of a cycle
    for name, tokenizer in plan.served.items():
        lm = EvalModel(name, None, tokenizer, config.models[name].url, config.models[name].model)
        for benchmark in plan.benchmarks:
            answers[benchmark.name][name] = ask(benchmark, lm, out, report)
    summary, speeds = {}, {}
    if evaluation is not None:
        speeds = {one.model.name: one.speed for one in evaluation.outputs}
        not_compared = {local.name: plan.not_beside_teacher(local) for local in plan.local_models}
        about: dict[str, Any] = {"baseline": config.baseline, "cuts": config.cuts, "seed": config.seed}
        summary = evaluation.summary([*config.models], not_compared, **about)
    tasks = []
    for benchmark in plan.benchmarks:
        by_model = {name: answers[benchmark.name][name] for name in config.models}
        tasks += task_results(benchmark, by_model, out, config.seed)
    here = {local.name: local for local in plan.local_models}
    return Results(
        models=tuple(
            _model_facts(name, config.role(name), model, here.get(name), speeds.get(name))
            for name, model in config.models.items()
        ),
        **summary,
        tasks=tuple(tasks),
        runs=plan.runs,
        command=command,
        versions=versions(),
        machine={
            "platform": platform.platform(),
            "num_cores": cpu_count() or 1,
            "device": config.device,
            "working_folder": str(Path.cwd()),
            **({"device_name": torch.cuda.get_device_name(config.device)} if config.device.startswith("cuda") else {}),
        },
    )


class Failure(NamedTuple):
    """The reason why a model has no replies."""

    reason: str


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
        reason = f"{in_words(error)} (traceback in {path})"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(traceback.format_exc())
    gc.collect()
    report("note", {"text": f"{benchmark.name}: {model.name} failed: {reason}"})
    return Failure(reason)


def task_results(
    benchmark: Benchmark, answers: Mapping[str, Any | Failure], out: Path, seed: int
) -> Sequence[TaskResult]:
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


def _load(local: LocalModel, device: str, *, pack: bool) -> PreTrainedModel:
    model = loading.load_model(
        local.config.model,
        dtype=getattr(torch, local.config.dtype),
        device=device,
        attention=None if local.config.attention == "auto" else local.config.attention,
        revision=local.config.revision,
        trust_remote_code=local.config.trust_remote_code,
    ).requires_grad_(False)
    verify(model, local.name, pack=pack)
    return model


def _model_facts(
    name: str, role: Role, model: ModelConfig, local: LocalModel | None, speed: Speed | None
) -> ModelFacts:
    """The facts of a model: its parameters, tied ones counted once, and the bytes of its weight files, from their
    headers alone. A model of the hub must have been loaded before."""
    if local is None:
        facts: dict[str, Any] = {"model": str(redact(f"{model.model} at {model.url}")), "tokenizer": None}
        facts |= {"fingerprint": f"served as {model.model}", "num_parameters": None, "size_bytes": None}
        return ModelFacts(name=name, role=role, **facts)
    if is_local(model.model):
        folder = Path(model.model).expanduser()
    else:
        config = cached_file(model.model, "config.json", revision=model.revision, local_files_only=True)
        folder = Path(str(config)).parent
    weights = weight_files(folder)
    return ModelFacts(
        name=name,
        role=role,
        model=model.model,
        fingerprint=local.fingerprint,
        tokenizer=fingerprint(local.tokenizer),
        num_parameters=sum(sum(numbers_of(path).values()) for path in weights),
        size_bytes=sum(path.stat().st_size for path in weights),
        **({} if speed is None else speed._asdict()),
    )


def _command(settings: dict[str, Any]) -> str:
    """The command line that repeats an evaluation with the settings that were given."""

    def words(value: Any, key: str) -> list[str]:
        if isinstance(value, dict):
            return [word for name, item in value.items() for word in words(item, f"{key}.{name}" if key else name)]
        text = json.dumps(value, ensure_ascii=False)
        with suppress(YAMLError):
            if isinstance(value, str) and from_yaml(value) == value:  # and does not read it as a number, for instance
                text = value
        return [shlex.quote(f"{key}={text}")]

    return " ".join(["stillroom evaluate", *words(redact(settings), "")])


def _facts(results: Results) -> dict[str, Any]:
    """The part of the results that run.json holds."""
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

"""lm-eval's tasks, through its Python API: its prompts, its metrics, its filters; our engine for likelihoods.

The engine takes the tokens that lm-eval made and gives the numbers that its own would, without a tensor of all logits
and with a batch size that it finds by itself.
"""

import contextlib
import copy
import difflib
import importlib
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from stillroom.errors import ConfigError, StillroomError, require
from stillroom.evaluate.results import Number, TaskResult
from stillroom.evaluate.tasks import summary
from stillroom.evaluate.tasks.asking import Evaluated, served_model
from stillroom.evaluate.tasks.config import HarnessTask
from stillroom.evaluate.tasks.items import FOLDER, Item, ModelAnswer, write_items
from stillroom.evaluate.tasks.leaderboard import official
from stillroom.evaluate.tasks.likelihood import Request, log_likelihoods
from stillroom.statistics import Z_95

Report = Callable[[str, Mapping[str, Any]], None]
Found = dict[str, Any]
"""What lm-eval gives for one model."""

CPU_BATCH = 8
"""Prompts that are answered at a time on a CPU; on other devices lm-eval finds the number."""
FIRST_METRICS = ("acc_norm", "exact_match")
"""Shown before the metric that a task names first."""


def check(config: HarnessTask) -> None:
    """Whether lm-eval knows the task.

    Raises:
        MissingError: lm-eval is not installed.
        ConfigError: it knows no such task.
    """
    require("lm_eval", "eval", f"the task {config.name}")
    if Path(config.name).is_file():
        return
    known = _manager(whole=True).all_tasks
    if config.name in known:
        return
    near = difflib.get_close_matches(config.name, known, n=1)
    raise ConfigError(
        f"lm-eval knows no task `{config.name}`",
        {"asked for": config.name, **({"did you mean": near[0]} if near else {"known": f"{len(known)} tasks"})},
        why="It has neither a task nor a group nor a tag of that name.",
        fix="`lm_eval ls tasks` lists them; a description of your own is given by its path, ending in .yaml.",
    )


@cache
def _manager(*, whole: bool) -> Any:
    """lm-eval's index of its tasks, which takes some seconds to make; an empty one is enough for a file."""
    return _lm_eval("tasks").TaskManager(include_defaults=whole)


def _manager_for(config: HarnessTask) -> Any:
    return _manager(whole=not Path(config.name).is_file())


def _lm_eval(module: str) -> Any:
    return importlib.import_module(f"lm_eval.{module}")


def run(config: HarnessTask, models: Sequence[Evaluated], out: Path, *, seed: int, report: Report) -> TaskResult:
    """Runs a task or group of lm-eval with every model; see `run_task`."""
    check(config)
    name = Path(config.name).stem if Path(config.name).is_file() else config.name
    found: dict[str, Found] = {}
    failed = []
    with _its_output() as stderr:
        report = partial(_report_to, stderr, report)
        try:
            _manager_for(config).load([config.name])
        except Exception as error:  # whatever the hub or a task's own code raises
            failed.append(_reason(error))
            models = ()
        for model in models:
            report("note", {"text": f"{name}: asking {model.name} through lm-eval"})
            try:
                found[model.name] = _evaluate(config, model, name, report)
            except Exception as error:  # the same: one that fails leaves the others
                failed.append(f"{model.name}: {_reason(error)}")
    if not found:
        return TaskResult(
            name=name,
            source="lm-eval",
            version="not known",
            shots=config.shots or 0,
            num_items=0,
            metric="not known",
            failed="; ".join(failed),
        )
    return _result(config, name, found, out, seed, "; ".join(failed) or None)


def _reason(error: Exception) -> str:
    if isinstance(error, StillroomError):
        return f"{error.what}. {error.why}"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _evaluate(config: HarnessTask, model: Evaluated, name: str, report: Report) -> Found:
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if model.model is None:
        asked: dict[str, Any] = {"model": "local-completions", "model_args": _address(model)}
    else:
        asked = {"model": _engine(model, name, report)}
    found = _lm_eval("evaluator").simple_evaluate(
        **asked,
        tasks=[config.name],
        num_fewshot=config.shots,
        limit=config.limit,
        task_manager=_manager_for(config),
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


def _report_to(stderr: Any, report: Report, event: str, values: Mapping[str, Any]) -> None:
    with contextlib.redirect_stderr(stderr):
        report(event, values)


def _address(model: Evaluated) -> dict[str, Any]:
    root = str(model.url).rstrip("/").removesuffix("/v1")
    tokenizer = None if model.tokenizer is None else model.tokenizer.name_or_path
    own = {"tokenizer": tokenizer} if tokenizer else {"tokenizer_backend": None, "tokenized_requests": False}
    return {"model": served_model(model), "base_url": f"{root}/v1/completions", "num_concurrent": 8, **own}


def _engine(asked: Evaluated, name: str, report: Report) -> Any:
    """lm-eval's own model class, whose likelihoods are computed by our engine."""
    HFLM: Any = _lm_eval("models.huggingface").HFLM
    model = asked.model
    assert model is not None

    class Engine(HFLM):
        def _loglikelihood_tokens(self, requests: Any, *_: Any, **__: Any) -> list[tuple[float, bool]]:
            pairs = [Request(context, continuation) for _, context, continuation in requests]

            def done(number: int) -> None:
                report("task", {"task": name, "model": asked.name, "done": number, "total": len(pairs)})

            told = log_likelihoods(model, pairs, limit=self.max_length, done=done)
            if num_cut := sum(one.num_cut > 0 for one in told):
                text = (
                    f"{name}: {num_cut} of {len(told)} texts were too long for {asked.name} and cut at their beginning"
                )
                report("note", {"text": text})
            return [(one.log_likelihood, one.greedy) for one in told]

    tokenizer = copy.deepcopy(asked.tokenizer)  # lm-eval gives it a padding token
    return Engine(pretrained=model, tokenizer=tokenizer, batch_size=CPU_BATCH if model.device.type == "cpu" else "auto")


# --- what lm-eval gives -----------------------------------------------------------------------------------------------


def _result(
    config: HarnessTask, name: str, found: Mapping[str, Found], out: Path, seed: int, failed: str | None
) -> TaskResult:
    first = next(iter(found.values()))
    tasks = list(first["samples"])
    main, filtered = _main_metric(first, tasks[0])
    rows = {model: _rows(one, filtered) for model, one in found.items()}
    items = _items(first, tasks, rows, main)
    write_items(out / FOLDER / f"{name}.jsonl", items)
    top = name if name in first["results"] else tasks[0]
    scores = {model: _scores(one, top, filtered, main, rows[model]) for model, one in found.items()}
    comparable = bool(items) and all(len(item.models) == len(found) for item in items)
    values = {model: [item.models[model].correct for item in items] for model in found if comparable}
    return TaskResult(
        name=name,
        source="lm-eval",
        version=_version(first, top, tasks),
        shots=int(first["n-shot"].get(tasks[0], config.shots or 0)),
        num_items=sum(len(one) for one in next(iter(rows.values())).values()),
        metric=main,
        higher_is_better=bool(first["higher_is_better"].get(tasks[0], {}).get(main, True)),
        scores=scores,
        normalised=_normalised(name, found),
        differences=summary.differences(name, main, values, seed),
        items=f"{FOLDER}/{name}.jsonl",
        failed=failed,
    )


def _main_metric(found: Found, task: str) -> tuple[str, str]:
    """The metric that is shown first, and the filter of the answers that it is of."""
    pairs = [tuple(key.split(",", 1)) for key in found["results"][task] if "," in key and "_stderr" not in key]
    names = [name for name, _ in pairs]
    listed = [str(one["metric"]) for one in found["configs"][task].get("metric_list") or ()]
    main = next(name for name in (*FIRST_METRICS, *listed, *names) if name in names)
    return main, next(filtered for name, filtered in pairs if name == main)


def _rows(found: Found, filtered: str) -> dict[str, list[dict[str, Any]]]:
    """By task: what was logged of each item, of one filter."""
    return {
        task: sorted((one for one in logged if one["filter"] == filtered), key=lambda one: one["doc_id"])
        for task, logged in found["samples"].items()
    }


def _items(first: Found, tasks: Sequence[str], rows: Mapping[str, Mapping[str, Any]], main: str) -> list[Item]:
    """The items of all tasks with each model's answer; an answer whose value by ``main`` is no number is left out."""
    several = len(tasks) > 1
    found = []
    for task in tasks:
        separator = first["configs"][task].get("fewshot_delimiter") if first["n-shot"].get(task) else None
        for number, one in enumerate(next(iter(rows.values()))[task]):
            answers = {model: _answer(all_of[task][number], main) for model, all_of in rows.items()}
            options = tuple(str(pair[1]).strip() for pair in one["arguments"]) if len(one["arguments"]) > 1 else ()
            found.append(
                Item(
                    id=f"{task}/{one['doc_id']}" if several else str(one["doc_id"]),
                    group=task if several else None,
                    question=str(one["arguments"][0][0]).rsplit(separator, 1)[-1]
                    if separator
                    else str(one["arguments"][0][0]),
                    options=options,
                    gold=_gold(one["target"], options),
                    models={model: answer for model, answer in answers.items() if answer is not None},
                )
            )
    return found


def _gold(target: Any, options: Sequence[str]) -> str:
    return options[target] if isinstance(target, int) and 0 <= target < len(options) else str(target)


def _answer(row: Mapping[str, Any], main: str) -> ModelAnswer | None:
    correct = row.get(main)
    if not isinstance(correct, int | float):
        return None
    said = row["filtered_resps"]
    if said and all(isinstance(one, list | tuple) and len(one) == 2 for one in said):
        scores = tuple(float(one[0]) for one in said)
        best = max(range(len(scores)), key=scores.__getitem__)
        prediction = str(row["arguments"][best][1]).strip() if len(scores) > 1 else ""
        return ModelAnswer(prediction=prediction, scores=scores, correct=float(correct))
    return ModelAnswer(prediction=str(said[0]) if said else "", correct=float(correct))


def _scores(
    found: Found, top: str, filtered: str, main: str, rows: Mapping[str, Sequence[Mapping[str, Any]]]
) -> dict[str, Number]:
    """Each metric of the task, or of the group and of each of its tasks as "METRIC TASK"."""
    everything = [one for logged in rows.values() for one in logged]
    scores = _from_items(_numbers(found["results"][top], filtered), everything)
    for task, logged in rows.items() if len(rows) > 1 else ():
        own = _from_items(_numbers(found["results"][task], filtered), logged)
        scores |= {f"{name} {task}": number for name, number in own.items() if name == main}
    if main not in scores:  # a group that lm-eval gives no score of its own
        scores = {main: summary.number([float(one[main]) for one in everything]), **scores}
    return scores


def _from_items(numbers: Mapping[str, Number], logged: Sequence[Mapping[str, Any]]) -> dict[str, Number]:
    """The same numbers; those that are means of their items with the interval that the items give."""
    found = dict(numbers)
    for name, number in numbers.items():
        values = [one.get(name) for one in logged]
        if values and all(isinstance(value, int | float) for value in values):
            own = summary.number([float(value) for value in values if value is not None])
            if math.isclose(own.value, number.value, abs_tol=1e-9):
                found[name] = own
    return found


def _numbers(metrics: Mapping[str, Any], filtered: str) -> dict[str, Number]:
    """What lm-eval tells of a task: "acc,none" with "acc_stderr,none"."""
    found = {}
    for key, value in metrics.items():
        name, comma, of = key.partition(",")
        if not comma or name.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = metrics.get(f"{name}_stderr,{of}")
        label = name if of == filtered else f"{name},{of}"
        if not isinstance(error, int | float) or math.isnan(error):
            found[label] = Number(value=float(value))
        else:
            ends = {"low": float(value - Z_95 * error), "high": float(value + Z_95 * error)}
            found[label] = Number(value=float(value), error=float(error), **ends)
    return found


def _normalised(name: str, found: Mapping[str, Found]) -> dict[str, Number]:
    """The official score, where the task is one of the leaderboard's and nothing that it is made of is missing."""
    scores = {}
    for model, one in found.items():
        results = {**one["results"], **one.get("groups", {})}
        with contextlib.suppress(KeyError):
            number = official(name, lambda task, metric, of=results: _numbers(of[task], "none")[metric])
            if number is not None:
                scores[model] = number
    return scores


def _version(found: Found, top: str, tasks: Sequence[str]) -> str:
    from importlib import metadata

    known = found["versions"]
    versions = dict.fromkeys(str(known[task]) for task in (top, *tasks) if known.get(task) not in (None, "N/A"))
    return f"{', '.join(versions) or 'not known'} (lm-eval {metadata.version('lm_eval')})"

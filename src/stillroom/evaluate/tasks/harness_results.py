"""What lm-eval gives of a task or group, as results with files of items."""

import contextlib
import math
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from stillroom.evaluate.results import Number, TaskResult
from stillroom.evaluate.tasks import summary
from stillroom.evaluate.tasks.items import FOLDER, Item, ModelAnswer, write_items
from stillroom.evaluate.tasks.leaderboard import official
from stillroom.statistics import Z_95

Found = dict[str, Any]
"""What lm-eval gives for one model."""
Rows = Mapping[str, Sequence[Mapping[str, Any]]]
"""By task: what was logged of each item."""

FIRST_METRICS = ("acc_norm", "exact_match", "acc")
"""Shown before the metric that a task names first."""


class Main(NamedTuple):
    """The metric of a task that is shown first."""

    metric: str
    filtered: str
    """The filter of the answers that it is of."""
    higher_is_better: bool


def harness_results(
    key: str, name: str, found: Mapping[str, Found], failed: str | None, out: Path, seed: int
) -> list[TaskResult]:
    """One result for a task, and for a group whose tasks have a metric in common; otherwise one for each of its tasks,
    as NAME.TASK. Items are written into ``out``.

    Args:
        key: what lm-eval calls it.
        name: what it is called in the results.
        found: by model; at least one.
        failed: why other models have none.
    """
    first = next(iter(found.values()))
    tasks = list(first["samples"])
    by_task = {task: _mains(first, task) for task in tasks}
    for metric in dict.fromkeys(metric for mains in by_task.values() for metric in mains):
        mains = {task: known[metric] for task, known in by_task.items() if metric in known}
        if _go_together(first, key, mains, len(tasks)):
            return [_result(key, name, mains, found, failed, out, seed)]
    results = []
    for task, known in by_task.items():
        if known:
            main = next(iter(known.values()))
            results.append(_result(task, f"{name}.{task}", {task: main}, found, failed, out, seed))
        else:
            results.append(_without_score(f"{name}.{task}" if len(tasks) > 1 else name, task, first))
    return results


def _go_together(found: Found, key: str, mains: Mapping[str, Main], num_tasks: int) -> bool:
    """Whether all tasks of a group have a metric, and it has a score by that, or its items have."""
    if len(mains) < num_tasks or len({main.higher_is_better for main in mains.values()}) > 1:
        return False
    rows = _rows(found, mains)
    countable = all(isinstance(one.get(mains[task].metric), int | float) for task in rows for one in rows[task])
    return num_tasks == 1 or key in found["results"] or (countable and any(rows.values()))


def _mains(found: Found, task: str) -> dict[str, Main]:
    """The metrics of a task by name, that which is shown first at first, each of its first filter."""
    filters: dict[str, str] = {}
    for key in found["results"][task]:
        name, comma, filtered = key.partition(",")
        if comma and not name.endswith("_stderr"):
            filters.setdefault(name, filtered)
    listed = [str(one["metric"]) for one in found["configs"][task].get("metric_list") or ()]
    higher = found["higher_is_better"].get(task, {})
    order = dict.fromkeys(name for name in (*FIRST_METRICS, *listed, *filters) if name in filters)
    return {name: Main(name, filters[name], higher.get(name) is not False) for name in order}


def _without_score(name: str, task: str, found: Found) -> TaskResult:
    return TaskResult(
        name=name,
        source="lm-eval",
        version=_version(found, task, [task]),
        shots=int(found["n-shot"].get(task) or 0),
        num_items=len(found["samples"][task]),
        metric="not known",
        failed=f"lm-eval gives no score of {task}",
    )


def _result(
    key: str,
    name: str,
    mains: Mapping[str, Main],
    found: Mapping[str, Found],
    failed: str | None,
    out: Path,
    seed: int,
) -> TaskResult:
    """The result of tasks that have a metric in common."""
    first, tasks = next(iter(found.values())), list(mains)
    main = mains[tasks[0]]
    rows = {model: _rows(one, mains) for model, one in found.items()}
    items = _items(first, tasks, rows, main.metric)
    write_items(out / FOLDER / f"{name}.jsonl", items)
    top = key if key in first["results"] else tasks[0] if len(tasks) == 1 else None
    scores = {model: _scores(one, top, mains, rows[model]) for model, one in found.items()}
    values = _values(items, {model: one[main.metric].value for model, one in scores.items()})
    return TaskResult(
        name=name,
        source="lm-eval",
        version=_version(first, top, tasks),
        shots=int(first["n-shot"].get(tasks[0]) or 0),
        num_items=len(items),
        metric=main.metric,
        higher_is_better=main.higher_is_better,
        scores=scores,
        normalised=_normalised(key, found),
        differences=summary.differences(name, main.metric, values, seed, higher_is_better=main.higher_is_better),
        items=f"{FOLDER}/{name}.jsonl" if values else None,
        failed=failed,
    )


def _rows(found: Found, mains: Mapping[str, Main]) -> Rows:
    return {
        task: sorted(
            (one for one in found["samples"][task] if one["filter"] == main.filtered), key=lambda one: one["doc_id"]
        )
        for task, main in mains.items()
    }


def _values(items: Sequence[Item], scores: Mapping[str, float]) -> dict[str, list[float]]:
    """By model, what each item counts, where the score is the mean of that; otherwise the score is another function of
    the items, and models cannot be compared item by item."""
    if not items or any(item.models.keys() != scores.keys() for item in items):
        return {}
    values = {model: [item.models[model].correct for item in items] for model in scores}
    means = {model: math.fsum(of) / len(of) for model, of in values.items()}
    alike = all(math.isclose(means[model], score, rel_tol=1e-6, abs_tol=1e-9) for model, score in scores.items())
    return values if alike else {}


def _items(first: Found, tasks: Sequence[str], rows: Mapping[str, Rows], main: str) -> list[Item]:
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
        choices = [str(pair[1]).strip() for pair in row["arguments"]]
        lengths = [max(1, len(choice)) if main == "acc_norm" else 1 for choice in choices]
        best = max(range(len(scores)), key=lambda i: scores[i] / lengths[i])
        prediction = choices[best] if len(scores) > 1 else ""
        return ModelAnswer(prediction=prediction, scores=scores, correct=float(correct))
    return ModelAnswer(prediction=str(said[0]) if said else "", correct=float(correct))


def _scores(found: Found, top: str | None, mains: Mapping[str, Main], rows: Rows) -> dict[str, Number]:
    """Each metric of the task, or of the group and of each of its tasks as "METRIC TASK"."""
    everything = [one for logged in rows.values() for one in logged]
    main, filters = next(iter(mains.values())), {one.filtered for one in mains.values()}
    groups = {**found["results"], **found.get("groups", {})}
    told = {} if top is None or len(filters) > 1 else groups.get(top, {})
    scores = _from_items(_numbers(told, main.filtered), everything)
    for task, logged in rows.items() if len(rows) > 1 else ():
        own = _from_items(_numbers(found["results"][task], mains[task].filtered), logged)
        scores |= {f"{main.metric} {task}": own[main.metric]}
    if main.metric not in scores:  # a group that lm-eval gives no score of its own
        scores = {main.metric: summary.number([float(one[main.metric]) for one in everything]), **scores}
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


def _version(found: Found, top: str | None, tasks: Sequence[str]) -> str:
    known = found["versions"]
    versions = dict.fromkeys(str(known[task]) for task in (top, *tasks) if known.get(task) not in (None, "N/A"))
    return f"{', '.join(versions) or 'not known'} (lm-eval {metadata.version('lm_eval')})"

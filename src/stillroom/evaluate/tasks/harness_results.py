"""The output of lm-eval for a task or group becomes results with files of items.

The official scores of the Open LLM Leaderboard v2 stand beside the raw ones of its tasks, as published at
huggingface.co/docs/leaderboards/open_llm_leaderboard/normalization: of each subtask

    normalized = max(0, (raw − chance) / (1 − chance))

with the chance of blind guessing as below, and of BBH and MUSR the plain mean over subtasks. GPQA and MMLU-Pro are
normalized as a whole. MATH-hard and IFEval are generated, so their chance is 0; IFEval is the mean of its strict
accuracies by prompt and by instruction. The leaderboard's average is that of the six.
"""

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from stillroom.evaluate.config import LEADERBOARD
from stillroom.evaluate.results import (
    FOLDER,
    Item,
    ModelAnswer,
    Number,
    TaskResult,
    differences,
    normalize,
    write_items,
)
from stillroom.statistics import mean, normal

HarnessOutput = dict[str, Any]
"""The output of lm-eval for one model."""
Rows = Mapping[str, Sequence[Mapping[str, Any]]]
"""The log of each item, by task."""

FIRST_METRICS = ("acc_norm", "exact_match", "acc")
"""Shown before the metric that a task names first."""


class Main(NamedTuple):
    """The metric of a task that is shown first."""

    metric: str
    filtered: str
    """The filter that its answers went through."""
    higher_is_better: bool


def harness_results(
    key: str, name: str, found: Mapping[str, HarnessOutput], failed: str | None, out: Path, seed: int
) -> list[TaskResult]:
    """One result for a task, and for a group whose tasks have a metric in common; otherwise one for each of its tasks,
    as NAME.TASK. Items are written into ``out``.

    Args:
        key: the name of lm-eval.
        name: the name in the results.
        found: the output by model; at least one.
        failed: the reason why other models have none.
    """
    first = next(iter(found.values()))
    by_task = {task: _mains(first, task) for task in first["samples"]}
    for metric in dict.fromkeys(metric for mains in by_task.values() for metric in mains):
        mains = {task: known[metric] for task, known in by_task.items() if metric in known}
        if len(mains) < len(by_task) or len({main.higher_is_better for main in mains.values()}) > 1:
            continue
        rows = _rows(first, mains)  # all tasks have the metric: the group has a score by it, or its items have
        countable = all(isinstance(one.get(mains[task].metric), int | float) for task in rows for one in rows[task])
        if len(by_task) == 1 or key in first["results"] or (countable and any(rows.values())):
            return [_result(key, name, mains, found, failed, out, seed)]
    results = []
    for task, known in by_task.items():
        part = f"{name}.{task}" if known or len(by_task) > 1 else name
        if known:
            main = next(iter(known.values()))
            results.append(_result(task, part, {task: main}, found, failed, out, seed))
        else:
            shots, version = int(first["n-shot"].get(task) or 0), _version(first, task, [task])
            why = f"lm-eval gives no score of {task}"
            results.append(no_score(part, why, shots, version, len(first["samples"][task])))
    return results


def no_score(name: str, failed: str | None, shots: int, version: str = "not known", num_items: int = 0) -> TaskResult:
    """The result of a task of which there is nothing but the reason."""
    about: dict[str, Any] = {"version": version, "shots": shots, "num_items": num_items, "failed": failed}
    return TaskResult(name=name, source="lm-eval", metric="not known", **about)


def _mains(found: HarnessOutput, task: str) -> dict[str, Main]:
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


def _result(
    key: str,
    name: str,
    mains: Mapping[str, Main],
    found: Mapping[str, HarnessOutput],
    failed: str | None,
    out: Path,
    seed: int,
) -> TaskResult:
    """The result of tasks that have a metric in common."""
    first, tasks = next(iter(found.values())), list(mains)
    main = mains[tasks[0]]
    rows = {model: _rows(one, mains) for model, one in found.items()}
    items, file = _items(first, tasks, rows, main.metric), f"{FOLDER}/{name}.jsonl"
    write_items(out / file, items)
    top = key if key in first["results"] else tasks[0] if len(tasks) == 1 else None
    scores = {model: _scores(one, top, mains, rows[model]) for model, one in found.items()}
    values = {}
    if items and all(item.models.keys() == found.keys() for item in items):
        values = {model: [item.models[model].correct for item in items] for model in found}
    for model, of in values.items():  # a score that is no mean of the items cannot be compared item by item
        if not math.isclose(math.fsum(of) / len(of), scores[model][main.metric].value, rel_tol=1e-6, abs_tol=1e-9):
            values = {}
            break
    return TaskResult(
        name=name,
        source="lm-eval",
        version=_version(first, top, tasks),
        shots=int(first["n-shot"].get(tasks[0]) or 0),
        num_items=len(items),
        metric=main.metric,
        higher_is_better=main.higher_is_better,
        scores=scores,
        normalised=official_scores(key, found),
        differences=differences(name, main.metric, values, seed, higher_is_better=main.higher_is_better),
        items=file if values else None,
        failed=failed,
    )


def _rows(found: HarnessOutput, mains: Mapping[str, Main]) -> Rows:
    rows = {task: [one for one in found["samples"][task] if one["filter"] == mains[task].filtered] for task in mains}
    return {task: sorted(logged, key=lambda one: one["doc_id"]) for task, logged in rows.items()}


def _items(first: HarnessOutput, tasks: Sequence[str], rows: Mapping[str, Rows], main: str) -> list[Item]:
    """The items of all tasks with each model's answer; an answer whose value by ``main`` is no number is left out."""
    several = len(tasks) > 1
    found = []
    for task in tasks:
        separator = first["configs"][task].get("fewshot_delimiter") if first["n-shot"].get(task) else None
        for i, one in enumerate(next(iter(rows.values()))[task]):
            answers = {model: _answer(all_of[task][i], main) for model, all_of in rows.items()}
            options = tuple(str(pair[1]).strip() for pair in one["arguments"]) if len(one["arguments"]) > 1 else ()
            question, target = str(one["arguments"][0][0]), one["target"]
            found.append(
                Item(
                    id=f"{task}/{one['doc_id']}" if several else str(one["doc_id"]),
                    group=task if several else None,
                    question=question.rsplit(separator, 1)[-1] if separator else question,
                    options=options,
                    gold=options[target] if isinstance(target, int) and 0 <= target < len(options) else str(target),
                    models={model: answer for model, answer in answers.items() if answer is not None},
                )
            )
    return found


def _answer(row: Mapping[str, Any], main: str) -> ModelAnswer | None:
    correct = row.get(main)
    if not isinstance(correct, int | float):
        return None
    replies = row["filtered_resps"]
    if replies and all(isinstance(one, list | tuple) and len(one) == 2 for one in replies):
        scores = tuple(float(one[0]) for one in replies)
        choices = [str(pair[1]).strip() for pair in row["arguments"]]
        lengths = [max(1, len(choice)) if main == "acc_norm" else 1 for choice in choices]
        best = max(range(len(scores)), key=lambda i: scores[i] / lengths[i])
        prediction = choices[best] if len(scores) > 1 else ""
        return ModelAnswer(prediction=prediction, scores=scores, correct=float(correct))
    return ModelAnswer(prediction=str(replies[0]) if replies else "", correct=float(correct))


def _scores(found: HarnessOutput, top: str | None, mains: Mapping[str, Main], rows: Rows) -> dict[str, Number]:
    """Each metric of the task, or of the group and of each of its tasks as "METRIC TASK"."""
    everything = [one for logged in rows.values() for one in logged]
    main, filters = next(iter(mains.values())), {one.filtered for one in mains.values()}
    groups = {**found["results"], **found.get("groups", {})}
    own = {} if top is None or len(filters) > 1 else groups.get(top, {})
    scores = _from_items(_numbers(own, main.filtered), everything)
    for task, logged in rows.items() if len(rows) > 1 else ():
        of_task = _from_items(_numbers(found["results"][task], mains[task].filtered), logged)
        scores |= {f"{main.metric} {task}": of_task[main.metric]}
    if main.metric not in scores:  # a group that lm-eval gives no score of its own
        scores = {main.metric: mean([float(one[main.metric]) for one in everything]), **scores}
    return scores


def _from_items(numbers: Mapping[str, Number], logged: Sequence[Mapping[str, Any]]) -> dict[str, Number]:
    """The same numbers; those that are means of their items with the interval that the items give."""
    found = dict(numbers)
    for name, given in numbers.items():
        values = [one.get(name) for one in logged]
        if values and all(isinstance(value, int | float) for value in values):
            own = mean([float(value) for value in values if value is not None])
            if math.isclose(own.value, given.value, abs_tol=1e-9):
                found[name] = own
    return found


def _numbers(metrics: Mapping[str, Any], filtered: str) -> dict[str, Number]:
    """The numbers of lm-eval of a task: "acc,none" with "acc_stderr,none"."""
    found = {}
    for key, value in metrics.items():
        name, comma, of = key.partition(",")
        if not comma or name.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = metrics.get(f"{name}_stderr,{of}")
        label = name if of == filtered else f"{name},{of}"
        error = float(error) if isinstance(error, int | float) and not math.isnan(error) else None
        found[label] = normal(float(value), error)
    return found


def _version(found: HarnessOutput, top: str | None, tasks: Sequence[str]) -> str:
    known = found["versions"]
    versions = dict.fromkeys(str(known[task]) for task in (top, *tasks) if known.get(task) not in (None, "N/A"))
    return f"{', '.join(versions) or 'not known'} (lm-eval {metadata.version('lm_eval')})"


# --- the leaderboard -------------------------------------------------------------------------------------------------

BBH_CHOICES = {
    name: number
    for number, names in {
        2: "boolean_expressions causal_judgement formal_fallacies hyperbaton navigate snarks sports_understanding "
        "web_of_lies",
        3: "disambiguation_qa logical_deduction_three_objects tracking_shuffled_objects_three_objects",
        4: "temporal_sequences",
        5: "logical_deduction_five_objects penguins_in_a_table tracking_shuffled_objects_five_objects",
        6: "date_understanding movie_recommendation ruin_names salient_translation_error_detection",
        7: "logical_deduction_seven_objects tracking_shuffled_objects_seven_objects",
        11: "geometric_shapes",
        18: "reasoning_about_colored_objects",
        19: "object_counting",
    }.items()
    for name in names.split()
}
"""The number of answers to choose from, as published."""
MUSR_CHOICES = {"murder_mysteries": 2, "object_placements": 5, "team_allocation": 3}
CHANCE = {
    **{f"leaderboard_bbh_{name}": 1 / number for name, number in BBH_CHOICES.items()},
    **{f"leaderboard_musr_{name}": 1 / number for name, number in MUSR_CHOICES.items()},
    **{f"leaderboard_{name}": 0.25 for name in ("gpqa", "gpqa_diamond", "gpqa_extended", "gpqa_main")},
    "leaderboard_mmlu_pro": 0.1,
    "leaderboard_math_hard": 0.0,
}
METRIC = {"leaderboard_mmlu_pro": "acc", "leaderboard_math_hard": "exact_match"}
"""The raw metric of a task; all others have acc_norm."""

Raw = Callable[[str, str], Number]
"""The raw score of a task by a metric. Raises KeyError where there is none."""


def official(task: str, raw: Raw) -> Number | None:
    """The normalized score of a task or group of the leaderboard; None for any other task.

    Raises:
        KeyError: a raw score that it is made of is missing.
    """
    if task == "leaderboard":
        return _mean([one for name in LEADERBOARD if (one := official(name, raw)) is not None])
    if task in ("leaderboard_ifeval", "leaderboard_instruction_following"):
        return _mean(
            [raw("leaderboard_ifeval", f"{level}_level_strict_acc") for level in ("prompt", "inst")], alike=True
        )
    for group in ("bbh", "musr"):
        if task == f"leaderboard_{group}":
            names = sorted(name for name in CHANCE if name.startswith(f"{task}_"))
            return _mean([one for name in names if (one := official(name, raw)) is not None])
    if task not in CHANCE:
        return None
    return normalize(raw(task, METRIC.get(task, "acc_norm")), CHANCE[task], clip=True)


def official_scores(key: str, found: Mapping[str, HarnessOutput]) -> dict[str, Number]:
    """The official score by model, where the task is the leaderboard's and nothing that it is made of is missing."""
    scores = {}
    for model, one in found.items():
        groups = {**one["results"], **one.get("groups", {})}
        with contextlib.suppress(KeyError):
            score = official(key, lambda task, metric, of=groups: _numbers(of[task], "none")[metric])
            scores |= {} if score is None else {model: score}
    return scores


def _mean(parts: Sequence[Number], *, alike: bool = False) -> Number:
    """The plain mean of independent parts; or of parts that are ``alike``, being of the same answers, whose errors add
    up: at most too large."""
    value = sum(part.value for part in parts) / len(parts)
    errors = [part.error for part in parts if part.error is not None]
    if len(errors) < len(parts):
        return Number(value=value)
    return normal(value, (sum(errors) if alike else math.sqrt(sum(error**2 for error in errors))) / len(parts))

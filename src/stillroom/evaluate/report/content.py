"""Content: everything that a report says, in order, before it becomes a page or Markdown."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from stillroom.errors import DataError, StillroomError
from stillroom.evaluate.report import tables
from stillroom.evaluate.report.charts import Look, looks
from stillroom.evaluate.report.tables import Curve, Group, Panel, ends_of
from stillroom.evaluate.results import Change, Difference, ModelFacts, Results, Role, TaskResult, changes
from stillroom.runs import read_metrics

HEADLINES = {
    "recovered_gap": "of the gap in cross-entropy between baseline and teacher",
    "top1_agreement": "how often both hold the same token for the likeliest",
    "forward_kl_nats": "nats a token; 0 is the teacher itself",
}
"""The metrics that are read first, and what each is."""
AGREEMENT = {
    "top1_agreement": "same top token",
    "top10_overlap": "overlap of the top 10",
    "accepted_mass": "accepted mass",
    "recovered_gap": "recovered gap",
}
"""The shares of 1 that are drawn together."""
GAP = (-0.2, 1.3)
"""The widest interval of a recovered gap that is drawn beside shares; its value is in 0 to 1.1."""
FIRST = ("cross_entropy_nats", "bits_per_byte")
SENTENCES = 8
FAR = 0.01
"""The mean nats a token from which on a passage counts as far from the teacher."""
LEVELS = (0.1, 0.5, 1.0, 2.0, 4.0)
"""The beginnings of the shades of a token's KL, in nats."""
LEVEL_NAMES = ("below 0.1", *(f"{a:g} to {b:g}" for a, b in pairwise(LEVELS)), "4 and more")
SHOWN = 10
"""The changed items of a task that the page holds, for two models."""
POINTS = 240
"""The most points of one curve."""
HELD_OUT = {"cross_entropy_nats": "held-out cross-entropy", "forward_kl_nats": "held-out KL to the teacher"}


class Changes(NamedTuple):
    """The items on which two models part in a task."""

    task: str
    a: str
    b: str
    num_items: int
    gained: int
    """Items that b has right and a wrong."""
    lost: int
    shown: tuple[Change, ...]
    """The first of them, gained and lost in turn."""
    file: str
    missing: str | None = None
    """The reason why no item is shown, where none can be."""


class Training(NamedTuple):
    """The curves of the runs that made the models."""

    panels: tuple[Panel, ...]
    missing: dict[str, str]
    """The reason by model why its curves are not there."""


def make_report(results: Results, folder: Path) -> SimpleNamespace:
    """Reads the items in ``folder`` and the metrics of the runs, and puts the results into words: all that the
    templates of the page and of Markdown show."""
    names = [facts.name for facts in results.models]
    shown = looks(results.models)
    training = read_training({name: Path(results.runs[name]) for name in names if name in results.runs})
    groups, note, axis = _task_groups(results.tasks)
    agreement, agreement_note = _agreement(results)
    title = "How much of the teacher did the student keep?"
    return SimpleNamespace(
        results=results,
        looks=shown,
        title=title if any(facts.role == "teacher" for facts in results.models) else "Models side by side",
        about=_about(results),
        headlines=_headlines(results, shown),
        sentences=sentences(results),
        task_groups=groups,
        task_note=note,
        task_axis=axis,
        agreement_groups=agreement,
        agreement_note=agreement_note,
        metrics=tables.metric_table(results),
        tasks=tables.task_table(results),
        failed=tuple(tables.failure(task) for task in results.tasks if task.failed is not None and not task.scores),
        more_scores=[table for task in results.tasks if (table := tables.more_scores(task, names)) is not None],
        task_differences=tables.difference_table([one for task in results.tasks for one in task.differences]),
        metric_differences=tables.difference_table(results.differences),
        training=training,
        training_tables=[*tables.training_tables(training.panels)],
        breakdown_tables=[*tables.breakdown_tables(results.breakdowns)],
        worst=tuple(  # of each model the passages that are far from the teacher, or none
            (name, tuple(passage for passage in results.worst[name] if passage.mean_kl_nats >= FAR))
            for name in names
            if results.worst.get(name)
        ),
        changes=[*read_changes(results.tasks, results.models, folder)],
        sizes=tables.size_table(results),
        fingerprints=tables.fingerprint_table(results),
        versions=tables.pair_table("Versions", results.versions),
        machine=tables.pair_table("Machine", results.machine),
    )


def _about(results: Results) -> str:
    parts = [f"{len(results.models)} model{'s' * (len(results.models) != 1)}"]
    if (text := results.text) is not None:
        local = text.name.startswith(("/", "~", "."))  # its folder stands further below
        name = Path(text.name).name if local else text.name
        parts.append(f"{text.num_tokens:,} held-out tokens in {text.num_documents:,} documents of {name}")
    if done := [task for task in results.tasks if task.scores]:
        items = sum(task.num_items for task in done)
        parts.append(f"{len(done)} benchmark{'s' * (len(done) != 1)} of {items:,} items")
    return " · ".join(parts)


def _headlines(results: Results, shown: Sequence[Look]) -> list[dict[str, Any]]:
    """The numbers that are read first: of the distilled models, then of all others that have them."""
    order = sorted(zip(shown, results.models, strict=True), key=lambda one: one[1].role != "distilled")
    found = []
    for key, about in HEADLINES.items():
        metric, rows = tables.METRICS[key], []
        for look, facts in order:
            number = results.metrics.get(facts.name, {}).get(key)
            if number is not None and facts.role != "teacher":
                rows.append((look, tables.headline_cell(number, metric.unit)))
        if rows:
            found.append({"title": metric.title, "about": about, "rows": rows})
    return found


def sentences(results: Results) -> tuple[str, ...]:
    """The differences that are read first, in words: of distilled models beside the baseline, then beside the teacher;
    where there are none, of all models. Of each, the cross-entropy stands first, then tasks, then other metrics."""
    roles = {facts.name: facts.role for facts in results.models}
    compared = {frozenset((one.a, one.b)) for one in results.differences if one.what == "cross_entropy_nats"}
    chief = []  # bits per byte only of models whose cross-entropies do not compare
    for one in results.differences:
        instead = one.what == "bits_per_byte" and frozenset((one.a, one.b)) not in compared
        if instead or one.what in (*FIRST[:1], *HEADLINES):
            chief.append(one)
    first = [one for one in chief if one.what in FIRST]
    tasks = [one for task in results.tasks for one in task.differences]
    every = [*first, *tasks, *(one for one in chief if one.what not in FIRST)]

    def between(a: Role, b: Role) -> list[Difference]:
        return [one for one in every if {roles.get(one.a), roles.get(one.b)} == {a, b}]

    found = [*between("distilled", "baseline"), *between("distilled", "teacher")] or every
    return tuple(f"{tables.what(one.what)}: {one.sentence}" for one in found[:SENTENCES])


def _task_groups(tasks: Sequence[TaskResult]) -> tuple[tuple[Group, ...], str, str]:
    """A group of bars for each task whose score is a share of 1, normalized where all have that; a note; and the label
    of the axis."""
    groups, left, normalised = [], [], 0
    for task in tasks:
        if not task.scores:
            continue
        raw = {name: scores[task.metric] for name, scores in task.scores.items() if task.metric in scores}
        if task.normalised and task.normalised.keys() >= raw.keys():
            groups.append(Group(task.name, f"{task.metric}, normalised", task.normalised))
            normalised += 1
        elif raw and task.higher_is_better and tables.unit_of(task) == tables.SHARE:
            groups.append(Group(task.name, task.metric, raw))
        else:
            left.append(task.name)
    notes = ["Lines are 95 % intervals."]
    if normalised:
        notes.append("Normalised scores are 0 at chance and 100 at perfect; raw ones are in the table.")
    if partly := [task.name for task in tasks if task.failed is not None and task.scores]:
        notes.append(f"Some models have no score, and so no bar, in {', '.join(partly)}; why is said below.")
    if left:
        notes.append(f"Not drawn, since {'their scores are' if len(left) > 1 else 'its score is'} no share: "
                     f"{', '.join(left)}.")  # fmt: skip
    axis = "0 is chance, 100 perfect" if normalised == len(groups) else "percent"
    return tuple(groups), " ".join(notes), axis


def _agreement(results: Results) -> tuple[tuple[Group, ...], str]:
    """A group of bars for each share, and a note. A recovered gap that is far from a share is not among them."""
    groups, note = [], "Held-out text; lines are 95 % intervals."
    for key, title in AGREEMENT.items():
        numbers = {name: found[key] for name, found in results.metrics.items() if key in found}
        far = key == "recovered_gap" and not all(
            0 <= gap.value <= 1.1 and GAP[0] <= ends_of(gap)[0] and ends_of(gap)[1] <= GAP[1]
            for gap in numbers.values()
        )
        if far:
            note += " The recovered gap is far from 0 to 100 % and not drawn beside them; it has its card."
        elif numbers:
            groups.append(Group(title, "", numbers))
    return tuple(groups), note


# --- changed items ---------------------------------------------------------------------------------------------------


def pairs(models: Sequence[ModelFacts]) -> tuple[tuple[str, str], ...]:
    """The models that a reader wants to compare: each distilled one with the baseline, and with the teacher; where
    there is none, each model with the next."""

    def named(role: str) -> list[str]:
        return [facts.name for facts in models if facts.role == role]

    found = [(one, student) for student in named("distilled") for one in [*named("baseline"), *named("teacher")]]
    return tuple(found or pairwise(facts.name for facts in models))


def task_changes(task: TaskResult, a: str, b: str, folder: Path) -> Iterator[Change]:
    """The items of a task that changed from model ``a`` to model ``b``.

    Raises:
        MissingError: the file of items is not there, or has no answers of one of the models.
        DataError: it lies outside the evaluation's folder, or a line of it is not an item.
    """
    path = folder / str(task.items)
    if not path.resolve().is_relative_to(folder.resolve()):
        raise DataError(
            f"the items of {task.name} lie outside the evaluation's folder",
            {"folder": folder, "items": task.items},
            why="A file of results must not have other files read.",
            fix="Evaluate again.",
        )
    return changes(path, a, b, higher_is_better=task.higher_is_better)


def read_changes(tasks: Sequence[TaskResult], models: Sequence[ModelFacts], folder: Path) -> Iterator[Changes]:
    """The changes of every task and pair whose items are known. Those that cannot be read carry the reason."""
    for task in tasks:
        for a, b in pairs(models) if task.items is not None else ():
            if a not in task.scores or b not in task.scores:
                continue
            shown: dict[str, list[Change]] = {"gained": [], "lost": []}
            numbers, why = Counter[str](), None
            try:
                for change in task_changes(task, a, b, folder):
                    numbers[change.kind] += 1
                    if len(shown[change.kind]) < SHOWN:
                        shown[change.kind].append(change)
            except (StillroomError, OSError, UnicodeDecodeError) as error:
                why = error.what if isinstance(error, StillroomError) else str(error)
            few = min(len(shown["gained"]), max(SHOWN // 2, SHOWN - len(shown["lost"])))
            some = (*shown["gained"][:few], *shown["lost"][: SHOWN - few])
            counts = (numbers["gained"], numbers["lost"], some)
            yield Changes(task.name, a, b, task.num_items, *counts, str(task.items), why)


# --- training curves -------------------------------------------------------------------------------------------------


def read_training(runs: Mapping[str, Path]) -> Training:
    """The training loss and the held-out curves of each run. One that is not there, or is damaged, has a reason."""
    rows: dict[str, list[dict[str, Any]]] = {}
    missing: dict[str, str] = {}
    for name, run in runs.items():
        path = run / "metrics.jsonl"
        try:
            rows[name] = read_metrics(path)
        except FileNotFoundError:
            missing[name] = f"{path} is not there"
        except StillroomError as error:
            missing[name] = f"{error.what}, line {error.values.get('line', 'unknown')}"
        except OSError as error:
            missing[name] = f"{path} could not be read: {error.strerror}"
    return Training(tuple(_panels(rows)), missing)


def _panels(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterator[Panel]:
    for key, title in HELD_OUT.items():
        curves, level = [], None
        for name, lines in rows.items():
            points = [(r["step"], r["held_out"]) for r in lines if isinstance(r.get("held_out"), dict)]
            here = [(step, one[key]) for step, one in points if isinstance(one.get(key), int | float)]
            if here:
                curves.append(Curve(name, *map(list, zip(*here, strict=True))))
            for _, one in points:
                level = one.get(f"teacher_{key}", level)
        if curves:
            yield Panel(title, curves, level)
    losses = [curve for name, lines in rows.items() if (curve := _loss(name, lines)) is not None]
    if losses:
        yield Panel("training loss, each run's own objective", losses)


def _loss(name: str, lines: Sequence[Mapping[str, Any]]) -> Curve | None:
    """The loss of each step, thinned out, and its running mean over a fiftieth of the run to either side."""
    found = [(r["step"], r["loss_nats"]) for r in lines if isinstance(r.get("loss_nats"), int | float)]
    if not found:
        return None
    steps, losses = np.array([s for s, _ in found]), np.array([x for _, x in found], dtype=np.float64)
    n, half = len(losses), max(1, len(losses) // 50)
    total = np.concatenate(([0.0], np.cumsum(losses)))
    first, last = np.clip(np.arange(n) - half, 0, n), np.clip(np.arange(n) + half + 1, 0, n)
    smooth = (total[last] - total[first]) / (last - first)
    chosen = np.unique(np.linspace(0, n - 1, min(n, POINTS)).round().astype(int))
    return Curve(name, steps[chosen].tolist(), smooth[chosen].tolist(), losses[chosen].tolist())

"""Content: what a report says, in order, before it becomes a page or Markdown."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from stillroom.evaluate.report import tables, words
from stillroom.evaluate.report.changes import Changes, read_changes
from stillroom.evaluate.report.charts import Group
from stillroom.evaluate.report.palette import Look, looks
from stillroom.evaluate.report.tables import Table
from stillroom.evaluate.report.training import Training, read_training
from stillroom.evaluate.results import Difference, Passage, Results, TaskResult

HEADLINES = ("recovered_gap", "top1_agreement", "forward_kl_nats")
AGREEMENT = ("top1_agreement", "top10_overlap", "accepted_mass", "recovered_gap")
"""Shares of 1 that are drawn together."""
SENTENCES = 7
LEVELS = (0.1, 0.5, 1.0, 2.0, 4.0)
"""Where the shades of a token's KL begin, in nats."""


class Headline(NamedTuple):
    """A number that is read first: that of each student."""

    title: str
    about: str
    rows: tuple[tuple[int, str, tables.Cell], ...]
    """The model's number and name, and its value."""


class Report(NamedTuple):
    """Everything that is shown."""

    results: Results
    looks: tuple[Look, ...]
    title: str
    about: str
    headlines: tuple[Headline, ...]
    sentences: tuple[str, ...]
    task_groups: tuple[Group, ...]
    task_note: str
    agreement_groups: tuple[Group, ...]
    metrics: Table
    tasks: Table
    more_scores: tuple[Table, ...]
    differences: Table | None
    training: Training
    training_tables: tuple[Table, ...]
    breakdown_tables: tuple[Table, ...]
    worst: tuple[tuple[str, tuple[Passage, ...]], ...]
    changes: tuple[Changes, ...]
    sizes: Table
    fingerprints: Table
    versions: Table
    machine: Table

    @property
    def teacher(self) -> int | None:
        """The number of the teacher among the models."""
        return next((i for i, facts in enumerate(self.results.models) if facts.role == "teacher"), None)


def make_report(results: Results, folder: Path, runs: Mapping[str, Path]) -> Report:
    """Reads what the results name, items in ``folder`` and the metrics of ``runs``, and puts it into words."""
    names = [facts.name for facts in results.models]
    training = read_training({name: runs[name] for name in names if name in runs})
    groups, note = _task_groups(results.tasks)
    more = (tables.more_scores(task, names) for task in results.tasks)
    title = "How much of the teacher did the student keep?"
    return Report(
        results=results,
        looks=looks(results.models),
        title=title if any(facts.role == "teacher" for facts in results.models) else "Models side by side",
        about=_about(results),
        headlines=tuple(_headlines(results)),
        sentences=sentences(results),
        task_groups=groups,
        task_note=note,
        agreement_groups=tuple(_agreement(results)),
        metrics=tables.metric_table(results),
        tasks=tables.task_table(results),
        more_scores=tuple(table for table in more if table is not None),
        differences=tables.difference_table(results),
        training=training,
        training_tables=tuple(tables.training_tables(training.panels)),
        breakdown_tables=tuple(tables.breakdown_tables(results.breakdowns)),
        worst=tuple((name, results.worst[name]) for name in names if results.worst.get(name)),
        changes=tuple(read_changes(results.tasks, results.models, folder)),
        sizes=tables.size_table(results),
        fingerprints=tables.fingerprint_table(results),
        versions=tables.pair_table("Versions", results.versions),
        machine=tables.pair_table("Machine", results.machine),
    )


def _about(results: Results) -> str:
    parts = [f"{len(results.models)} model{'s' * (len(results.models) != 1)}"]
    if results.text is not None:
        text = results.text
        parts.append(f"{text.num_tokens:,} held-out tokens in {text.num_documents:,} documents of {text.name}")
    if done := [task for task in results.tasks if task.failed is None]:
        items = sum(task.num_items for task in done)
        parts.append(f"{len(done)} benchmark{'s' * (len(done) != 1)} of {items:,} items")
    return " · ".join(parts)


ABOUT = {
    "recovered_gap": "of the gap in cross-entropy between baseline and teacher",
    "top1_agreement": "how often both hold the same token for the likeliest",
    "forward_kl_nats": "nats a token; 0 is the teacher itself",
}


def _headlines(results: Results) -> Iterator[Headline]:
    """The distilled models first, then all others that have the number."""
    order = sorted(enumerate(results.models), key=lambda one: one[1].role != "distilled")
    for key in HEADLINES:
        metric = words.METRICS[key]
        numbers = [(i, f.name, results.metrics.get(f.name, {}).get(key)) for i, f in order if f.role != "teacher"]
        rows = tuple((i, name, tables.cell(one, metric.unit)) for i, name, one in numbers if one is not None)
        if rows:
            yield Headline(metric.title, ABOUT[key], rows)


def sentences(results: Results) -> tuple[str, ...]:
    """Of distilled models beside the baseline, then beside the teacher; tasks first."""
    roles = {facts.name: facts.role for facts in results.models}

    def shown(pair: tuple[str, str], found: Sequence[Difference]) -> Iterator[str]:
        for one in found:
            if {roles.get(one.a), roles.get(one.b)} == set(pair):
                yield f"{words.what(one.what)}: {one.sentence}"

    chief = [one for one in results.differences if one.what in ("cross_entropy_nats", *HEADLINES)]
    tasks = [one for task in results.tasks for one in task.differences]
    found = [
        *shown(("distilled", "baseline"), chief),
        *shown(("distilled", "baseline"), tasks),
        *shown(("distilled", "teacher"), chief),
        *shown(("distilled", "teacher"), tasks),
    ]
    return tuple(found[:SENTENCES])


def _task_groups(tasks: Sequence[TaskResult]) -> tuple[tuple[Group, ...], str]:
    """A group of bars for each task whose score is a share of 1, normalised where all have that; and what to note."""
    groups, left, normalised = [], [], False
    for task in tasks:
        if task.failed is not None:
            continue
        raw = {name: scores[task.metric] for name, scores in task.scores.items() if task.metric in scores}
        if task.normalised and task.normalised.keys() >= raw.keys():
            groups.append(Group(task.name, f"{task.metric}, normalised", task.normalised))
            normalised = True
        elif raw and task.higher_is_better and tables.unit_of(task) == words.SHARE:
            groups.append(Group(task.name, task.metric, raw))
        else:
            left.append(task.name)
    notes = ["Lines are 95 % intervals."]
    if normalised:
        notes.append("Normalised scores are 0 at chance and 100 at perfect; raw ones are in the table.")
    if left:
        notes.append(f"Not drawn, since {'their scores are' if len(left) > 1 else 'its score is'} no share: "
                     f"{', '.join(left)}.")  # fmt: skip
    return tuple(groups), " ".join(notes)


def _agreement(results: Results) -> Iterator[Group]:
    titles = {"top1_agreement": "same top token", "top10_overlap": "overlap of the top 10",
              "accepted_mass": "accepted mass", "recovered_gap": "recovered gap"}  # fmt: skip
    for key in AGREEMENT:
        numbers = {name: found[key] for name, found in results.metrics.items() if key in found}
        if numbers:
            yield Group(titles[key], "", numbers)


def level(kl_nats: float) -> int:
    """The shade of a token, 0 to 5."""
    return sum(kl_nats >= start for start in LEVELS)


def level_names() -> tuple[str, ...]:
    inner = (f"{a:g} to {b:g}" for a, b in pairwise(LEVELS))
    return (f"below {LEVELS[0]:g}", *inner, f"{LEVELS[-1]:g} and more")

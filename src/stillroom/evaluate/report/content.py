"""Content: what a report says, in order, before it becomes a page or Markdown."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from stillroom.evaluate.report import tables, words
from stillroom.evaluate.report.changes import Changes, read_changes
from stillroom.evaluate.report.charts import Group, ends_of
from stillroom.evaluate.report.palette import Look, looks
from stillroom.evaluate.report.tables import Table
from stillroom.evaluate.report.training import Training, read_training
from stillroom.evaluate.results import Difference, Number, Passage, Results, Role, TaskResult

HEADLINES = ("recovered_gap", "top1_agreement", "forward_kl_nats")
AGREEMENT = ("top1_agreement", "top10_overlap", "accepted_mass", "recovered_gap")
"""Shares of 1 that are drawn together."""
GAP = (-0.2, 1.3)
"""Where the interval of a recovered gap ends at most that is drawn beside shares, and its value in 0 to 1.1."""
FIRST = ("cross_entropy_nats", "bits_per_byte")
SENTENCES = 8
FAR = 0.01
"""Nats a token, in the mean, from which on a passage is told of as far from the teacher."""
LEVELS = (0.1, 0.5, 1.0, 2.0, 4.0)
"""Where the shades of a token's KL begin, in nats."""


class Headline(NamedTuple):
    """A number that is read first: that of each student."""

    title: str
    about: str
    rows: tuple[tuple[int, str, tables.Cell], ...]
    """The model's number and name, and its value."""


class ReportContent(NamedTuple):
    """Everything that is shown."""

    results: Results
    looks: tuple[Look, ...]
    title: str
    about: str
    headlines: tuple[Headline, ...]
    sentences: tuple[str, ...]
    task_groups: tuple[Group, ...]
    task_note: str
    task_axis: str
    agreement_groups: tuple[Group, ...]
    agreement_note: str
    metrics: Table
    tasks: Table
    failed: tuple[str, ...]
    """Of the tasks that have no score of any model: which, and why."""
    more_scores: tuple[Table, ...]
    task_differences: Table | None
    metric_differences: Table | None
    training: Training
    training_tables: tuple[Table, ...]
    breakdown_tables: tuple[Table, ...]
    worst: tuple[tuple[str, tuple[Passage, ...]], ...]
    """By model: its passages that are far from the teacher, or none."""
    changes: tuple[Changes, ...]
    sizes: Table
    fingerprints: Table
    versions: Table
    machine: Table

    @property
    def teacher(self) -> int | None:
        """The number of the teacher among the models."""
        return next((i for i, facts in enumerate(self.results.models) if facts.role == "teacher"), None)


def make_report(results: Results, folder: Path, runs: Mapping[str, Path]) -> ReportContent:
    """Reads what the results name, items in ``folder`` and the metrics of ``runs``, and puts it into words."""
    names = [facts.name for facts in results.models]
    training = read_training({name: runs[name] for name in names if name in runs})
    groups, note, axis = _task_groups(results.tasks)
    agreement, agreement_note = _agreement(results)
    more = (tables.more_scores(task, names) for task in results.tasks)
    title = "How much of the teacher did the student keep?"
    return ReportContent(
        results=results,
        looks=looks(results.models),
        title=title if any(facts.role == "teacher" for facts in results.models) else "Models side by side",
        about=_about(results),
        headlines=tuple(_headlines(results)),
        sentences=sentences(results),
        task_groups=groups,
        task_note=note,
        task_axis=axis,
        agreement_groups=agreement,
        agreement_note=agreement_note,
        metrics=tables.metric_table(results),
        tasks=tables.task_table(results),
        failed=tuple(tables.failure(task) for task in results.tasks if task.failed is not None and not task.scores),
        more_scores=tuple(table for table in more if table is not None),
        task_differences=tables.difference_table([one for task in results.tasks for one in task.differences]),
        metric_differences=tables.difference_table(results.differences),
        training=training,
        training_tables=tuple(tables.training_tables(training.panels)),
        breakdown_tables=tuple(tables.breakdown_tables(results.breakdowns)),
        worst=tuple((name, _far(results.worst[name])) for name in names if results.worst.get(name)),
        changes=tuple(read_changes(results.tasks, results.models, folder)),
        sizes=tables.size_table(results),
        fingerprints=tables.fingerprint_table(results),
        versions=tables.pair_table("Versions", results.versions),
        machine=tables.pair_table("Machine", results.machine),
    )


def _file(path: str) -> str:
    """The name of a file, whose folder stands further below; the whole of a hub's name."""
    return Path(path).name if path.startswith(("/", "~", ".")) else path


def _about(results: Results) -> str:
    parts = [f"{len(results.models)} model{'s' * (len(results.models) != 1)}"]
    if results.text is not None:
        text = results.text
        parts.append(f"{text.num_tokens:,} held-out tokens in {text.num_documents:,} documents of {_file(text.name)}")
    if done := [task for task in results.tasks if task.scores]:
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
        rows = tuple((i, name, tables.headline_cell(one, metric.unit)) for i, name, one in numbers if one is not None)
        if rows:
            yield Headline(metric.title, ABOUT[key], rows)


def sentences(results: Results) -> tuple[str, ...]:
    """The differences that are read first, in words: of distilled models beside the baseline, then beside the teacher;
    where there are none, of all models. Of each, the cross-entropy stands first, then tasks, then other metrics."""
    roles = {facts.name: facts.role for facts in results.models}
    chief = list(_chief(results.differences))
    first = [one for one in chief if one.what in FIRST]
    tasks = [one for task in results.tasks for one in task.differences]
    every = [*first, *tasks, *(one for one in chief if one.what not in FIRST)]

    def between(a: Role, b: Role) -> list[Difference]:
        return [one for one in every if {roles.get(one.a), roles.get(one.b)} == {a, b}]

    found = [*between("distilled", "baseline"), *between("distilled", "teacher")] or every
    return tuple(f"{words.what(one.what)}: {one.sentence}" for one in found[:SENTENCES])


def _chief(differences: Sequence[Difference]) -> Iterator[Difference]:
    """Those of the chief metrics; bits per byte only of models whose cross-entropies do not compare."""
    compared = {frozenset((one.a, one.b)) for one in differences if one.what == "cross_entropy_nats"}
    for one in differences:
        instead = one.what == "bits_per_byte" and frozenset((one.a, one.b)) not in compared
        if instead or one.what in (*FIRST[:1], *HEADLINES):
            yield one


def _task_groups(tasks: Sequence[TaskResult]) -> tuple[tuple[Group, ...], str, str]:
    """A group of bars for each task whose score is a share of 1, normalised where all have that; what to note; and what
    the axis is of."""
    groups, left, normalised = [], [], 0
    for task in tasks:
        if not task.scores:
            continue
        raw = {name: scores[task.metric] for name, scores in task.scores.items() if task.metric in scores}
        if task.normalised and task.normalised.keys() >= raw.keys():
            groups.append(Group(task.name, f"{task.metric}, normalised", task.normalised))
            normalised += 1
        elif raw and task.higher_is_better and tables.unit_of(task) == words.SHARE:
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
    axis = "0 is chance, 100 perfect" if normalised == len(groups) else "per cent"
    return tuple(groups), " ".join(notes), axis


def _agreement(results: Results) -> tuple[tuple[Group, ...], str]:
    """A group of bars for each share, and what to note. A recovered gap that is far from a share is not among them."""
    titles = {"top1_agreement": "same top token", "top10_overlap": "overlap of the top 10",
              "accepted_mass": "accepted mass", "recovered_gap": "recovered gap"}  # fmt: skip
    groups, note = [], "Held-out text; lines are 95 % intervals."
    for key in AGREEMENT:
        numbers = {name: found[key] for name, found in results.metrics.items() if key in found}
        if key == "recovered_gap" and not all(map(_as_a_share, numbers.values())):
            note += " The recovered gap is far from 0 to 100 % and not drawn beside them; it has its card."
        elif numbers:
            groups.append(Group(titles[key], "", numbers))
    return tuple(groups), note


def _as_a_share(gap: Number) -> bool:
    low, high = ends_of(gap)
    return 0 <= gap.value <= 1.1 and low >= GAP[0] and high <= GAP[1]


def _far(passages: Sequence[Passage]) -> tuple[Passage, ...]:
    return tuple(passage for passage in passages if passage.mean_kl_nats >= FAR)


def level(kl_nats: float) -> int:
    """The shade of a token, 0 to 5."""
    return sum(kl_nats >= start for start in LEVELS)


def level_names() -> tuple[str, ...]:
    inner = (f"{a:g} to {b:g}" for a, b in pairwise(LEVELS))
    return (f"below {LEVELS[0]:g}", *inner, f"{LEVELS[-1]:g} and more")

"""Findings: the numbers of a pre-flight that stand in a run's way, or are to be thought about; and the overlap of data
and tasks: text that is trained on and asked too, found by 13 words in a row (arXiv 2005.14165, C)."""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from stillroom.errors import StillroomError

Facts = Mapping[str, Any]

KNEE = 1 / 1.315
"""The teacher's loss over the student's, below which a better teacher is reported to have made a worse student. The
capacity gap is that of arXiv 2502.08606; this number was not checked against it."""
LOST = 0.1
"""The share of rows that may be cut or left out without a word."""
WORSE_THAN_A_GUESS = 1.05
"""A multiple of the cross-entropy of equal probability for every token: a trained model is far below."""
WORDS = 13
"""Words in a row. Fewer are shared by chance; nothing can be found in a text of fewer words."""
MOST_SHOWN = 5


class Finding(NamedTuple):
    """A finding in the four parts of an error."""

    level: Literal["error", "warning"]
    """An error is to be mended before the run; a warning is to be thought about."""
    of: str
    """The part of the pre-flight."""
    what: str
    values: dict[str, Any]
    why: str
    fix: str

    @classmethod
    def from_error(cls, of: str, error: StillroomError) -> "Finding":
        values = {name: value if isinstance(value, int | float) else str(value) for name, value in error.values.items()}
        return cls("error", of, error.what, values, error.why, error.fix)

    def __str__(self) -> str:
        return f"{self.level}: {StillroomError(self.what, self.values, why=self.why, fix=self.fix)}"


class TaskTexts(NamedTuple):
    """An item of a task: its question, with each of its answers."""

    id: str
    texts: Sequence[str]


class Shared(NamedTuple):
    """A place of a document that is an item's too."""

    document: str
    task: str
    item: str
    words: str


class Overlap(NamedTuple):
    """The overlap of some documents with the items of tasks."""

    num_documents: int
    num_shared: int
    """Documents that share words with an item."""
    num_items: dict[str, int]
    """The items by task."""
    num_items_shared: dict[str, int]
    """The items that share words with a document, by task."""
    num_short: dict[str, int]
    """The items of fewer words, in which nothing can be found, by task."""
    shown: tuple[Shared, ...]
    """The first few documents that do."""


def grams(text: str) -> Iterator[str]:
    """Yields every 13 words in a row of a text, in small letters. Any character but a letter, a digit or an underscore
    separates words."""
    words = re.findall(r"\w+", text.lower())
    return (" ".join(words[i : i + WORDS]) for i in range(len(words) - WORDS + 1))


def overlap(documents: Iterable[tuple[str, str]], tasks: Mapping[str, Iterable[TaskTexts]]) -> Overlap:
    """Returns which documents, given as (name, text), share 13 words in a row with an item of the tasks."""
    where: dict[str, list[tuple[str, str]]] = defaultdict(list)
    num_items, num_short = dict.fromkeys(tasks, 0), dict.fromkeys(tasks, 0)
    for task, items in tasks.items():
        for item in items:
            found = {gram for text in item.texts for gram in grams(text)}
            num_items[task] += 1
            num_short[task] += not found
            for gram in found:
                where[gram].append((task, item.id))
    shown: list[Shared] = []
    shared_items: set[tuple[str, str]] = set()
    num_documents = num_shared = 0
    for name, text in documents:
        num_documents += 1
        of_document = [gram for gram in grams(text) if gram in where]
        shared_items.update(place for gram in of_document for place in where[gram])
        if of_document:
            num_shared += 1
            if len(shown) < MOST_SHOWN:
                shown.append(Shared(name, *where[of_document[0]][0], of_document[0]))
    num_items_shared = {task: sum(place[0] == task for place in shared_items) for task in tasks}
    return Overlap(num_documents, num_shared, num_items, num_items_shared, num_short, tuple(shown))


def of_fit(fit: Facts) -> Iterator[Finding]:
    """Finds a chat template that teaches no student to stop."""
    if fit.get("learns_to_stop") is False:
        yield Finding(
            "warning",
            "fit",
            "no turn of the chat template has an end that is learned",
            {"template": fit["template"], "after the assistant's words": "nothing"},
            "The student never learns to stop, and writes on after its answer until it is cut.",
            "Let the template write an end of turn after the assistant's words, or keep its end in what is learned.",
        )


def of_data(counts: Facts) -> Iterator[Finding]:
    """Finds rows that lose text."""
    rows = counts.get("rows")
    lost = {name: n for name, n in counts.items() if n and name.startswith(("cut", "dropped"))}
    if rows and sum(lost.values()) > LOST * rows:
        yield Finding(
            "warning",
            "data",
            f"{sum(lost.values()) / rows:.0%} of the rows are cut or left out",
            {"rows": rows, **{name.replace("_", " "): n for name, n in lost.items()}},
            "What lies beyond the cut is never learned: the end of an answer, say, and with it to stop.",
            "Raise data.length, shorten the rows, or check what data.keep says is to be learned.",
        )


def of_overlap(found: Overlap) -> Iterator[Finding]:
    """Finds text that is trained on and asked."""
    if found.num_shared:
        yield Finding(
            "error",
            "overlap",
            f"{found.num_shared} of {found.num_documents} documents hold text of the evaluation's items",
            {
                **{task: f"{n} of {found.num_items[task]} items" for task, n in found.num_items_shared.items() if n},
                **{one.document: f"{one.task} {one.item}: “{one.words}”" for one in found.shown},
            },
            f"They share {WORDS} words in a row, so the student would be asked what it was trained on.",
            "Take these rows out of the data, or do not evaluate on these tasks; other rows of the data may hold more.",
        )


def of_measures(measured: Facts, vocab_size: int) -> Iterator[Finding]:
    """Finds faults in the losses of teacher and student before any training.

    Args:
        vocab_size: the tokens that are compared.
    """
    student, teacher = measured["cross_entropy_nats"], measured.get("teacher_cross_entropy_nats")
    trained, guess = measured["student"] == "trained", math.log(vocab_size)
    bad = [name for name, value in measured.items() if isinstance(value, float) and not math.isfinite(value)]
    if bad:
        yield Finding(
            "error",
            "measures",
            "what is measured is not finite",
            {name.replace("_", " "): str(measured[name]) for name in bad},
            "No step could learn from it.",
            "Check the weights of both models; where they are good, precision or teacher.dtype=float32 may mend it.",
        )
        return
    measures = {"teacher": teacher, "student": student if trained else None}
    worse = {who: nats for who, nats in measures.items() if nats is not None and nats > WORSE_THAN_A_GUESS * guess}
    for who, nats in worse.items():
        yield Finding(
            "error" if who == "teacher" else "warning",
            "measures",
            f"the {who} predicts this text worse than a guess",
            {f"{who}'s cross-entropy": f"{nats:.4f} nats", "equal probability for every token": f"{guess:.4f} nats"},
            "A trained model is far below that on text of its kind, in the form in which it saw it.",
            f"Check that these are the {who}'s trained weights, tokenizer and chat template, and a language it knows.",
        )
    if teacher is None or not trained or worse:
        return
    values = {"teacher": f"{teacher:.4f} nats", "student": f"{student:.4f} nats", "ratio": f"{teacher / student:.3f}"}
    if teacher >= student:
        yield Finding(
            "warning",
            "measures",
            "the teacher predicts this text no better than the student",
            values,
            "Its labels alone would teach the student more than this teacher can.",
            "Use data that the teacher knows (its own answers, say), or a better teacher.",
        )
    elif teacher / student < KNEE:
        yield Finding(
            "warning",
            "measures",
            "the teacher is far ahead of the student",
            {**values, "reported knee": f"1/1.315 = {KNEE:.3f}"},
            "A teacher that is too good can make a worse student (the capacity gap, arXiv 2502.08606); that it begins "
            "near this ratio is reported, and not measured here. The student's loss there is what it reaches on labels "
            "alone, here what it has before training.",
            "Where training does not close the gap, try a teacher between the two, or a larger student.",
        )

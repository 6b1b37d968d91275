"""Overlap: text that is trained on and asked in an evaluation too, found by 13 words in a row (arXiv 2005.14165, C)."""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

WORDS = 13
"""Words in a row. Fewer are shared by chance; nothing can be found in a text of fewer words."""
MOST_SHOWN = 5


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

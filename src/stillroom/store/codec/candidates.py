"""The candidates of a position: the ids that the tables' lists name, in classes of likelihood. Needs numba.

The inner functions are compiled without reference counts (``_nrt``), which would cost more than the work: they make no
arrays. Their indices are unsigned where it counts, for a signed one is tested for a negative value at each use.
"""

from typing import NamedTuple

import numpy as np
from numba import njit

from stillroom.store.codec.range_coder import INNER

LIST_SIZES = (320, 160)
"""At most so many entries in a list after a token and in one beside a token."""

MAX_CANDIDATES = 1024

NUM_CLASSES, FAR = 33, 32

CLASS_SHIFT = 2

CODED = -(1 << 28)


class Tables(NamedTuple):
    offsets: np.ndarray  # [2 v + 1] the first entry of each token's list: after it, then beside it
    entries: np.ndarray  # [n] id + gain * 2**24: how much likelier the list makes the id, in half octaves
    scores: np.ndarray  # [v] log2 of each id's share in eighths of an octave
    ranks: np.ndarray  # [v] rank of each id, the most frequent first
    ranked: np.ndarray  # [v] ids by rank
    weights: np.ndarray  # [9, 33] relative probability of one member of each class, by slot
    most: np.ndarray  # [2] the most entries and the most samples of a position that were seen
    numbers: np.ndarray  # [contexts, 94] cumulative frequencies of symbols


class Scratch(NamedTuple):
    base: np.ndarray  # [1] candidate i of the current position is known by where == base + i
    where: np.ndarray  # [v]
    ids: np.ndarray  # [candidates]
    scores: np.ndarray  # log2 of their shares in eighths of an octave, CODED once coded
    classes: np.ndarray
    places: np.ndarray  # place of each candidate in order
    order: np.ndarray  # candidates by class
    cursors: np.ndarray  # [34, 4] where each class's next member goes, for four parts of the candidates side by side
    firsts: np.ndarray  # [34] where each class begins in order
    sizes: np.ndarray  # [34] members not yet coded
    observed: np.ndarray  # [9, 33] TRAIN: how often an id of the class came
    expected: np.ndarray  # [9, 33] TRAIN: how often the weights say, times 2**16


@njit(**INNER)
def add_list(tables, scratch, key, times, count):
    """Adds a list's entries to the candidates and their scores; the number of candidates after it."""
    offsets, entries, general = tables.offsets, tables.entries, tables.scores
    where, base, found, scores = scratch.where, scratch.base[0], scratch.ids, scratch.scores
    for k in range(np.uint64(offsets[key]), np.uint64(offsets[key + 1])):
        token = np.uint64(entries[k] & 0xFFFFFF)
        gain = times * (entries[k] >> 24)
        known = where[token] - base
        if known < 0:
            i = np.uint64(count)
            where[token] = base + count
            found[i] = token
            scores[i] = general[token] + gain
            count += 1
        else:
            scores[np.uint64(known)] += gain
    return count


@njit(**INNER)
def sort_classes(scratch, count, with_next):
    """Puts the candidates not yet coded into classes by their distance from the best, class 0 being the next token."""
    scores, classes, places, order = scratch.scores, scratch.classes, scratch.places, scratch.order
    cursors, firsts, sizes = scratch.cursors, scratch.firsts, scratch.sizes
    top = np.int32(CODED)
    for i in range(np.uint64(with_next), np.uint64(count)):
        top = max(top, scores[i])
    for i in range(np.uint64(count)):
        distance = min((top - scores[i]) >> np.int32(CLASS_SHIFT), np.int32(FAR - 2))
        classes[i] = np.int32(FAR + 1) if scores[i] <= np.int32(CODED >> 1) else np.int32(1) + distance
    classes[count : count + 3] = FAR + 1
    if with_next and scores[0] > CODED >> 1:
        classes[0] = 0
    quarter = np.uint64((count + 3) >> 2)
    cursors[:] = 0
    for i in range(quarter):
        for part in range(np.uint64(4)):
            cursors[classes[i + part * quarter], part] += 1
    place = np.int64(0)
    for c in range(FAR + 2):
        firsts[c] = place
        for part in range(4):
            place, cursors[c, part] = place + cursors[c, part], place
        sizes[c] = place - firsts[c]
    for i in range(quarter):
        for part in range(np.uint64(4)):
            j = i + part * quarter
            place = cursors[classes[j], part]
            cursors[classes[j], part] = place + 1
            order[np.uint64(place)] = j
            places[j] = place
    sizes[FAR] = 1


@njit(forceinline=True, **INNER)
def remove(scratch, c, within):
    """Takes a class's member out of the candidates; the member."""
    place = np.uint64(scratch.firsts[c] + within)
    last = np.uint64(scratch.firsts[c] + scratch.sizes[c] - 1)
    i, moved = np.uint64(scratch.order[place]), np.uint64(scratch.order[last])
    scratch.order[place], scratch.order[last] = moved, i
    scratch.places[moved] = place
    scratch.scores[i] = CODED
    scratch.sizes[c] -= 1
    return i


@njit(**INNER)
def renew(scratch):
    """Forgets the candidates."""
    if scratch.base[0] > 1 << 30:
        scratch.where[:] = -1
        scratch.base[0] = 0
    scratch.base[0] += MAX_CANDIDATES
    scratch.scores[MAX_CANDIDATES - 1] = CODED

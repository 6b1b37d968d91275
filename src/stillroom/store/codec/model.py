"""The model of the codec's ids: a position's candidates, which are the ids that the tables' lists name, in classes of
likelihood. Needs numba; see the package for the layout.

The inner functions are compiled without reference counts (``_nrt``), which would cost more than the work: they make no
arrays. Their indices are unsigned where it counts, for a signed one is tested for a negative value at each use.
"""

from typing import NamedTuple

import numpy as np
from numba import njit

from stillroom.store.codec.coder import (
    DAMAGED,
    DECODE,
    ENCODE,
    FAR_RANK,
    INNER,
    LOW,
    OPTIONS,
    PLACE,
    RANGE,
    TIMES,
    TRAIN,
    UNIT,
    code_head,
    code_levels,
    finish,
    grown,
    narrow,
    number,
    power,
    share,
    start,
    uniform,
)

LIST_SIZES = (320, 160)
"""At most so many entries in a list after a token and in one beside a token."""
MAX_CANDIDATES = 1024
NUM_CLASSES, FAR = 33, 32
CLASS_SHIFT = 2
CODED = -(1 << 28)
NUM_SLOTS, SAMPLED = 9, 8
AFTER, BESIDE_NEXT, BESIDE_FIRST = 4, 2, 3
"""The weights of the lists' entries, in eighths of an octave for each half octave."""


class Tables(NamedTuple):
    offsets: np.ndarray  # [2 v + 1] the first entry of each token's list: after it, then beside it
    entries: np.ndarray  # [n] id + gain * 2**24: how much likelier the list makes the id, in half octaves
    scores: np.ndarray  # [v] log2 of each id's share in eighths of an octave
    ranks: np.ndarray  # [v] rank of each id, the most frequent first
    ranked: np.ndarray  # [v] ids by rank
    log_weights: np.ndarray  # [9, 33] log2 of the weights in eighths of an octave
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
def code_far(mode, tables, scratch, coder, buffer, context, token):
    """An id that is no candidate, by its rank."""
    rank = np.int64(0) if mode == DECODE else np.int64(tables.ranks[token])
    rank = number(coder, buffer, mode, tables.numbers, FAR_RANK + context, rank)
    if mode == DECODE:
        if rank >= len(tables.ranked) or scratch.where[tables.ranked[rank]] >= scratch.base[0]:
            coder[DAMAGED] = 1
            return np.int32(0)
        token = tables.ranked[rank]
    scratch.where[token] = scratch.base[0] + MAX_CANDIDATES - 1
    return token


@njit(forceinline=True, **INNER)
def mass_of(sizes, weights, first):
    """The weight of all members of the classes from ``first``."""
    total = np.int64(0)
    for c in range(np.uint64(first), np.uint64(NUM_CLASSES)):
        total += sizes[c] * weights[c]
    return total


@njit(forceinline=True, **INNER)
def code_id(mode, tables, scratch, coder, buffer, weights, total, token):
    """An exact entry's id and its class, by the weights of the classes' members; ``total`` is the weight of all."""
    sizes = scratch.sizes
    if mode != TRAIN:
        coder[UNIT] = np.uint64(coder[RANGE]) // np.uint64(total)
    below, c, i, within = np.int64(0), np.uint64(0), np.int64(0), np.int64(0)
    if mode == DECODE:
        mass = sizes[0] * weights[0]
        while c < np.uint64(FAR) and (below + mass) * coder[UNIT] <= coder[LOW]:
            below += mass
            c += np.uint64(1)
            mass = sizes[c] * weights[c]
        member = np.uint64(weights[c] * coder[UNIT])
        within = min(np.int64(np.uint64(coder[LOW] - below * coder[UNIT]) // member), sizes[c] - 1)
    else:
        i = scratch.where[token] - scratch.base[0]
        if i >= 0 and scratch.scores[i] <= CODED >> 1:
            coder[DAMAGED] = 1
            return token, np.uint64(FAR)
        if i >= 0:
            c = np.uint64(scratch.classes[i])
            within = np.int64(scratch.places[i]) - scratch.firsts[c]
        else:
            c = np.uint64(FAR)
        for b in range(c):
            below += sizes[b] * weights[b]
    narrow(coder, buffer, mode, below + within * weights[c], weights[c])
    if c == FAR:
        return code_far(mode, tables, scratch, coder, buffer, 0, token), c
    return scratch.ids[remove(scratch, c, within)], c


@njit(**INNER)
def sort_samples(scratch, tables, ids, times, begin, end):
    """Sorts a position's samples by class, place and, beyond the candidates, rank."""
    for k in range(begin + 1, end):
        token, often = ids[k], times[k]
        key = sample_key(scratch, tables, token)
        j = k
        while j > begin and sample_key(scratch, tables, ids[j - 1]) > key:
            ids[j], times[j] = ids[j - 1], times[j - 1]
            j -= 1
        ids[j], times[j] = token, often


@njit(forceinline=True, **INNER)
def sample_key(scratch, tables, token):
    i = scratch.where[token] - scratch.base[0]
    return scratch.places[i] if i >= 0 else MAX_CANDIDATES + tables.ranks[token]


@njit(forceinline=True, **INNER)
def code_sample(mode, tables, scratch, coder, buffer, left, c0, within0, token):
    """The first of ``left`` samples in the order of classes, none of them before number ``within0`` of class ``c0``."""
    sizes, weights = scratch.sizes, tables.weights[SAMPLED]
    total = mass_of(sizes, weights, c0) - within0 * weights[c0]
    i = np.int64(0)
    target = FAR
    if mode != DECODE:
        i = scratch.where[token] - scratch.base[0]
        if i >= 0 and scratch.scores[i] <= CODED >> 1:
            coder[DAMAGED] = 1
            return FAR, np.int64(0)
        target = FAR if i < 0 else scratch.classes[i]
    unit = share(coder, mode, np.int64((1 << 20) + NUM_CLASSES))
    c, mass = c0, (sizes[c0] - within0) * weights[c0]
    begin, survived = np.int64(0), total - mass
    stop = (1 << 20) - power((survived << 20) // max(total, 1), left) + 1
    while (stop <= unit if mode == DECODE else c != target) and c < FAR:
        c += 1
        begin = stop
        if sizes[c] == 0:
            continue
        survived -= sizes[c] * weights[c]
        stop = (1 << 20) - power((survived << 20) // max(total, 1), left) + c - c0 + 1
    if c == FAR:
        stop = np.int64((1 << 20) + NUM_CLASSES)
    narrow(coder, buffer, mode, begin, stop - begin)
    if mode == TRAIN:
        scratch.observed[SAMPLED, c] += 1
        for b in range(c0, NUM_CLASSES):
            members = sizes[b] - (within0 if b == c0 else 0)
            scratch.expected[SAMPLED, b] += (members * weights[b] << 16) // max(total, 1)
    if c == FAR:
        return c, np.int64(0)
    least = within0 if c == c0 else np.int64(0)
    if sizes[c] <= least:
        coder[DAMAGED] = 1
        return FAR, np.int64(0)
    place = np.int64(scratch.places[i] - scratch.firsts[c])
    return c, least + uniform(coder, buffer, mode, sizes[c] - least, place - least)


@njit(**INNER)
def code_samples(mode, tables, scratch, coder, buffer, ids, times, begin, end):
    """A position's samples, in the order of ``sort_samples``."""
    c, within = 0, np.int64(0)
    for k in range(begin, end):
        if c != FAR:
            c, place = code_sample(mode, tables, scratch, coder, buffer, end - k, c, within, ids[k])
            within = place + 1
            if c != FAR and mode == DECODE:
                ids[k] = scratch.ids[scratch.order[scratch.firsts[c] + place]]
        if c == FAR:
            ids[k] = code_far(mode, tables, scratch, coder, buffer, 1, ids[k])
        times[k] = 1 + number(coder, buffer, mode, tables.numbers, TIMES + (c >> 2), times[k] - 1)
        if coder[DAMAGED]:
            return


@njit(forceinline=True, **INNER)
def slot_of(j):
    """The slot of the j-th exact id: 0, 1, 2, 3-4, 5-8, 9-16, 17-32 and beyond."""
    if j < 3:
        return j
    slot = 3
    while slot < 7 and 1 << (slot - 1) < j:
        slot += 1
    return slot


@njit(**INNER)
def code_ids(mode, tables, scratch, coder, buffer, tokens, p, row_stop, with_samples, ids, begin, end):
    """A position's exact ids, most likely first; makes the candidates for them and for the samples."""
    if begin == end and not with_samples:
        return
    size = len(tables.ranked)
    if scratch.base[0] > 1 << 30:
        scratch.where[:] = -1
        scratch.base[0] = 0
    scratch.base[0] += MAX_CANDIDATES  # which forgets the candidates of the position before
    scratch.scores[MAX_CANDIDATES - 1] = CODED
    count, with_next = 0, 0
    if p + 1 < row_stop:
        scratch.where[tokens[p + 1]] = scratch.base[0]
        scratch.ids[0], scratch.scores[0] = tokens[p + 1], 0
        count, with_next = 1, 1
        count = add_list(tables, scratch, size + tokens[p + 1], BESIDE_NEXT, count)
    count = add_list(tables, scratch, tokens[p], AFTER, count)
    sort_classes(scratch, count, with_next)
    slot, weights = 0, tables.weights[0]  # slot 1 is another slot, so a re-sort after the first id makes the total anew
    total = mass_of(scratch.sizes, weights, 0)
    for k in range(begin, end):
        if slot_of(k - begin) != slot:
            slot = slot_of(k - begin)
            weights = tables.weights[slot]
            total = mass_of(scratch.sizes, weights, 0)
        if mode == TRAIN:
            for c in range(NUM_CLASSES):
                scratch.expected[slot, c] += (scratch.sizes[c] * weights[c] << 16) // total
        ids[k], c = code_id(mode, tables, scratch, coder, buffer, weights, total, ids[k])
        if coder[DAMAGED]:
            return
        if c != FAR:
            total -= weights[c]
        if mode == TRAIN:
            scratch.observed[slot, c] += 1
        if k == begin and c > 0:
            count = add_list(tables, scratch, size + ids[k], BESIDE_FIRST, count)
            sort_classes(scratch, count, with_next)


@njit(**OPTIONS)
def code_rows(
    mode, tables, scratch, tokens, offsets, buffer, bounds, counts, ids, levels, sample_counts, sample_ids, times, side
):
    """Codes rows of positions in one pass; the row that is damaged, or -1, and the arrays of entries.

    ENCODE writes each row to the buffer, which the caller makes large enough, and where it ends to ``bounds``. DECODE
    reads row r from bytes ``bounds[r]`` to ``bounds[r + 1]``.
    """
    coder = np.zeros(6, np.int64)
    e = d = 0
    for row in range(len(offsets) - 1):
        start(coder, buffer, mode, bounds[row], bounds[row + 1] if mode == DECODE else len(buffer))
        for p in range(offsets[row], offsets[row + 1]):
            branch = code_head(mode, tables, coder, buffer, p, side, counts, sample_counts)
            if coder[DAMAGED]:
                break
            end, sample_end = e + counts[p], d + sample_counts[p]
            ids, levels = grown(ids, end, mode), grown(levels, end, mode)
            sample_ids, times = grown(sample_ids, sample_end, mode), grown(times, sample_end, mode)
            code_levels(mode, tables, coder, buffer, branch, levels, e, end)
            stop = offsets[row + 1]
            code_ids(mode, tables, scratch, coder, buffer, tokens, p, stop, sample_end > d, ids, e, end)
            if coder[DAMAGED]:
                break
            if mode != DECODE:
                sort_samples(scratch, tables, sample_ids, times, d, sample_end)
            code_samples(mode, tables, scratch, coder, buffer, sample_ids, times, d, sample_end)
            e, d = end, sample_end
            if coder[DAMAGED]:
                break
        if not coder[DAMAGED]:
            finish(coder, buffer, mode)
        if coder[DAMAGED]:
            return row, e, d, ids, levels, sample_ids, times
        if mode == ENCODE:
            bounds[row + 1] = coder[PLACE]
    return -1, e, d, ids, levels, sample_ids, times

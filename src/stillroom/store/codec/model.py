"""The model of the codec: the probability of each number of a position. Needs numba; see the package for the layout."""

import numpy as np
from numba import njit

from stillroom.store.codec.candidates import (
    CODED,
    FAR,
    MAX_CANDIDATES,
    NUM_CLASSES,
    add_list,
    remove,
    renew,
    sort_classes,
)
from stillroom.store.codec.range_coder import (
    DAMAGED,
    DECODE,
    ENCODE,
    INNER,
    LOW,
    OPTIONS,
    PLACE,
    RANGE,
    TRAIN,
    UNIT,
    finish,
    narrow,
    number,
    share,
    start,
    symbol_of,
    uniform,
)

NUM_SLOTS, SAMPLED = 9, 8

NUM_BRANCHES = 48

COUNT, SAMPLE_COUNT, FIRST = 0, NUM_BRANCHES, 2 * NUM_BRANCHES

STEP = 3 * NUM_BRANCHES

TIMES = STEP + 7 * 8 * 4

FAR_RANK = TIMES + 9

SIDE = FAR_RANK + 2

AFTER, BESIDE_NEXT, BESIDE_FIRST = 4, 2, 3
"""How much a list's entries count, in eighths of an octave for each half octave."""


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


@njit(**INNER)
def power(x, n):
    """``x ** n`` for x in units of 2**-20."""
    y = np.int64(1 << 20)
    while n > 0:
        if n & 1:
            y = y * x >> 20
        x = x * x >> 20
        n >>= 1
    return y


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


@njit(forceinline=True, **INNER)
def step_context(left, level, last):
    """The context of a step: entries left (1, 2, 3-4, 5-8, ...), level (by 8), last step (0, 1, 2-3, more)."""
    many = 0
    while many < 6 and (1 << many) < left:
        many += 1
    return STEP + (many * 8 + min(level >> 3, 7)) * 4 + (min(last, 2) if last < 4 else 3)


@njit(**INNER)
def code_levels(mode, tables, coder, buffer, branch, levels, begin, end):
    """A position's levels: the first, then each one's step from the one before."""
    last = 0
    for k in range(begin, end):
        if k == begin:
            levels[k] = number(coder, buffer, mode, tables.numbers, FIRST + branch, np.int64(levels[k]))
            continue
        context = step_context(end - k, levels[k - 1], last)
        last = number(coder, buffer, mode, tables.numbers, context, levels[k] - levels[k - 1])
        if mode == DECODE:
            if levels[k - 1] + last >= 1 << 24:
                coder[DAMAGED] = 1
                return
            levels[k] = levels[k - 1] + last


@njit(**INNER)
def code_ids(mode, tables, scratch, coder, buffer, tokens, p, row_stop, with_samples, ids, begin, end):
    """A position's exact ids, most likely first; makes the candidates for them and for the samples."""
    if begin == end and not with_samples:
        return
    size = len(tables.ranked)
    renew(scratch)
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


@njit(forceinline=True, **INNER)
def folded(count, most):
    """A count as its distance from the most, or itself beyond; its own inverse."""
    return most - count if count <= most else np.int64(count)


@njit(**INNER)
def code_head(mode, tables, coder, buffer, p, side, counts, sample_counts):
    """A position's side numbers and how many entries and samples it has; the branch that the side numbers choose."""
    branch = 0
    for s in range(side.shape[1]):
        context = SIDE + s * NUM_BRANCHES + branch
        side[p, s] = number(coder, buffer, mode, tables.numbers, context, np.int64(side[p, s]))
        branch = min(symbol_of(side[p, s]), NUM_BRANCHES - 1)
    if side.shape[1] > 0:
        branch = min(symbol_of(side[p, 0]), NUM_BRANCHES - 1)
    found = number(coder, buffer, mode, tables.numbers, COUNT + branch, folded(counts[p], tables.most[0]))
    counts[p] = folded(found, tables.most[0])
    context = SAMPLE_COUNT + min(counts[p], NUM_BRANCHES - 1)
    found = number(coder, buffer, mode, tables.numbers, context, folded(sample_counts[p], tables.most[1]))
    sample_counts[p] = folded(found, tables.most[1])
    if counts[p] > len(tables.ranked) or sample_counts[p] > len(tables.ranked) - counts[p]:
        coder[DAMAGED] = 1
    return branch


@njit(**OPTIONS)
def grown(array, size, mode):
    """The array, or a larger one that holds ``size`` numbers."""
    if mode != DECODE or size <= len(array):
        return array
    larger = np.empty(max(size, 2 * len(array)), np.int32)
    larger[: len(array)] = array
    return larger


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

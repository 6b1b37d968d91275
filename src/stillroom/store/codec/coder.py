"""The range coder, and whole numbers in it: side numbers, counts, levels. Imported only when something is encoded or
decoded, since it needs numba.

Everything is written once for three modes: TRAIN counts symbols, ENCODE writes bytes, DECODE reads them. The coder is
an int64 array: low end (or, decoding, the bytes read less the low end), range, place in the buffer, end of the buffer,
damage found, unit. The range is kept in [2**40, 2**56] and renormalized by two bytes.
"""

import numpy as np
from numba import njit

TRAIN, ENCODE, DECODE = 0, 1, 2
LOW, RANGE, PLACE, END, DAMAGED, UNIT = 0, 1, 2, 3, 4, 5
NUM_SYMBOLS, ESCAPE, TOTAL_BITS = 93, 92, 14
NUM_BRANCHES = 48
COUNT, SAMPLE_COUNT, FIRST, STEP = 0, NUM_BRANCHES, 2 * NUM_BRANCHES, 3 * NUM_BRANCHES
TIMES = STEP + 7 * 8 * 4
FAR_RANK = TIMES + 9
SIDE = FAR_RANK + 2
OPTIONS = {"cache": True, "nogil": True, "error_model": "numpy"}
INNER = {**OPTIONS, "_nrt": False}


@njit(**INNER)
def start(coder, buffer, mode, place, end):
    """Begins a message: bytes ``place`` to ``end`` of the buffer."""
    coder[LOW], coder[RANGE], coder[PLACE], coder[END], coder[DAMAGED] = 0, 1 << 56, place, end, 0
    if mode == DECODE:
        for _ in range(7):
            coder[LOW] = coder[LOW] << 8 | (buffer[coder[PLACE]] if coder[PLACE] < end else 0)
            coder[PLACE] += 1


@njit(**INNER)
def carry(coder, buffer):
    """Adds one to the number that the bytes written so far spell."""
    coder[LOW] -= 1 << 56
    place = coder[PLACE] - 1
    while buffer[place] == 255:
        buffer[place] = 0
        place -= 1
    buffer[place] += 1


@njit(**INNER)
def finish(coder, buffer, mode):
    """Ends a message: writes the fewest bytes that name the interval, or checks that no byte is left over."""
    if mode == DECODE:
        if coder[PLACE] < coder[END] or coder[PLACE] > coder[END] + 7:
            coder[DAMAGED] = 1
    elif mode == ENCODE:
        size, rest = 0, np.int64((1 << 56) - 1)
        while ((coder[LOW] + rest) & ~rest) >= coder[LOW] + coder[RANGE]:
            size += 1
            rest >>= 8
        coder[LOW] = (coder[LOW] + rest) & ~rest
        if coder[LOW] >= 1 << 56:
            carry(coder, buffer)
        for i in range(size):
            buffer[coder[PLACE]] = coder[LOW] >> (48 - 8 * i) & 255
            coder[PLACE] += 1


@njit(forceinline=True, **INNER)
def share(coder, mode, total):
    """Splits the range into ``total`` units; decoding, the number of the unit that the message lies in."""
    if mode == TRAIN:
        return 0
    coder[UNIT] = np.uint64(coder[RANGE]) // np.uint64(total)
    if mode != DECODE:
        return 0
    return min(np.int64(np.uint64(coder[LOW]) // np.uint64(coder[UNIT])), total - 1)


@njit(forceinline=True, **INNER)
def narrow(coder, buffer, mode, first, size):
    """Goes on with the ``size`` units from ``first``."""
    if mode == TRAIN:
        return
    coder[RANGE] = size * coder[UNIT]
    if mode == DECODE:
        coder[LOW] -= first * coder[UNIT]
        if coder[LOW] >= coder[RANGE]:
            coder[LOW], coder[DAMAGED] = 0, 1
        while coder[RANGE] < 1 << 40:
            coder[RANGE] <<= 16
            place, end = coder[PLACE], coder[END]
            high = np.int64(buffer[place]) if place < end else 0
            coder[LOW] = coder[LOW] << 16 | high << 8 | (np.int64(buffer[place + 1]) if place + 1 < end else 0)
            coder[PLACE] = place + 2
            if coder[PLACE] > end + 8:
                coder[DAMAGED] = 1
    else:
        coder[LOW] += first * coder[UNIT]
        if coder[LOW] >= 1 << 56:
            carry(coder, buffer)
        while coder[RANGE] < 1 << 40:
            coder[RANGE] <<= 16
            place = coder[PLACE]
            buffer[place], buffer[place + 1] = coder[LOW] >> 48 & 255, coder[LOW] >> 40 & 255
            coder[LOW] = (coder[LOW] & ((1 << 40) - 1)) << 16
            coder[PLACE] = place + 2


@njit(**INNER)
def uniform(coder, buffer, mode, total, value):
    """One of ``total`` equally likely numbers."""
    if total > 1:
        unit = share(coder, mode, total)
        value = unit if mode == DECODE else value
        narrow(coder, buffer, mode, value, 1)
        return value
    return 0


@njit(forceinline=True, **INNER)
def symbol_of(value):
    """The symbol of a number: itself below 8, then four symbols an octave."""
    bits = 0
    while value >> bits >= 8:
        bits += 1
    return value if bits == 0 else 4 + 4 * bits + (value >> bits) - 4


@njit(**INNER)
def number(coder, buffer, mode, tables, context, value):
    """A number below 2**24, under its context's 94 cumulative frequencies (TRAIN: they count the symbols)."""
    if mode == TRAIN:
        tables[context, symbol_of(value)] += 1
        return value
    coder[UNIT] = coder[RANGE] >> TOTAL_BITS
    context, at = np.uint64(context), np.uint64(0)
    if mode == DECODE:
        while at < np.uint64(ESCAPE) and tables[context, at + np.uint64(1)] * coder[UNIT] <= coder[LOW]:
            at += np.uint64(1)
    else:
        at = np.uint64(symbol_of(value))
        if tables[context, at + np.uint64(1)] == tables[context, at]:
            at = np.uint64(ESCAPE)
    first = tables[context, at]
    narrow(coder, buffer, mode, first, tables[context, at + np.uint64(1)] - first)
    symbol = np.int64(at)
    if symbol < 8:
        return symbol
    if symbol == ESCAPE:
        return uniform(coder, buffer, mode, np.int64(1 << 24), value)
    bits = (symbol - 4) >> 2
    coder[UNIT] = coder[RANGE] >> bits
    low = min(coder[LOW] // coder[UNIT], (1 << bits) - 1) if mode == DECODE else value & ((1 << bits) - 1)
    narrow(coder, buffer, mode, low, 1)
    return (4 + (symbol & 3)) << bits | low


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

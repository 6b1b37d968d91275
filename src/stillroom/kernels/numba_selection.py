"""Selections on a CPU, one row at a time while it lies in the cache. Needs numba.

What they do is defined by :func:`stillroom.selection.likeliest` and :func:`stillroom.selection.head_and_sample`, whose
tensor forms run on every other device.
"""

import numpy as np
from numba import njit

from stillroom.kernels.numba_math import SUMS, f32, i32, largest, ordered, softmax

BLOCK = 64
"""Columns of which the sum and the largest are taken together."""

OPTIONS = {"cache": True, "nogil": True, "error_model": "numpy"}

INNER = {**OPTIONS, "_nrt": False}


@njit(**INNER)
def summarise(row, sums, tops):
    """The sum and the largest of each block of a row; returns the largest of all."""
    bits, top = row.view(np.int32), ordered(i32(f32(-np.inf).view(np.int32)))
    for b in range(len(sums)):
        here = slice(b * BLOCK, b * BLOCK + BLOCK)
        sums[b] = sum_of(row[here])
        most = largest_of(bits[here])
        tops[b] = i32(ordered(most)).view(np.float32)
        top = max(top, most)
    return i32(ordered(top)).view(np.float32)


@njit(**INNER)
def largest_of(bits):
    """In the order that ``ordered`` gives."""
    most = ordered(bits[0])
    for j in range(len(bits)):
        most = max(most, ordered(bits[j]))
    return most


@njit(**SUMS)
def sum_of(block):
    total = np.float32(0)
    for j in range(len(block)):
        total += block[j]
    return total


@njit(**INNER)
def find_largest(row, tops, bound, most, ids, values):
    """Fills in the ``most`` largest of a row that are at least ``bound``, largest first; returns how many they are.

    Among equals lower columns come first.
    """
    count = 0
    for b in range(len(tops)):
        if tops[b] < bound or (count == most and tops[b] == bound):
            continue
        for j in range(b * BLOCK, min(b * BLOCK + BLOCK, len(row))):
            value = row[j]
            if value < bound or (count == most and value == bound):
                continue
            place = min(count, most - 1)
            while place > 0 and values[place - 1] < value:
                values[place], ids[place] = values[place - 1], ids[place - 1]
                place -= 1
            values[place], ids[place] = value, j
            count = min(count + 1, most)
            if count == most:
                bound = values[most - 1]
    return count


@njit(**INNER)
def take_head(row, sums, tops, top, least, ids, values):
    """Takes the likeliest entries out of a row: those that are at least ``least``, but always one."""
    if top < least:
        count = find_largest(row, tops, top, 1, ids, values)
    else:
        count = find_largest(row, tops, np.float32(least), len(ids), ids, values)
    for i in range(count):
        row[ids[i]] = 0
    for i in range(count):
        b = ids[i] // BLOCK
        sums[b] = sum_of(row[b * BLOCK : b * BLOCK + BLOCK])


@njit(**INNER)
def draw(row, sums, first, unit, rest, ids, values):
    """The columns in which the points ``first``, ``first + unit``, … below ``rest`` of the cumulative sum lie."""
    below, b, last, count = 0.0, 0, len(sums) - 1, 0
    while last > 0 and sums[last] == 0:
        last -= 1
    for i in range(len(ids)):
        point = first + i * unit
        if point >= rest:
            break
        while b < last and below + sums[b] <= point:
            below += sums[b]
            b += 1
        inside, found = below, -1
        for j in range(b * BLOCK, min(b * BLOCK + BLOCK, len(row))):
            inside += row[j]
            if row[j] > 0:
                found = j
                if inside > point:
                    break
        if found >= 0:
            ids[count], values[count] = found, row[found]
            count += 1


@njit(**OPTIONS)
def largest_of_rows(rows, ids, values):
    """The largest of each row, [n, k] to be filled, k at most the row's columns."""
    num_blocks = (rows.shape[1] + BLOCK - 1) // BLOCK
    sums, tops = np.empty(num_blocks, np.float32), np.empty(num_blocks, np.float32)
    for i in range(len(rows)):
        summarise(rows[i], sums, tops)
        find_largest(rows[i], tops, np.float32(-np.inf), ids.shape[1], ids[i], values[i])


@njit(**OPTIONS)
def head_and_draws(rows, least, uniforms, ids, values, rests, units, draw_ids, draw_values):
    """Of the softmax of each row: head, mass of the tail, weight of a draw, and draws.

    A row that is no distribution, with a logit that is not a number or +∞, or with −∞ alone, has a first value and a
    unit that are not numbers.

    Args:
        rows: logits, [n, v].
        least, uniforms: [n].
        ids, values: [n, h], zeros, to be filled; a value of 0 is no entry.
        rests, units: [n], to be filled.
        draw_ids, draw_values: [n, m], −1 and 1, to be filled.
    """
    num_blocks = (rows.shape[1] + BLOCK - 1) // BLOCK
    sums, tops = np.empty(num_blocks, np.float32), np.empty(num_blocks, np.float32)
    row = np.empty(rows.shape[1], np.float32)
    for i in range(len(rows)):
        if not -np.inf < largest(rows[i]) < np.inf:
            values[i, 0] = units[i] = rests[i] = np.nan
            continue
        softmax(rows[i], np.float32(1), row, True)
        top = summarise(row, sums, tops)
        take_head(row, sums, tops, top, least[i], ids[i], values[i])
        rest = 0.0
        for total in sums:
            rest += total
        unit = max(rest / draw_ids.shape[1], least[i], 1e-30)
        rests[i], units[i] = rest, unit
        draw(row, sums, uniforms[i] * unit, unit, rest, draw_ids[i], draw_values[i])

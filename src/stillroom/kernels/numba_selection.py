"""Selections on a CPU, one row at a time while it lies in the cache. Needs numba.

They compute the same as ``top_indices`` and ``head_and_sample`` of ``selection.py``, whose tensor forms run on every
other device.
"""

import numpy as np
from numba import njit

from stillroom.kernels.numba_math import f32, i32, largest, ordered, softmax, sum_of

BLOCK = 64
"""The number of columns whose sum and maximum are taken together."""

OPTIONS = {"cache": True, "nogil": True, "error_model": "numpy"}

INNER = {**OPTIONS, "_nrt": False}


@njit(**INNER)
def summarize(row, sums, tops):
    """Computes the sum and the maximum of each block of a row; returns the largest of all."""
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
    """The largest in the order that ``ordered`` gives."""
    most = ordered(bits[0])
    for j in range(len(bits)):
        most = max(most, ordered(bits[j]))
    return most


@njit(**INNER)
def find_largest(row, tops, bound, most, ids, values):
    """Fills in the ``most`` largest of a row that are at least ``bound``, largest first; returns their number.

    Among equals, lower columns come first.
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
    """Moves the top entries that are at least ``least``, but always one, out of a row."""
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
def draw(row, sums, first, unit, mass, ids, values):
    """Finds the columns of the points ``first``, ``first + unit``, … below ``mass`` in the cumulative sum."""
    below, b, last, count = 0.0, 0, len(sums) - 1, 0
    while last > 0 and sums[last] == 0:
        last -= 1
    for i in range(len(ids)):
        point = first + i * unit
        if point >= mass:
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
    """Fills in the k largest of each row, [n, k], with k at most the row's length."""
    num_blocks = (rows.shape[1] + BLOCK - 1) // BLOCK
    sums, tops = np.empty(num_blocks, np.float32), np.empty(num_blocks, np.float32)
    for i in range(len(rows)):
        summarize(rows[i], sums, tops)
        find_largest(rows[i], tops, np.float32(-np.inf), ids.shape[1], ids[i], values[i])


@njit(**OPTIONS)
def head_and_draws(rows, least, uniforms, ids, values, residuals, units, draw_ids, draw_values):
    """Fills in the head of each row's softmax, the mass of its tail, the weight of a draw, and draws.

    A row that is no distribution, with a NaN or +∞, or with −∞ alone, has NaN as its first value and unit.

    Args:
        rows: logits, [n, v].
        least, uniforms: [n].
        ids, values: [n, h], zeros, to be filled; a value of 0 is no entry.
        residuals, units: [n], to be filled.
        draw_ids, draw_values: [n, m], −1 and 1, to be filled.
    """
    num_blocks = (rows.shape[1] + BLOCK - 1) // BLOCK
    sums, tops = np.empty(num_blocks, np.float32), np.empty(num_blocks, np.float32)
    row = np.empty(rows.shape[1], np.float32)
    for i in range(len(rows)):
        if not -np.inf < largest(rows[i]) < np.inf:
            values[i, 0] = units[i] = residuals[i] = np.nan
            continue
        softmax(rows[i], np.float32(1), row, True)
        top = summarize(row, sums, tops)
        take_head(row, sums, tops, top, least[i], ids[i], values[i])
        mass = 0.0
        for total in sums:
            mass += total
        unit = max(mass / draw_ids.shape[1], least[i], 1e-30)
        residuals[i], units[i] = mass, unit
        draw(row, sums, uniforms[i] * unit, unit, mass, draw_ids[i], draw_values[i])

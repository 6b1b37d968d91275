"""The head of a distribution, for the adaptive KL on a CPU. Needs numba."""

import numpy as np
from numba import njit

from stillroom.kernels.cpu_math import INNER, STRETCH, SUMS, f32, i32, largest


@njit(**SUMS)
def sum_from(row, border):
    """The sum of what is at least ``border``, over a stretch."""
    total = f32(0)
    for j in range(len(row)):
        total += row[j] if row[j] >= border else f32(0)
    return total


@njit(**INNER)
def mass_from(row, border):
    total = 0.0
    for start in range(0, len(row), STRETCH):
        total += sum_from(row[start : start + STRETCH], border)
    return total


@njit(**SUMS)
def gaps(t, s, border):
    """Σ |t − s| over a stretch, and over what is above the border in it."""
    above, total = f32(0), f32(0)
    for j in range(len(t)):
        gap = abs(t[j] - s[j])
        total += gap
        above += gap if t[j] > border else f32(0)
    return above, total


@njit(**INNER)
def head_share(t, s, mass):
    """``Σ_head |t − s| / Σ |t − s|``; the head is the likeliest of t, as few as hold the mass, of equals the first.

    Its border is found by halving, in the bits of the numbers: these are in the same order.
    """
    low, high = i32(0), i32(f32(largest(t)).view(np.int32) + i32(1))  # bits of numbers that hold enough, and do not
    if mass_from(t, f32(0)) <= mass:
        high = low
    while high - low > 1:
        middle = i32(low + (high - low) // 2)
        if mass_from(t, i32(middle).view(np.float32)) >= mass:
            low = middle
        else:
            high = middle
    border = i32(low).view(np.float32)
    above, total = 0.0, 0.0
    for start in range(0, len(t), STRETCH):
        of_above, of_total = gaps(t[start : start + STRETCH], s[start : start + STRETCH], border)
        above += of_above
        total += of_total
    left = mass - mass_from(t, i32(low + 1).view(np.float32))
    for j in range(len(t)):  # of equals at the border the first ones
        if left <= 0 or border == 0:
            break
        if t[j] == border:
            above += abs(t[j] - s[j])
            left -= border
    return min(above / total, 1.0) if total > 0 else 0.5

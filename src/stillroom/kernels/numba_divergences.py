"""Divergences on a CPU: the summand of each column and the logit gradient. Needs numba."""

from collections.abc import Callable

import numpy as np
from numba import njit

from stillroom.kernels.numba_math import INNER, SCALAR, STRETCH, SUMS, exp, expm1, f32, i32, largest, log1p, shifted

OUTER = {key: value for key, value in SUMS.items() if key != "cache"}  # each is a part of what calls it, which is kept


def over_columns(formula: Callable) -> Callable:
    """A function of a stretch of columns: it gives the sums of summands and of pulls, and the pulls into ``out``.

    Its ``norms`` are scale, and reference and log_sum of student and of teacher, as ``softmax`` gives them.
    """

    @njit(**OUTER)
    def columns(student, teacher, norms, s, t, a, b, out):
        value, pulls = f32(0), f32(0)
        for j in range(len(out)):
            x, y = logs(student[j], teacher[j], norms)
            summand, pull = formula(x, y, s[j], t[j], a, b)
            value += summand
            pulls += pull
            out[j] = pull
        return value, pulls

    return columns


@njit(**SCALAR)
def logs(student, teacher, norms):
    scale, from_s, log_s, from_t, log_t = norms
    return shifted(student, scale, from_s) - log_s, shifted(teacher, scale, from_t) - log_t


@njit(**SCALAR)
def of_teacher(x, y, s, t, _a, _b):
    pull = s - t
    return t * (y - x) + pull, pull


forward_kl = over_columns(of_teacher)


@njit(**OUTER)
def forward_kl_in_place(student, teacher, norms, s, t, of_s, of_t, factor):
    """The sum of summands; s and t are yet to be multiplied by their factors.

    ``factor · (s − t)``, which is the gradient as it stands, takes the student's place.
    """
    value = f32(0)
    for j in range(len(student)):
        x, y = logs(student[j], teacher[j], norms)
        summand, pull = of_teacher(x, y, s[j] * of_s, t[j] * of_t, f32(0), f32(0))
        value += summand
        student[j] = pull * factor
    return value


@over_columns
@njit(**SCALAR)
def reverse_kl(x, y, s, t, _a, _b):
    pull = s * (x - y)
    return pull + (t - s), pull


@over_columns
@njit(**SCALAR)
def adaptive_kl(x, y, s, t, share, _b):
    """``share`` is that of forward KL."""
    away, reverse, other = s - t, s * (x - y), f32(1) - share
    return share * (t * (y - x) + away) + other * (reverse - away), share * away + other * reverse


@njit(**SCALAR)
def over_mixture(x, y, share_of_teacher):
    """``log(t / m)`` and ``log(s / m)``."""
    gap = y - x
    up = gap > f32(0)
    smaller = f32(1) - share_of_teacher if up else share_of_teacher
    down = -log1p(smaller * expm1(-abs(gap)))
    return (down if up else down + gap), (down - gap if up else down)


@over_columns
@njit(**SCALAR)
def jensen_shannon(x, y, s, t, beta, _b):
    of_t, of_s = over_mixture(x, y, beta)
    pull = of_s * s * (f32(1) - beta)
    return of_t * t * beta + pull, pull


@over_columns
@njit(**SCALAR)
def skew_kl(x, y, s, t, alpha, _b):
    of_t, _ = over_mixture(x, y, alpha)
    other = f32(1) - alpha
    return of_t * t + (s - t) * other, -expm1(of_t) * s * other


@over_columns
@njit(**SCALAR)
def skew_reverse_kl(x, y, s, t, alpha, _b):
    other = f32(1) - alpha
    _, of_s = over_mixture(x, y, other)
    return of_s * s + (t - s) * other, (of_s - expm1(of_s) * alpha) * s


@njit(**SCALAR)
def product(x, a, y, b):
    """``exp(a x + b y)``."""
    return exp(x * a + y * b)


@over_columns
@njit(**SCALAR)
def alpha_beta(x, y, _s, _t, alpha, beta):
    total = alpha + beta
    cross = product(y, alpha, x, beta)
    gap = product(x, alpha, x, beta) - cross
    value = (product(y, alpha, y, beta) - cross) * (f32(1) / (beta * total)) + gap * (f32(1) / (alpha * total))
    return value, gap * (f32(1) / alpha)


@over_columns
@njit(**SCALAR)
def total_variation(_x, _y, s, t, _a, _b):
    gap, half = s - t, f32(0.5) * s
    return f32(0.5) * abs(gap), (half if gap > f32(0) else (-half if gap < f32(0) else f32(0)))


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

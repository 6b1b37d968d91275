"""Divergences from a dense teacher on a CPU: the summands and the logit gradient terms. Needs numba."""

from collections.abc import Callable

import numpy as np
from numba import njit

from stillroom.kernels.numba_math import COPY, INNER, SCALAR, SUMS, TILE, exp, expm1, f32, i32, largest, log1p, shifted

OUTER = {**SUMS, "cache": False}  # each is compiled into its caller, which is cached

FORWARD_KL, REVERSE_KL, ADAPTIVE_KL, JENSEN_SHANNON, SKEW_KL, SKEW_REVERSE_KL, ALPHA_BETA, TOTAL_VARIATION = range(8)
CROSS_ENTROPY, LOGIT_MSE, FROM_TARGETS, WITH_BUCKET = range(8, 12)
"""The numbers of the terms. The two last ones are forward KL from the entries of a sparse signal."""


def over_tile(formula: Callable) -> Callable:
    """A function of a tile: it returns the sums of summands and of gradient terms, and writes the terms into ``out``.

    Its ``norms`` are scale, and reference and log_sum of student and of teacher, as ``softmax`` returns them.
    """

    @njit(**OUTER)
    def tile(student, teacher, norms, s, t, a, b, out):
        value, grad_terms = f32(0), f32(0)
        for j in range(len(out)):
            x, y = logs(student[j], teacher[j], norms)
            summand, term = formula(x, y, s[j], t[j], a, b)
            value += summand
            grad_terms += term
            out[j] = term
        return value, grad_terms

    return tile


@njit(**SCALAR)
def logs(student, teacher, norms):
    scale, from_s, log_s, from_t, log_t = norms
    return shifted(student, scale, from_s) - log_s, shifted(teacher, scale, from_t) - log_t


@njit(**SCALAR)
def of_teacher(x, y, s, t, _a, _b):
    term = s - t
    return t * (y - x) + term, term


forward_kl = over_tile(of_teacher)


@over_tile
@njit(**SCALAR)
def reverse_kl(x, y, s, t, _a, _b):
    term = s * (x - y)
    return term + (t - s), term


@over_tile
@njit(**SCALAR)
def adaptive_kl(x, y, s, t, share, _b):
    """``share`` is the share of forward KL."""
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


@over_tile
@njit(**SCALAR)
def jensen_shannon(x, y, s, t, beta, _b):
    of_t, of_s = over_mixture(x, y, beta)
    term = of_s * s * (f32(1) - beta)
    return of_t * t * beta + term, term


@over_tile
@njit(**SCALAR)
def skew_kl(x, y, s, t, alpha, _b):
    of_t, _ = over_mixture(x, y, alpha)
    other = f32(1) - alpha
    return of_t * t + (s - t) * other, -expm1(of_t) * s * other


@over_tile
@njit(**SCALAR)
def skew_reverse_kl(x, y, s, t, alpha, _b):
    other = f32(1) - alpha
    _, of_s = over_mixture(x, y, other)
    return of_s * s + (t - s) * other, (of_s - expm1(of_s) * alpha) * s


@njit(**SCALAR)
def product(x, a, y, b):
    """``exp(a x + b y)``."""
    return exp(x * a + y * b)


@over_tile
@njit(**SCALAR)
def alpha_beta(x, y, _s, _t, alpha, beta):
    total = alpha + beta
    cross = product(y, alpha, x, beta)
    gap = product(x, alpha, x, beta) - cross
    value = (product(y, alpha, y, beta) - cross) * (f32(1) / (beta * total)) + gap * (f32(1) / (alpha * total))
    return value, gap * (f32(1) / alpha)


@over_tile
@njit(**SCALAR)
def total_variation(_x, _y, s, t, _a, _b):
    gap, half = s - t, f32(0.5) * s
    return f32(0.5) * abs(gap), (half if gap > f32(0) else (-half if gap < f32(0) else f32(0)))


@njit(**INNER)
def tile(kind, *tiles):
    if kind == FORWARD_KL:
        return forward_kl(*tiles)
    if kind == REVERSE_KL:
        return reverse_kl(*tiles)
    if kind == ADAPTIVE_KL:
        return adaptive_kl(*tiles)
    if kind == JENSEN_SHANNON:
        return jensen_shannon(*tiles)
    if kind == SKEW_KL:
        return skew_kl(*tiles)
    if kind == SKEW_REVERSE_KL:
        return skew_reverse_kl(*tiles)
    if kind == ALPHA_BETA:
        return alpha_beta(*tiles)
    return total_variation(*tiles)


@njit(**INNER)
def divergence(kind, student, teacher, norms, s, t, a, b, factor, out):
    """The value of a row; ``factor · (w − s Σ w)`` with the logit gradient terms w goes into ``out``."""
    value, grad_terms = 0.0, 0.0
    for start in range(0, len(student), TILE):
        here = slice(start, start + TILE)
        of_value, of_terms = tile(kind, student[here], teacher[here], norms, s[here], t[here], a, b, out[here])
        value += of_value
        grad_terms += of_terms
    finish(out, s, f32(grad_terms), factor)
    return 0.0 if value < 0 else value


@njit(**SUMS)
def forward_kl_alone(student, teacher, norms, s, t, of_s, of_t, factor):
    """The value; ``factor · (s − t)``, which is the gradient already, replaces the student's logits.

    It saves one pass over the row: ``s`` and ``t`` have yet to be multiplied by ``of_s`` and ``of_t``.
    """
    value = 0.0
    for start in range(0, len(student), TILE):
        here, of_tile = slice(start, start + TILE), f32(0)
        a, b, p, q = student[here], teacher[here], s[here], t[here]
        for j in range(len(a)):
            x, y = logs(a[j], b[j], norms)
            summand, term = of_teacher(x, y, p[j] * of_s, q[j] * of_t, f32(0), f32(0))
            of_tile += summand
            a[j] = term * factor
        value += of_tile
    return 0.0 if value < 0 else value


@njit(**COPY)
def finish(grad_terms, s, total, factor):
    """Replaces the logit gradient terms w by ``factor · (w − s Σ w)``."""
    for j in range(len(grad_terms)):
        grad_terms[j] = (grad_terms[j] - s[j] * total) * factor


@njit(**SUMS)
def sum_from(row, border):
    """The sum of all numbers of a tile that are at least ``border``."""
    total = f32(0)
    for j in range(len(row)):
        total += row[j] if row[j] >= border else f32(0)
    return total


@njit(**INNER)
def mass_from(row, border):
    total = 0.0
    for start in range(0, len(row), TILE):
        total += sum_from(row[start : start + TILE], border)
    return total


@njit(**SUMS)
def gaps(t, s, border):
    """Σ |t − s| over the tokens of a tile with t above the border, and over all of them."""
    above, total = f32(0), f32(0)
    for j in range(len(t)):
        gap = abs(t[j] - s[j])
        total += gap
        above += gap if t[j] > border else f32(0)
    return above, total


@njit(**INNER)
def head_share(t, s, mass):
    """``Σ_head |t − s| / Σ |t − s|``; the head is the smallest set of top tokens that holds the mass, first of equals.

    Its border is found by bisection in the bits of the numbers, which are in the same order.
    """
    # bits of a border with enough mass above it, and of one without
    low, high = i32(0), i32(f32(largest(t)).view(np.int32) + i32(1))
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
    for start in range(0, len(t), TILE):
        of_above, of_total = gaps(t[start : start + TILE], s[start : start + TILE], border)
        above += of_above
        total += of_total
    left = mass - mass_from(t, i32(low + 1).view(np.float32))
    for j in range(len(t)):  # the first of equals at the border
        if left <= 0 or border == 0:
            break
        if t[j] == border:
            above += abs(t[j] - s[j])
            left -= border
    return min(above / total, 1.0) if total > 0 else 0.5

"""The fused kernels on a CPU: all terms and measures of rows of logits, and their gradient. Needs numba.

``fused`` takes and returns tensors; numba compiles ``rows`` once and keeps it on disk.
"""

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from jaxtyping import Float, Int
from numba import njit
from torch import Tensor

from stillroom.kernels import MEASURES, Term
from stillroom.kernels.numba_divergences import (
    ADAPTIVE_KL,
    CROSS_ENTROPY,
    FORWARD_KL,
    FROM_TARGETS,
    LOGIT_MSE,
    WITH_BUCKET,
    divergence,
    forward_kl_alone,
    head_share,
)
from stillroom.kernels.numba_math import (
    COPY,
    INNER,
    LEAST,
    LOWEST_LOGIT,
    OPTIONS,
    SCALAR,
    SUMS,
    TILE,
    f32,
    largest,
    over_rows,
    shifted,
    softmax,
    sum_of,
)

LOSSES = "forward_kl reverse_kl adaptive_kl jensen_shannon skew_kl skew_reverse_kl alpha_beta total_variation"
KINDS = {name: number for number, name in enumerate([*LOSSES.split(), "cross_entropy", "logit_mse"])}
"""The losses that can be computed here with a dense teacher, and their numbers in numba_divergences.py."""


Entries = tuple[Int[Tensor, "r k"], Float[Tensor, "r k"], Float[Tensor, " r"] | None, Float[Tensor, " r"] | None]
"""A sparse signal's ids and targets for its one forward KL, a target of 0 being no entry; the mass of all other ids as
one outcome, None where there is no such outcome; and ``−Σ y log y`` of the targets, None where there is."""


def fused(
    student: Float[Tensor, "r v"],
    teacher: Float[Tensor, "r v"] | None,
    labels: Int[Tensor, " r"],
    terms: Sequence[Term],
    weights: Float[Tensor, "m r"],
    *,
    gradient: bool,
    measures: Sequence[int] = tuple(range(len(MEASURES))),
    entries: Entries | None = None,
) -> tuple[Float[Tensor, "m r"], Float[Tensor, "5 r"]]:
    """Values of the terms, unweighted, and of MEASURES (NaN where they are not wanted or not known).

    With ``gradient`` the student's logits become ``Σ weights[i] · gradient of term i``.
    """
    r, order = len(student), sorted(range(len(terms)), key=lambda i: terms[i].temperature)
    wanted = np.zeros(len(MEASURES), np.bool_)
    wanted[list(measures)] = True
    none = student.new_zeros(r)
    ids, targets, residual, entropy = entries or (labels.new_zeros(r, 1), student.new_zeros(r, 1), None, None)
    kinds = [KINDS[terms[i].name] for i in order]
    if entries is None:
        wanted[1:] &= teacher is not None
    else:
        with_entries = FROM_TARGETS if residual is None else WITH_BUCKET
        kinds = [with_entries if kind == FORWARD_KL else kind for kind in kinds]
    numbers = np.array([(1 / terms[i].temperature, terms[i].a, terms[i].b) for i in order], np.float32)
    table = (np.array(kinds, np.int64), *numbers.T.copy())
    nats, measured = student.new_empty(r, len(terms)), student.new_full((r, len(MEASURES)), torch.nan)
    over_rows(
        partial(rows, table, wanted, gradient),
        student,
        student.new_empty(r, 0) if teacher is None else teacher,
        labels,
        ids,
        targets,
        none if residual is None else residual,
        none if entropy is None else entropy,
        weights.T[:, order].contiguous(),
        nats,
        measured,
    )
    return nats.T[np.argsort(order)], measured.T


@njit(**COPY)
def multiple_of(x, first, second, out):
    """``(x · first) · second``; the first factor may be so large that only its product with x does not overflow."""
    for j in range(len(out)):
        out[j] = (x[j] * first) * second


@njit(**COPY)
def add_to(out, x):
    for j in range(len(out)):
        out[j] += x[j]


@njit(**SCALAR)
def log_of(logit, norms):
    """The log-probability of the student's logit."""
    return shifted(logit, norms[0], norms[1]) - norms[2]


@njit(**INNER)
def cross_entropy(student, norms, s, label, smoothing, factor, out):
    """The value; ``factor · (s − y)`` goes into ``out``."""
    multiple_of(s, f32(1), factor, out)
    if not 0 <= label < len(student):
        return np.nan
    value = -np.float64(log_of(student[label], norms))
    if smoothing > 0:
        count, total = 0, 0.0
        for j in range(len(student)):
            if not student[j] <= LOWEST_LOGIT:
                count += 1
                total += log_of(student[j], norms)
        share = smoothing / f32(count)
        value = value * (1 - smoothing) - total * share
        for j in range(len(student)):
            if not student[j] <= LOWEST_LOGIT:
                out[j] -= share * factor
    out[label] -= (f32(1) - smoothing) * factor
    return value


@njit(**SUMS)
def logit_mse(student, teacher, factor, out):
    """The value; ``factor`` times the gradient goes into ``out``. What is impossible for either does not count."""
    count, total, squares = 0.0, 0.0, 0.0
    for start in range(0, len(out), TILE):
        here = slice(start, start + TILE)
        a, b, gaps, of_count, of_total = student[here], teacher[here], out[here], f32(0), f32(0)
        for j in range(len(gaps)):
            off = (a[j] <= LOWEST_LOGIT) | (b[j] <= LOWEST_LOGIT)
            gap = f32(0) if off else a[j] - b[j]
            of_count += f32(0) if off else f32(1)
            of_total += gap
            gaps[j] = gap
        count += of_count
        total += of_total
    count = max(count, 1.0)
    mean, share = f32(total / count), f32(2 / count) * factor
    for start in range(0, len(out), TILE):
        here = slice(start, start + TILE)
        a, b, gaps, of_squares = student[here], teacher[here], out[here], f32(0)
        for j in range(len(gaps)):
            off = (a[j] <= LOWEST_LOGIT) | (b[j] <= LOWEST_LOGIT)
            gap = f32(0) if off else gaps[j] - mean
            of_squares += gap * gap
            gaps[j] = gap * share
        squares += of_squares
    return squares / count


@njit(**INNER)
def from_targets(student, norms, s, ids, targets, entropy, factor, out):
    """``Σ y (log y − log s)`` with targets on a few ids; ``factor · (s Σ y − y)`` goes into ``out``."""
    value, total = 0.0, 0.0
    for k in range(len(ids)):
        value -= targets[k] * np.float64(log_of(student[ids[k]], norms))
        total += targets[k]
    multiple_of(s, f32(total), factor, out)
    for k in range(len(ids)):
        out[ids[k]] -= targets[k] * factor
    return value - entropy


@njit(**INNER)
def residual_mass(s, ids, targets):
    """The sum of a row beside some of its ids, which is exact however small it is; ``s`` becomes 0 at the ids."""
    for k in range(len(ids)):
        if targets[k] > 0:
            s[ids[k]] = 0
    total = 0.0
    for start in range(0, len(s), TILE):
        total += sum_of(s[start : start + TILE])
    return total


@njit(**INNER)
def with_bucket(student, norms, s, ids, targets, residual, factor, out):
    """Forward KL of the entries, a target of 0 being none, and of all others as one outcome of mass ``residual``.

    Its gradient goes into ``out``; the probabilities of the entries in ``s`` become 0.
    """
    value, grad_terms = 0.0, 0.0
    of_residual = f32(residual_mass(s, ids, targets))
    for k in range(len(ids)):
        if targets[k] > 0:
            x = log_of(student[ids[k]], norms)
            term = f32(np.exp(x)) - targets[k]
            value += targets[k] * (np.log(np.float64(targets[k])) - x) + term
            grad_terms += term
    gap = np.log(np.float64(max(residual, LEAST))) - np.log(np.float64(max(of_residual, LEAST)))
    value += residual * gap + (of_residual - residual)
    grad_terms += of_residual - residual
    multiple_of(s, f32((of_residual - residual) / max(of_residual, LEAST) - grad_terms), factor, out)
    for k in range(len(ids)):
        if targets[k] > 0:
            p = f32(np.exp(log_of(student[ids[k]], norms)))
            out[ids[k]] = (p - targets[k] - p * f32(grad_terms)) * factor
    return 0.0 if value < 0 else value


@njit(**SUMS)
def entropy(logits, norms, p):
    """``−Σ p log p``."""
    total = 0.0
    for start in range(0, len(p), TILE):
        x, q, of_tile = logits[start : start + TILE], p[start : start + TILE], f32(0)
        for j in range(len(q)):
            of_tile += q[j] * log_of(x[j], norms)
        total -= of_tile
    return total


@njit(**SUMS)
def overlap(s, t):
    """``Σ min(t, s)``."""
    total = 0.0
    for start in range(0, len(t), TILE):
        x, y, of_tile = s[start : start + TILE], t[start : start + TILE], f32(0)
        for j in range(len(y)):
            of_tile += x[j] if x[j] < y[j] else y[j]
        total += of_tile
    return total


@njit(**INNER)
def overlap_of_entries(student, norms, s, ids, targets, residual):
    """``Σ min(t, s)`` over entries and bucket. The probabilities of the entries in ``s`` become 0."""
    total = min(residual_mass(s, ids, targets), np.float64(residual))
    for k in range(len(ids)):
        total += min(targets[k], f32(np.exp(log_of(student[ids[k]], norms))))
    return total


@njit(**INNER)
def first_of(row, value):
    for j in range(len(row)):
        if row[j] == value:
            return j
    return -1


@njit(**OPTIONS)
def rows(
    table, wanted, gradient, student, teacher, labels, ids, targets, residuals, entropies, weights, nats, measured
):
    """Computes every term of each row; its gradient replaces the student's logits. A row stays in the cache meanwhile.

    Args:
        table: the kinds [m] of the terms in order of their temperatures, scales 1 / T, first and second numbers.
        wanted: [5], which of MEASURES are wanted.
        gradient: whether the student's logits become the weighted sum of the terms' gradients.
        student, teacher: [r, v]; teacher [r, 0] where there is none.
        ids, targets, residuals, entropies: a sparse signal: [r, k], [r, k], [r], [r].
        weights: [r, m].
        nats, measured: [r, m] and [r, 5], to be filled; values of a label outside the vocabulary are NaN.
    """
    kinds, scales, firsts, seconds = table
    vocab_size, dense = student.shape[1], teacher.shape[1] > 0
    s, t = np.empty(vocab_size, np.float32), np.empty(teacher.shape[1], np.float32)
    one, total = np.empty(vocab_size, np.float32), np.empty(vocab_size, np.float32)
    only_forward = gradient and len(kinds) == 1 and kinds[0] == FORWARD_KL and not wanted.any()
    for i in range(len(student)):
        a, b = student[i], teacher[i]
        scale, fresh = f32(0), False
        from_s = log_s = of_s = from_t = log_t = of_t = f32(0)
        for m in range(-1, len(kinds)):
            kind = kinds[m]
            if m < 0 and not wanted.any():
                continue
            now = f32(1) if m < 0 else scales[m]
            if (m < 0 or kind != LOGIT_MSE) and (now != scale or not fresh):
                from_s, log_s, of_s = softmax(a, now, s, not only_forward)
                if dense and now != scale:
                    from_t, log_t, of_t = softmax(b, now, t, not only_forward)
                scale, fresh = now, True
            norms = (scale, from_s, log_s, from_t, log_t)
            if m < 0:
                measure(wanted, a, b, labels[i], norms, s, t, ids[i], targets[i], residuals[i], measured[i])
                fresh = dense or not wanted[3]
                continue
            factor = weights[i, m] / now
            if only_forward:
                value = forward_kl_alone(a, b, norms, s, t, of_s, of_t, factor)
            else:
                numbers, sparse = (firsts[m], seconds[m]), (ids[i], targets[i], residuals[i], entropies[i])
                out = total if m == 0 else one
                value = term(kind, a, b, labels[i], norms, s, t, numbers, sparse, factor, out)
                fresh = fresh and kind != WITH_BUCKET
                if m > 0:
                    add_to(total, one)
            nats[i, m] = value / (np.float64(now) * now)
        if gradient and not weights[i].any():
            a[:] = 0
        elif gradient and not only_forward:
            a[:] = total


@njit(**INNER)
def term(kind, student, teacher, label, norms, s, t, numbers, sparse, factor, out):
    """The value of one term; ``factor`` times its gradient goes into ``out``."""
    first, second = numbers
    ids, targets, residual, entropy_of_targets = sparse
    if kind == CROSS_ENTROPY:
        return cross_entropy(student, norms, s, label, first, factor, out)
    if kind == LOGIT_MSE:
        return logit_mse(student, teacher, factor, out)
    if kind == FROM_TARGETS:
        return from_targets(student, norms, s, ids, targets, entropy_of_targets, factor, out)
    if kind == WITH_BUCKET:
        return with_bucket(student, norms, s, ids, targets, residual, factor, out)
    if kind == ADAPTIVE_KL:
        first = f32(head_share(t, s, first))
    return divergence(kind, student, teacher, norms, s, t, first, second, factor, out)


@njit(**INNER)
def measure(wanted, student, teacher, label, norms, s, t, ids, targets, residual, out):
    scale, from_s, log_s, from_t, log_t = norms
    dense = len(teacher) > 0
    if wanted[0]:
        out[0] = entropy(student, (scale, from_s, log_s), s)
    if wanted[1] and dense:
        out[1] = entropy(teacher, (scale, from_t, log_t), t)
    if wanted[2]:
        top_of_teacher = first_of(teacher, largest(teacher)) if dense else ids[0]
        numbers = log_s == log_s and log_t == log_t  # where a logit is NaN, no token is the top one
        out[2] = 1 if numbers and first_of(student, largest(student)) == top_of_teacher else 0
    if wanted[3]:
        out[3] = overlap(s, t) if dense else overlap_of_entries(student, norms, s, ids, targets, residual)
    if wanted[4] and dense:
        out[4] = log_t - shifted(teacher[label], scale, from_t) if 0 <= label < len(teacher) else np.nan

"""All terms and measures of rows of logits, and their gradient in the logits' place; for a CPU. Needs numba.

A row stays in the cache while every sweep passes over it. What the kinds are called is said in cpu.py.
"""

import numpy as np
from numba import njit

from stillroom.kernels.numba_divergences import (
    adaptive_kl,
    alpha_beta,
    forward_kl,
    forward_kl_in_place,
    head_share,
    jensen_shannon,
    reverse_kl,
    skew_kl,
    skew_reverse_kl,
    total_variation,
)
from stillroom.kernels.numba_math import (
    COPY,
    INNER,
    LEAST,
    LOWEST_LOGIT,
    SCALAR,
    STRETCH,
    SUMS,
    f32,
    largest,
    shifted,
    softmax,
)

FORWARD_KL, REVERSE_KL, ADAPTIVE_KL, JENSEN_SHANNON, SKEW_KL, SKEW_REVERSE_KL, ALPHA_BETA, TOTAL_VARIATION = range(8)

CROSS_ENTROPY, LOGIT_MSE, FROM_TARGETS, WITH_BUCKET = range(8, 12)
"""The kinds of terms: first the divergences from a dense teacher, up to TOTAL_VARIATION."""

OPTIONS = {"cache": True, "nogil": True, "error_model": "numpy"}


@njit(**INNER)
def stretch(kind, *columns):
    if kind == FORWARD_KL:
        return forward_kl(*columns)
    if kind == REVERSE_KL:
        return reverse_kl(*columns)
    if kind == ADAPTIVE_KL:
        return adaptive_kl(*columns)
    if kind == JENSEN_SHANNON:
        return jensen_shannon(*columns)
    if kind == SKEW_KL:
        return skew_kl(*columns)
    if kind == SKEW_REVERSE_KL:
        return skew_reverse_kl(*columns)
    if kind == ALPHA_BETA:
        return alpha_beta(*columns)
    return total_variation(*columns)


@njit(**INNER)
def divergence(kind, student, teacher, norms, s, t, a, b, out):
    """The value; the pulls w go into ``out``. Returns Σ w as well."""
    value, pulls = 0.0, 0.0
    for start in range(0, len(student), STRETCH):
        here = slice(start, start + STRETCH)
        of_value, of_pulls = stretch(kind, student[here], teacher[here], norms, s[here], t[here], a, b, out[here])
        value += of_value
        pulls += of_pulls
    return 0.0 if value < 0 else value, f32(pulls)


@njit(**INNER)
def forward_kl_alone(student, teacher, norms, s, t, of_s, of_t, factor):
    """The value; ``factor`` times the gradient takes the student's place. One sweep less."""
    value = 0.0
    for start in range(0, len(student), STRETCH):
        here = slice(start, start + STRETCH)
        value += forward_kl_in_place(student[here], teacher[here], norms, s[here], t[here], of_s, of_t, factor)
    return 0.0 if value < 0 else value


@njit(**COPY)
def finish(pulls, s, total, factor):
    """``factor · (w − s Σ w)`` in the place of the pulls w."""
    for j in range(len(pulls)):
        pulls[j] = (pulls[j] - s[j] * total) * factor


@njit(**COPY)
def multiple_of(x, first, second, out):
    """``(x · first) · second``: the first factor may be so large that only its product with x is not."""
    for j in range(len(out)):
        out[j] = (x[j] * first) * second


@njit(**COPY)
def add_to(out, x):
    for j in range(len(out)):
        out[j] += x[j]


@njit(**INNER)
def cross_entropy(student, norms, s, label, smoothing, factor, out):
    """The value; ``factor · (s − y)`` goes into ``out``."""
    scale, reference, log_sum = norms[0], norms[1], norms[2]
    multiple_of(s, f32(1), factor, out)
    if not 0 <= label < len(student):
        return np.nan
    value = -np.float64(shifted(student[label], scale, reference) - log_sum)
    if smoothing > 0:
        count, total = 0, 0.0
        for j in range(len(student)):
            if not student[j] <= LOWEST_LOGIT:
                count += 1
                total += shifted(student[j], scale, reference) - log_sum
        share = smoothing / f32(count)
        value = value * (1 - smoothing) - total * share
        for j in range(len(student)):
            if not student[j] <= LOWEST_LOGIT:
                out[j] -= share * factor
    out[label] -= (f32(1) - smoothing) * factor
    return value


@njit(**SUMS)
def logit_gaps(student, teacher, out):
    """The differences of logits that both hold possible, into ``out``; returns how many and their sum."""
    count, total = f32(0), f32(0)
    for j in range(len(out)):
        off = (student[j] <= LOWEST_LOGIT) | (teacher[j] <= LOWEST_LOGIT)
        gap = f32(0) if off else student[j] - teacher[j]
        count += f32(0) if off else f32(1)
        total += gap
        out[j] = gap
    return count, total


@njit(**SUMS)
def centre(student, teacher, mean, factor, out):
    """Of differences: ``factor · (gap − mean)`` in their place; returns the sum of squares of ``gap − mean``."""
    total = f32(0)
    for j in range(len(out)):
        off = (student[j] <= LOWEST_LOGIT) | (teacher[j] <= LOWEST_LOGIT)
        gap = f32(0) if off else out[j] - mean
        total += gap * gap
        out[j] = gap * factor
    return total


@njit(**INNER)
def logit_mse(student, teacher, factor, out):
    count, total, squares = 0.0, 0.0, 0.0
    for start in range(0, len(out), STRETCH):
        here = slice(start, start + STRETCH)
        of_count, of_total = logit_gaps(student[here], teacher[here], out[here])
        count += of_count
        total += of_total
    count = max(count, 1.0)
    for start in range(0, len(out), STRETCH):
        here = slice(start, start + STRETCH)
        squares += centre(student[here], teacher[here], f32(total / count), f32(2 / count) * factor, out[here])
    return squares / count


@njit(**INNER)
def from_targets(student, norms, s, ids, targets, entropy, factor, out):
    """``Σ y (log y − log s)`` with targets on a few ids; ``factor · (s Σ y − y)`` goes into ``out``."""
    scale, reference, log_sum = norms[0], norms[1], norms[2]
    value, total = 0.0, 0.0
    for k in range(len(ids)):
        value -= targets[k] * np.float64(shifted(student[ids[k]], scale, reference) - log_sum)
        total += targets[k]
    multiple_of(s, f32(total), factor, out)
    for k in range(len(ids)):
        out[ids[k]] -= targets[k] * factor
    return value - entropy


@njit(**SUMS)
def sum_of(row):
    total = f32(0)
    for j in range(len(row)):
        total += row[j]
    return total


@njit(**INNER)
def rest_of(s, ids, there):
    """What a row sums to beside some of its ids: summed over them, and so right however small it is."""
    for k in range(len(ids)):
        if there[k] > 0:
            s[ids[k]] = 0
    total = 0.0
    for start in range(0, len(s), STRETCH):
        total += sum_of(s[start : start + STRETCH])
    return total


@njit(**INNER)
def with_bucket(student, norms, s, ids, targets, rest, factor, out):
    """Forward KL of the entries, a target of 0 being none, and of all others as one outcome of mass ``rest``.

    Its gradient goes into ``out``; the probabilities of the entries in ``s`` become 0.
    """
    scale, reference, log_sum = norms[0], norms[1], norms[2]
    value, pulls = 0.0, 0.0
    of_rest = f32(rest_of(s, ids, targets))
    for k in range(len(ids)):
        if targets[k] > 0:
            x = shifted(student[ids[k]], scale, reference) - log_sum
            pull = f32(np.exp(x)) - targets[k]
            value += targets[k] * (np.log(np.float64(targets[k])) - x) + pull
            pulls += pull
    gap = np.log(np.float64(max(rest, LEAST))) - np.log(np.float64(max(of_rest, LEAST)))
    value += rest * gap + (of_rest - rest)
    pulls += of_rest - rest
    multiple_of(s, f32((of_rest - rest) / max(of_rest, LEAST) - pulls), factor, out)
    for k in range(len(ids)):
        if targets[k] > 0:
            p = f32(np.exp(shifted(student[ids[k]], scale, reference) - log_sum))
            out[ids[k]] = (p - targets[k] - p * f32(pulls)) * factor
    return 0.0 if value < 0 else value


# Measures.
@njit(**SCALAR)
def log_of(logit, norms):
    scale, reference, log_sum = norms
    return shifted(logit, scale, reference) - log_sum


@njit(**SUMS)
def plogp(logits, norms, p):
    total = f32(0)
    for j in range(len(p)):
        total += p[j] * log_of(logits[j], norms)
    return total


@njit(**INNER)
def entropy(logits, norms, p):
    total = 0.0
    for start in range(0, len(p), STRETCH):
        total -= plogp(logits[start : start + STRETCH], norms, p[start : start + STRETCH])
    return total


@njit(**SUMS)
def overlap_of(s, t):
    total = f32(0)
    for j in range(len(t)):
        total += s[j] if s[j] < t[j] else t[j]
    return total


@njit(**INNER)
def overlap(s, t):
    total = 0.0
    for start in range(0, len(t), STRETCH):
        total += overlap_of(s[start : start + STRETCH], t[start : start + STRETCH])
    return total


@njit(**INNER)
def overlap_of_entries(student, norms, s, ids, targets, rest):
    """``Σ min(t, s)`` over entries and bucket. The probabilities of the entries in ``s`` become 0."""
    scale, reference, log_sum = norms[0], norms[1], norms[2]
    total = min(rest_of(s, ids, targets), np.float64(rest))
    for k in range(len(ids)):
        total += min(targets[k], f32(np.exp(shifted(student[ids[k]], scale, reference) - log_sum)))
    return total


@njit(**INNER)
def first_of(row, value):
    for j in range(len(row)):
        if row[j] == value:
            return j
    return -1


@njit(**OPTIONS)
def rows(table, wanted, gradient, student, teacher, labels, ids, targets, rests, entropies, weights, nats, measured):
    """Every term of each row, and its gradient in the place of the student's logits.

    Args:
        table: of the terms: kinds [m] in order of their temperatures, scales 1 / T, first and second numbers.
        wanted: [5], the measures of ``terms.MEASURES`` that are wanted.
        gradient: whether the student's logits become the weighted sum of the terms' gradients.
        student, teacher: [r, v]; teacher [r, 0] where there is none.
        ids, targets, rests, entropies: a sparse signal: [r, k], [r, k], [r], [r].
        weights: [r, m].
        nats, measured: [r, m] and [r, 5], to be filled; what depends on a label that is none of the columns is NaN.
    """
    kinds, scales, firsts, seconds = table
    vocab_size, dense = student.shape[1], teacher.shape[1] > 0
    s, t = np.empty(vocab_size, np.float32), np.empty(teacher.shape[1], np.float32)
    pulls, total = np.empty(vocab_size, np.float32), np.empty(vocab_size, np.float32)
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
                measure(wanted, a, b, labels[i], norms, s, t, ids[i], targets[i], rests[i], measured[i])
                fresh = dense or not wanted[3]
                continue
            factor = weights[i, m] / now
            if only_forward:
                value = forward_kl_alone(a, b, norms, s, t, of_s, of_t, factor)
            else:
                numbers, sparse = (firsts[m], seconds[m]), (ids[i], targets[i], rests[i], entropies[i])
                out = total if m == 0 else pulls
                value = term(kind, a, b, labels[i], norms, s, t, numbers, sparse, factor, out)
                fresh = fresh and kind != WITH_BUCKET
                if m > 0:
                    add_to(total, pulls)
            nats[i, m] = value / (np.float64(now) * now)
        if gradient and not weights[i].any():
            a[:] = 0
        elif gradient and not only_forward:
            a[:] = total


@njit(**INNER)
def term(kind, student, teacher, label, norms, s, t, numbers, sparse, factor, out):
    """The value of one term; ``factor`` times its gradient goes into ``out``."""
    first, second = numbers
    ids, targets, rest, entropy_of_targets = sparse
    if kind == CROSS_ENTROPY:
        return cross_entropy(student, norms, s, label, first, factor, out)
    if kind == LOGIT_MSE:
        return logit_mse(student, teacher, factor, out)
    if kind == FROM_TARGETS:
        return from_targets(student, norms, s, ids, targets, entropy_of_targets, factor, out)
    if kind == WITH_BUCKET:
        return with_bucket(student, norms, s, ids, targets, rest, factor, out)
    if kind == ADAPTIVE_KL:
        first = f32(head_share(t, s, first))
    value, pulls = divergence(kind, student, teacher, norms, s, t, first, second, out)
    finish(out, s, pulls, factor)
    return value


@njit(**INNER)
def measure(wanted, student, teacher, label, norms, s, t, ids, targets, rest, out):
    scale, from_s, log_s, from_t, log_t = norms
    dense = len(teacher) > 0
    if wanted[0]:
        out[0] = entropy(student, (scale, from_s, log_s), s)
    if wanted[1] and dense:
        out[1] = entropy(teacher, (scale, from_t, log_t), t)
    if wanted[2]:
        top_indices = first_of(teacher, largest(teacher)) if dense else ids[0]
        numbers = log_s == log_s and log_t == log_t  # where a logit is none, nothing is the likeliest
        out[2] = 1 if numbers and first_of(student, largest(student)) == top_indices else 0
    if wanted[3]:
        out[3] = overlap(s, t) if dense else overlap_of_entries(student, norms, s, ids, targets, rest)
    if wanted[4] and dense:
        out[4] = log_t - shifted(teacher[label], scale, from_t) if 0 <= label < len(teacher) else np.nan

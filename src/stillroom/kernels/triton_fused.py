"""The element-wise part of the fused losses on a CUDA device, in Triton: one program a row, all terms at once.

There are two or three passes over a row. The first computes the largest logit and the sum of exponentials at each
temperature; the second the values, the measures, and the sums of the logit gradient terms ``w``; the third writes the
gradient ``Σ c (w − s Σ w)``. Where ``Σ w`` of every term is known beforehand, the second pass writes it already.

The formulas are those of the losses' own modules, in float32. Where student and teacher are equal, the results are
exactly 0: both go through the same operations, and the compiler may not contract a product and a sum on one side only
(``enable_fp_fusion``).
"""

from collections.abc import Sequence
from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from stillroom.kernels import LOWEST_LOGIT, MEASURES, Term

KINDS: dict[str, float | None] = {
    **dict.fromkeys(("reverse_kl", "jensen_shannon", "skew_kl", "skew_reverse_kl", "alpha_beta", "total_variation")),
    "forward_kl": 0.0,
    "logit_mse": 0.0,  # so that the gradient is the terms themselves
    "cross_entropy": -1.0,
}
"""The losses that can be computed here, and ``Σ w`` where it is the same for all logits; None where it must be
computed."""
BLOCK = 2048
"""The number of logits that a program loads together."""
OPTIONS = {"num_warps": 16, "enable_fp_fusion": False}
LOWEST = tl.constexpr(LOWEST_LOGIT)
NO_COLUMN = tl.constexpr(2**31 - 1)


def fused(
    student: Float[Tensor, "r v"],
    teacher: Float[Tensor, "r v"] | None,
    labels: Int[Tensor, " r"],
    terms: Sequence[Term],
    weights: Float[Tensor, "terms r"],
    *,
    gradient: bool,
) -> tuple[Float[Tensor, "terms r"], Float[Tensor, "measures r"]]:
    """The value of each term in nats, unweighted, and ``MEASURES`` (at temperature 1; NaN where there is no teacher).

    With ``gradient`` the sum over terms of weight · gradient replaces the student's logits; in a row whose weights are
    all 0 it is exactly 0. Values of a label outside the vocabulary are NaN.

    Args:
        student: float32 logits, like the teacher's. The last dimension is contiguous; rows may have any stride.
        teacher: None only where every term is cross-entropy.
    """
    num_rows, vocab_size = student.shape
    temperatures = tuple(dict.fromkeys((1.0, *(float(term.temperature) for term in terms))))
    sums = tuple(KINDS[term.name] for term in terms)
    nats = student.new_empty(len(terms), num_rows)
    measures = student.new_empty(len(MEASURES), num_rows)
    launch: Any = _row[(num_rows,)]
    with torch.cuda.device_of(student):
        launch(
            student,
            student if teacher is None else teacher,
            labels.contiguous(),
            weights.contiguous(),
            nats,
            measures,
            student.stride(0),
            0 if teacher is None else teacher.stride(0),
            num_rows,
            vocab_size,
            temperatures,
            tuple(1 / temperature for temperature in temperatures),
            tuple(float(term.a) for term in terms),
            tuple(float(term.b) for term in terms),
            KINDS=tuple(term.name for term in terms),
            SLOTS=tuple(temperatures.index(term.temperature) for term in terms),
            SUMS=sums,
            CLOSED=None not in sums,
            HAS_TEACHER=teacher is not None,
            GRADIENT=gradient,
            BLOCK=min(BLOCK, triton.next_power_of_2(vocab_size)),
            **OPTIONS,
        )
    return nats, measures


@triton.jit(do_not_specialize=["num_rows"])
@no_type_check
def _row(
    student, teacher, labels, weights, nats, measures, student_stride, teacher_stride, num_rows, vocab_size,
    temperatures, inverses, a, b, KINDS: tl.constexpr, SLOTS: tl.constexpr, SUMS: tl.constexpr,
    CLOSED: tl.constexpr, HAS_TEACHER: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Computes one row. A slot is a temperature; slot 0 is 1.0."""
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    teacher += row * teacher_stride
    token = tl.load(labels + row)
    of_student = _summary(student, vocab_size, inverses, BLOCK)
    of_teacher = of_student
    if HAS_TEACHER:
        of_teacher = _summary(teacher, vocab_size, inverses, BLOCK)
    arguments = ()
    counts = ()
    for i in tl.static_range(len(KINDS)):
        arguments += (_arguments(KINDS[i], a[i], b[i], student, teacher, vocab_size, of_student, BLOCK),)
        counts += (tl.load(weights + i * num_rows + row) * temperatures[SLOTS[i]],)
    rows = (student, teacher, vocab_size, token, of_student, of_teacher)
    y = tl.load(teacher + token, mask=(token >= 0) & (token < vocab_size), other=float("nan"))
    log_t_of_token = _log_prob(tl.where(y < LOWEST, LOWEST, y), of_teacher, 1.0, 0)
    values, sums, measured = _pass(
        rows, inverses, counts, arguments, SUMS, KINDS, SLOTS, HAS_TEACHER, True, GRADIENT and CLOSED, BLOCK
    )
    if GRADIENT and not CLOSED:
        _pass(rows, inverses, counts, arguments, sums, KINDS, SLOTS, HAS_TEACHER, False, True, BLOCK)

    for i in tl.static_range(len(KINDS)):
        value = tl.where(values[i] < 0, 0.0, values[i])
        if KINDS[i] == "cross_entropy":
            value = tl.where((token >= 0) & (token < vocab_size), values[i], float("nan"))
        tl.store(nats + i * num_rows + row, value * temperatures[SLOTS[i]] * temperatures[SLOTS[i]])
    agreement = (of_student[1] == of_teacher[1]).to(tl.float32)
    measured = (-measured[0], -measured[1], agreement, measured[2], -log_t_of_token)
    for j in tl.static_range(5):
        value = measured[j]
        if j > 0 and not HAS_TEACHER:
            value = float("nan")
        tl.store(measures + j * num_rows + row, value)


@triton.jit
@no_type_check
def _load(logits, columns, inside):
    """Loads logits; −inf and logits outside the row become the lowest logit, NaN stays NaN."""
    x = tl.load(logits + columns, mask=inside, other=LOWEST)
    return tl.where(x < LOWEST, LOWEST, x)


@triton.jit
@no_type_check
def _zeros(number: tl.constexpr, BLOCK: tl.constexpr):
    zeros = ()
    for _ in tl.static_range(number):
        zeros += (tl.zeros([BLOCK], tl.float32),)
    return zeros


@triton.jit
@no_type_check
def _summary(logits, vocab_size, inverses, BLOCK: tl.constexpr):
    """The largest logit of a row, its first column, the log of the sum of exponentials in each slot, and the number of
    possible tokens."""
    lanes = tl.arange(0, BLOCK)
    largest = tl.full([BLOCK], LOWEST, tl.float32)
    first = lanes
    possible = tl.zeros([BLOCK], tl.int32)
    sums = _zeros(len(inverses), BLOCK)
    for start in range(0, vocab_size, BLOCK):
        columns = start + lanes
        inside = columns < vocab_size
        x = _load(logits, columns, inside)
        new = ()
        for k in tl.static_range(len(inverses)):
            rise = x * inverses[k] - largest * inverses[k]
            e = tl.exp(-tl.abs(rise))
            new += (tl.where(inside, tl.where(rise > 0, sums[k] * e + 1, sums[k] + e), sums[k]),)
        sums = new
        first = tl.where(x > largest, columns, first)
        largest = tl.maximum(largest, x)
        possible += (x > LOWEST).to(tl.int32)
    top = tl.max(largest, 0)
    logs = ()
    for k in tl.static_range(len(inverses)):
        logs += (tl.log(tl.sum(sums[k] * tl.exp(largest * inverses[k] - top * inverses[k]), 0)),)
    return top, tl.min(tl.where(largest == top, first, NO_COLUMN), 0), logs, tl.sum(possible, 0)


@triton.jit
@no_type_check
def _log_prob(x, of_row, inverse, k: tl.constexpr):
    return (x * inverse - of_row[0] * inverse) - of_row[2][k]


@triton.jit
@no_type_check
def _arguments(KIND: tl.constexpr, a, b, student, teacher, vocab_size, of_student, BLOCK: tl.constexpr):
    """The two numbers of a term in this row."""
    if KIND == "cross_entropy":  # the label's share, and that of every possible column
        return 1 - a, a / tl.maximum(of_student[3], 1)
    elif KIND == "logit_mse":  # noqa: RET505 (Triton compiles what follows a return, too)
        # the mean gap, and one over the number of gaps
        gaps = tl.zeros([BLOCK], tl.float32)
        number = tl.zeros([BLOCK], tl.int32)
        for start in range(0, vocab_size, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            x = _load(student, columns, columns < vocab_size)
            y = _load(teacher, columns, columns < vocab_size)
            gaps += tl.where((x <= LOWEST) | (y <= LOWEST), 0.0, x - y)
            number += ((x > LOWEST) & (y > LOWEST)).to(tl.int32)
        share = 1.0 / tl.maximum(tl.sum(number, 0), 1)
        return tl.sum(gaps, 0) * share, share
    else:
        return a, b


@triton.jit
@no_type_check
def _pass(
    rows, inverses, counts, arguments, sums, KINDS: tl.constexpr, SLOTS: tl.constexpr, HAS_TEACHER: tl.constexpr,
    SUM: tl.constexpr, WRITE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One pass over a row. With SUM it computes each term's value, its ``Σ w`` where ``sums`` has None, and Σ s log s,
    Σ t log t and Σ min(t, s) at temperature 1. With WRITE the gradient replaces the student's logits."""
    student, teacher, vocab_size, token, of_student, of_teacher = rows
    values = _zeros(len(KINDS), BLOCK)
    grad_terms = _zeros(len(KINDS), BLOCK)
    measured = _zeros(3, BLOCK)
    live = False
    for i in tl.static_range(len(KINDS)):
        live = live | (counts[i] != 0)
    for start in range(0, vocab_size, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < vocab_size
        x = _load(student, columns, inside)
        y = x
        if HAS_TEACHER:
            y = _load(teacher, columns, inside)
        outcomes = ()
        for k in tl.static_range(len(inverses)):
            log_t = tl.where(inside, _log_prob(y, of_teacher, inverses[k], k), LOWEST)
            log_s = tl.where(inside, _log_prob(x, of_student, inverses[k], k), LOWEST)
            outcomes += ((log_t, log_s, tl.exp(log_t), tl.exp(log_s)),)
        gradient = tl.zeros([BLOCK], tl.float32)
        new_values = ()
        new_terms = ()
        for i in tl.static_range(len(KINDS)):
            if KINDS[i] == "cross_entropy":
                # −y log s and −y, with the target y of each token
                term = -(tl.where(columns == token, arguments[i][0], 0.0) + tl.where(x > LOWEST, arguments[i][1], 0.0))
                value = term * outcomes[SLOTS[i]][1]
            elif KINDS[i] == "logit_mse":
                gap = tl.where((x <= LOWEST) | (y <= LOWEST), 0.0, x - y - arguments[i][0])
                value = gap * gap * arguments[i][1]
                term = gap * (2 * arguments[i][1])
            else:
                value, term = _divergence(KINDS[i], outcomes[SLOTS[i]], arguments[i][0], arguments[i][1])
            new_values += (values[i] + value,)
            new_terms += (grad_terms[i] + term,)
            if WRITE:
                gradient += counts[i] * (term - outcomes[SLOTS[i]][3] * sums[i])
        if SUM:
            values = new_values
            grad_terms = new_terms
            log_t, log_s, t, s = outcomes[0]
            measured = (measured[0] + s * log_s, measured[1] + t * log_t, measured[2] + tl.minimum(t, s))
        if WRITE:
            tl.store(student + columns, tl.where(live, gradient, 0.0), mask=inside)
    totals = ()
    term_sums = ()
    for i in tl.static_range(len(KINDS)):
        totals += (tl.sum(values[i], 0),)
        term_sums += (tl.sum(grad_terms[i], 0) if sums[i] is None else sums[i],)
    return totals, term_sums, (tl.sum(measured[0], 0), tl.sum(measured[1], 0), tl.sum(measured[2], 0))


@triton.jit
@no_type_check
def _divergence(KIND: tl.constexpr, outcome, a, b):
    """Summands and logit gradient terms of a divergence, by the formulas of losses/divergences.py."""
    log_t, log_s, t, s = outcome
    if KIND == "forward_kl":
        return t * (log_t - log_s) + (s - t), s - t
    elif KIND == "reverse_kl":  # noqa: RET505
        term = s * (log_s - log_t)
        return (term - s) + t, term
    elif KIND == "jensen_shannon":
        t_over_m, s_over_m = _over_mixture(log_t, log_s, a)
        term = (1 - a) * (s * s_over_m)
        return a * (t * t_over_m) + term, term
    elif KIND == "skew_kl":
        t_over_m, s_over_m = _over_mixture(log_t, log_s, a)
        return t * t_over_m + (1 - a) * (s - t), (a - 1) * (s * _expm1(t_over_m))
    elif KIND == "skew_reverse_kl":
        t_over_m, s_over_m = _over_mixture(log_t, log_s, 1 - a)
        return s * s_over_m + (1 - a) * (t - s), s * (s_over_m - a * _expm1(s_over_m))
    elif KIND == "alpha_beta":
        cross = tl.exp(a * log_t + b * log_s)
        from_t = tl.exp(a * log_t + b * log_t) - cross
        from_s = tl.exp(a * log_s + b * log_s) - cross
        return from_t * (1 / (b * (a + b))) + from_s * (1 / (a * (a + b))), from_s * (1 / a)
    else:
        tl.static_assert(KIND == "total_variation")
        return 0.5 * tl.abs(s - t), 0.5 * tl.where(s > t, s, tl.where(s < t, -s, 0.0))


@triton.jit
@no_type_check
def _over_mixture(log_t, log_s, share_of_teacher):
    """``log(t / m)`` and ``log(s / m)``: see :func:`stillroom.losses.divergences.over_mixture`."""
    gap = log_t - log_s
    share_of_smaller = tl.where(gap > 0, 1 - share_of_teacher, share_of_teacher)
    z = share_of_smaller * _expm1(-tl.abs(gap))
    u = 1 + z
    down = -tl.where(u == 1, z, tl.log(u) * (z / tl.where(u == 1, 1.0, u - 1)))  # log(1 + z) (Kahan)
    return down + tl.minimum(gap, 0.0), down - tl.maximum(gap, 0.0)


@triton.jit
@no_type_check
def _expm1(x):
    """``exp(x) − 1``, near 0 by its series."""
    near = tl.abs(x) < 0.4
    z = tl.where(near, x, 0.0)
    p = 1 / 720 + z * (1 / 5040)
    p = 1 / 120 + z * p
    p = 1 / 24 + z * p
    p = 1 / 6 + z * p
    p = 1 / 2 + z * p
    return tl.where(near, z + z * z * p, tl.exp(x) - 1)

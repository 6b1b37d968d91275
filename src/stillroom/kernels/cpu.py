"""The fused kernels on a CPU: tensors in, tensors out. Needs numba, which compiles them once and keeps them on disk."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from stillroom.kernels.cpu_rows import CROSS_ENTROPY, FROM_TARGETS, LOGIT_MSE, WITH_BUCKET, rows
from stillroom.kernels.terms import MEASURES, Term
from stillroom.threads import over_rows

KINDS = {
    "forward_kl": 0,
    "reverse_kl": 1,
    "adaptive_kl": 2,
    "jensen_shannon": 3,
    "skew_kl": 4,
    "skew_reverse_kl": 5,
    "alpha_beta": 6,
    "total_variation": 7,
    "cross_entropy": CROSS_ENTROPY,
    "logit_mse": LOGIT_MSE,
}
"""What can be done with a dense teacher, by its number in cpu_rows.py."""


class Entries(NamedTuple):
    """A sparse signal's targets for its one forward KL."""

    ids: Int[Tensor, "r k"]
    targets: Float[Tensor, "r k"]
    """0 is no entry."""
    rest: Float[Tensor, " r"] | None
    """The mass of all others as one outcome; None: there is no such outcome."""
    entropy: Float[Tensor, " r"]
    """Σ y log y of the targets, negated; not used where there is a rest."""


def fused(
    student: Float[Tensor, "r v"],
    teacher: Float[Tensor, "r v"] | None,
    next_tokens: Int[Tensor, " r"],
    terms: Sequence[Term],
    weights: Float[Tensor, "m r"],
    *,
    gradient: bool,
    measures: Sequence[int] = tuple(range(len(MEASURES))),
    entries: Entries | None = None,
) -> tuple[Float[Tensor, "m r"], Float[Tensor, "5 r"]]:
    """Values of the terms, unweighted, and of MEASURES (only of those that are asked for, and where they can be told).

    With ``gradient`` the student's logits become ``Σ weights[i] · gradient of term i``.
    """
    r, order = len(student), sorted(range(len(terms)), key=lambda i: terms[i].temperature)
    wanted = np.zeros(len(MEASURES), np.bool_)
    wanted[list(measures)] = True
    if entries is None:
        none = student.new_zeros(r)
        entries = Entries(next_tokens.new_zeros(r, 1), student.new_zeros(r, 1), none, none)
        wanted[1:] &= teacher is not None
        kinds = [KINDS[terms[i].name] for i in order]
    else:
        of_entries = FROM_TARGETS if entries.rest is None else WITH_BUCKET
        kinds = [CROSS_ENTROPY if terms[i].name == "cross_entropy" else of_entries for i in order]
    numbers = np.array([(1 / terms[i].temperature, terms[i].a, terms[i].b) for i in order], np.float32)
    table = (np.array(kinds, np.int64), *numbers.T.copy())
    nats, measured = student.new_empty(r, len(terms)), student.new_full((r, len(MEASURES)), torch.nan)
    over_rows(
        partial(rows, table, wanted, gradient),
        student,
        student.new_empty(r, 0) if teacher is None else teacher,
        next_tokens,
        entries.ids,
        entries.targets,
        entries.entropy if entries.rest is None else entries.rest,
        entries.entropy,
        weights.T[:, order].contiguous(),
        nats,
        measured,
    )
    back = sorted(range(len(order)), key=order.__getitem__)
    return nats.T[back], measured.T

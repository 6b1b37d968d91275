"""The fused kernels on a CPU: tensors in, tensors out. Needs numba, which compiles them once and keeps them on disk."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from stillroom.kernels import numba_rows
from stillroom.kernels.terms import MEASURES, Term
from stillroom.kernels.threads import over_rows

KINDS = {
    "forward_kl": numba_rows.FORWARD_KL,
    "reverse_kl": numba_rows.REVERSE_KL,
    "adaptive_kl": numba_rows.ADAPTIVE_KL,
    "jensen_shannon": numba_rows.JENSEN_SHANNON,
    "skew_kl": numba_rows.SKEW_KL,
    "skew_reverse_kl": numba_rows.SKEW_REVERSE_KL,
    "alpha_beta": numba_rows.ALPHA_BETA,
    "total_variation": numba_rows.TOTAL_VARIATION,
    "cross_entropy": numba_rows.CROSS_ENTROPY,
    "logit_mse": numba_rows.LOGIT_MSE,
}
"""What can be done with a dense teacher, by its number in cpu_rows.py."""


class Entries(NamedTuple):
    """A sparse signal's targets for its one forward KL."""

    ids: Int[Tensor, "r k"]
    targets: Float[Tensor, "r k"]
    """0 is no entry."""
    rest: Float[Tensor, " r"] | None
    """The mass of all others as one outcome; None: there is no such outcome."""
    entropy: Float[Tensor, " r"] | None
    """``−Σ y log y`` of the targets; None where there is a rest."""


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
    """Values of the terms, unweighted, and of MEASURES (only of those that are asked for, and where they can be told).

    With ``gradient`` the student's logits become ``Σ weights[i] · gradient of term i``.
    """
    r, order = len(student), sorted(range(len(terms)), key=lambda i: terms[i].temperature)
    wanted = np.zeros(len(MEASURES), np.bool_)
    wanted[list(measures)] = True
    none = student.new_zeros(r)
    if entries is None:
        entries = Entries(labels.new_zeros(r, 1), student.new_zeros(r, 1), none, none)
        wanted[1:] &= teacher is not None
        kinds = [KINDS[terms[i].name] for i in order]
    else:
        of_entries = numba_rows.FROM_TARGETS if entries.rest is None else numba_rows.WITH_BUCKET
        kinds = [numba_rows.CROSS_ENTROPY if terms[i].name == "cross_entropy" else of_entries for i in order]
    numbers = np.array([(1 / terms[i].temperature, terms[i].a, terms[i].b) for i in order], np.float32)
    table = (np.array(kinds, np.int64), *numbers.T.copy())
    nats, measured = student.new_empty(r, len(terms)), student.new_full((r, len(MEASURES)), torch.nan)
    over_rows(
        partial(numba_rows.rows, table, wanted, gradient),
        student,
        student.new_empty(r, 0) if teacher is None else teacher,
        labels,
        entries.ids,
        entries.targets,
        none if entries.rest is None else entries.rest,
        none if entries.entropy is None else entries.entropy,
        weights.T[:, order].contiguous(),
        nats,
        measured,
    )
    back = sorted(range(len(order)), key=order.__getitem__)
    return nats.T[back], measured.T

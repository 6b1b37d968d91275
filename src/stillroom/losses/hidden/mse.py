"""Mean squared errors between states: plain, by the size of the teacher's state, and by the size of each channel."""

import torch
from jaxtyping import Float
from torch import Tensor

from stillroom.errors import MismatchError, NonFiniteError
from stillroom.losses.hidden.pair import EPS, Pair, mean_square

FLOOR = 0.1
"""The least scale of a channel, as a share of the median of all that are not 0."""


def mse(pair: Pair) -> Float[Tensor, " n"]:
    """``1/d Σ (s − t)²``."""
    student, teacher = pair.states()
    return (student - teacher).square().mean(-1)


def normalized_mse(pair: Pair) -> Float[Tensor, " n"]:
    """``Σ (s − t)² / Σ t²``: of each position, by the teacher's own mean square there.

    A mean square below ``EPS`` counts as ``EPS``, so the value is continuous, and finite where the teacher's state is
    0.
    """
    student, teacher = pair.states()
    return (student - teacher).square().mean(-1) / mean_square(teacher).squeeze(-1).clamp(min=EPS)


def channel_scaled_mse(pair: Pair) -> Float[Tensor, " n"]:
    """``1/d Σ ((s − t) / scale)²``: so a few channels with massive activations do not outweigh all others.

    Raises:
        MismatchError: the pair has no scale.
    """
    if pair.scale is None:
        raise MismatchError(
            "the states have no scale for their channels",
            {"needed": "one number for each channel", "given": None},
            why="The difference in each channel is divided by it.",
            fix="Measure it by `channel_scale` on the teacher's states of the first batch.",
        )
    student, teacher = pair.states()
    return ((student - teacher) / pair.scale.to(student.dtype)).square().mean(-1)


def channel_scale(sum_of_squares: Float[Tensor, " d"], count: int) -> Float[Tensor, " d"]:
    """The RMS of each channel over ``count`` positions, and at least a tenth of the median of those that are not 0.

    So a channel in which the teacher says next to nothing is not blown up, and a massive one does not move the floor.
    Where all are 0 it is 1.

    Raises:
        NonFiniteError: a sum is not finite, or there are no positions.
    """
    rms = (sum_of_squares / count if count else sum_of_squares * torch.nan).sqrt()
    if not rms.isfinite().all():
        raise NonFiniteError(
            "the scale of the channels is not finite",
            {"channels": f"{int((~rms.isfinite()).sum())} of {len(rms)}", "positions": count},
            why="Each channel's difference is divided by it.",
            fix="Look for infinite activations in the teacher, and for a first batch that keeps no position.",
        )
    alive = rms[rms > 0]
    return rms.clamp(min=FLOOR * alive.median().item()) if len(alive) else torch.ones_like(rms)

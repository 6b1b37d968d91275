"""Pointwise divergences: sums over outcomes of a function of the teacher's and the student's probability of each."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from stillroom.errors import ConfigError
from stillroom.losses import sparse
from stillroom.losses.block import Block


class Outcomes(NamedTuple):
    """Teacher ``t`` and student ``s`` over the same outcomes. An outcome that neither holds possible has t = s = 0."""

    log_t: Float[Tensor, "r m"]
    log_s: Float[Tensor, "r m"]
    t: Float[Tensor, "r m"]
    s: Float[Tensor, "r m"]


Pointwise = Callable[[Outcomes], tuple[Tensor, Tensor]]
"""``D(t ‖ s) = Σ_j φ(t_j, s_j)`` as a pure function of the outcomes.

It gives the summands φ_j and the *pulls* ``s_j ∂φ/∂s_j``, [r, m], tensors of their own. Multiples of s − t or
s, whose sums are constant, may be added to either: so that summands are at least 0, and both exactly 0 where t = s.
"""


def diverge(
    block: Block, divergence: Pointwise, temperature: float
) -> tuple[Float[Tensor, " r"], Float[Tensor, "r v"]]:
    """``T² · D`` of the distributions at temperature T, and its gradient ``T (w − s Σ w)`` with the pulls w.

    Of a truncated sparse signal the outcomes are its entries and, as one further outcome, all the others together. So
    an f-divergence is at most the full one (data-processing inequality), and reaches it as entries are added. The α-β
    divergence with α + β other than 1 and the adaptive KL are none, and may come out larger.
    """
    if block.sparse is not None:
        nats, gradient = _truncated(block, divergence, temperature)
    else:
        outcomes = Outcomes(
            block.teacher(temperature),
            block.student(temperature),
            block.teacher_probabilities(temperature),
            block.student_probabilities(temperature),
        )
        summands, gradient = divergence(outcomes)
        nats = summands.sum(-1)
        gradient.addcmul_(outcomes.s, gradient.sum(-1, keepdim=True), value=-1)
    nats.clamp_(min=0)
    return (nats, gradient) if temperature == 1.0 else (nats.mul_(temperature**2), gradient.mul_(temperature))


def _truncated(block: Block, divergence: Pointwise, temperature: float) -> tuple[Tensor, Tensor]:
    """An id among the others has the pull of them all in proportion to its probability."""
    assert block.sparse is not None
    seen = sparse.see(block, block.sparse, temperature)
    outcomes = Outcomes(seen.log_t, seen.log_s, seen.t, seen.s)
    summands, pulls = divergence(outcomes)
    total = pulls.sum(-1, keepdim=True)
    rest = seen.s[:, -1:].clamp(min=torch.finfo(seen.s.dtype).tiny)
    gradient = seen.others.mul_(pulls[:, -1:] / rest - total)
    gradient.scatter_add_(-1, seen.ids, (pulls - seen.s * total)[:, :-1])
    return summands.sum(-1), gradient


def between(name: str, value: float, low: str, high: str) -> None:
    """Checks that a share lies strictly between 0 and 1.

    Raises:
        ConfigError: it does not; the error says what the loss would be at each end.
    """
    if not 0 < value < 1:
        raise ConfigError(
            f"{name} must lie strictly between 0 and 1",
            {name: value, "allowed": "0 < … < 1"},
            why=f"At 0 the loss is {low}, at 1 {high}.",
            fix="Choose a value between them, or name the loss that is meant.",
        )

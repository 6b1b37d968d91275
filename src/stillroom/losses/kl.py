"""Forward and reverse Kullback-Leibler divergence between teacher ``t`` and student ``s``."""

import torch
from jaxtyping import Float
from torch import Tensor

from stillroom.losses import sparse
from stillroom.losses.block import Block


def forward_kl(block: Block, *, temperature: float = 1.0) -> tuple[Float[Tensor, " r"], Float[Tensor, "r v"]]:
    """``T² · KL(t ‖ s) = T² · Σ t (log t − log s)`` at temperature T; gradient ``T (s − t)``.

    It covers all that the teacher may say. Each summand has ``s − t`` added, which sums to zero: so every summand is at
    least 0, and the rounding of the two normalisers cancels. From a sparse signal: :func:`sparse.forward_kl`.
    """
    if block.sparse is not None:
        return sparse.forward_kl(block, block.sparse, temperature)
    log_t, log_s = block.teacher(temperature), block.student(temperature)
    t = block.teacher_probabilities(temperature)
    gradient = block.student_probabilities(temperature) - t
    nats = torch.addcmul(gradient, t, log_t - log_s).sum(-1).clamp_(min=0)
    return nats.mul_(temperature**2), _scaled(gradient, temperature)


def reverse_kl(block: Block, *, temperature: float = 1.0) -> tuple[Float[Tensor, " r"], Float[Tensor, "r v"]]:
    """``T² · KL(s ‖ t) = T² · Σ s (log s − log t)`` at temperature T; gradient ``T · s (log s − log t − KL(s ‖ t))``.

    It seeks what the teacher is likely to say. ``t − s`` is added to each summand, as in :func:`forward_kl`. From a
    sparse signal: :func:`sparse.reverse_kl`.
    """
    if block.sparse is not None:
        return sparse.reverse_kl(block, block.sparse, temperature)
    s, t = block.student_probabilities(temperature), block.teacher_probabilities(temperature)
    ratio = block.student(temperature) - block.teacher(temperature)
    weighted = s * ratio
    mean = weighted.sum(-1, keepdim=True)
    nats = (weighted - s).add_(t).sum(-1).clamp_(min=0)
    gradient = weighted.addcmul_(s, mean, value=-1)
    return nats.mul_(temperature**2), _scaled(gradient, temperature)


def _scaled(gradient: Tensor, temperature: float) -> Tensor:
    return gradient if temperature == 1.0 else gradient.mul_(temperature)

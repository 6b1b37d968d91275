"""Forward and reverse Kullback-Leibler divergence between teacher ``t`` and student ``s``."""

import torch
from jaxtyping import Float
from torch import Tensor

from stillroom.losses import sparse
from stillroom.losses.block import Block
from stillroom.losses.pointwise import Outcomes, diverge
from stillroom.losses.sparse import Missing


def forward_kl(
    block: Block, *, temperature: float = 1.0, missing: Missing = "bucket"
) -> tuple[Float[Tensor, " r"], Float[Tensor, "r v"]]:
    """``T² · KL(t ‖ s) = T² · Σ t (log t − log s)`` at temperature T; gradient ``T (s − t)``.

    It covers all that the teacher may say. From a sampled signal it is right in expectation.

    Args:
        missing: of a truncated signal, what the teacher is taken to say of all that was left out: see
            :func:`sparse.completed`.
    """
    if block.sparse is not None and (block.sparse.sampled or missing != "bucket"):
        return sparse.forward_kl(block, block.sparse, temperature, missing)
    return diverge(block, of_teacher, temperature)


def reverse_kl(block: Block, *, temperature: float = 1.0) -> tuple[Float[Tensor, " r"], Float[Tensor, "r v"]]:
    """``T² · KL(s ‖ t) = T² · Σ s (log s − log t)`` at temperature T; gradient ``T · s (log s − log t − KL(s ‖ t))``.

    It seeks what the teacher is likely to say.
    """
    return diverge(block, of_student, temperature)


def of_teacher(o: Outcomes) -> tuple[Tensor, Tensor]:
    """KL(t ‖ s). ``s − t`` is in each summand: so every one is at least 0, and the normalisers' rounding cancels."""
    pulls = o.s - o.t
    return torch.addcmul(pulls, o.t, o.log_t - o.log_s), pulls


def of_student(o: Outcomes) -> tuple[Tensor, Tensor]:
    """KL(s ‖ t), with ``t − s`` in each summand."""
    pulls = (o.log_s - o.log_t).mul_(o.s)
    return (pulls - o.s).add_(o.t), pulls

"""The α-β divergence between teacher ``t`` and student ``s``."""

import torch
from jaxtyping import Float
from torch import Tensor

from stillroom.errors import ConfigError
from stillroom.losses.block import Block
from stillroom.losses.pointwise import Outcomes, diverge


def alpha_beta(
    block: Block, *, temperature: float = 1.0, alpha: float = 0.5, beta: float = 0.5
) -> tuple[Float[Tensor, " r"], Float[Tensor, "r v"]]:
    """``T² / (α β) · Σ [α / c · t^c + β / c · s^c − t^α s^β]`` with ``c = α + β``; gradient ``T (w − s Σ w)`` with
    ``w = (s^c − t^α s^β) / α``.

    A larger α weighs where the teacher is sure, a larger β where the student is. It tends to forward KL for α = 1,
    β → 0, to reverse KL for α → 0, β = 1, and is four times the squared Hellinger distance for α = β = ½ (ABKD, arXiv
    2505.04560).

    Raises:
        ConfigError: alpha or beta is not above 0.
    """
    if not (alpha > 0 and beta > 0):
        raise ConfigError(
            "alpha and beta must be above 0",
            {"alpha": alpha, "beta": beta},
            why="At alpha = 1, beta = 0 the loss is forward_kl, at alpha = 0, beta = 1 it is reverse_kl; the formula "
            "itself is 0 / 0 there.",
            fix="Name forward_kl or reverse_kl, or choose both above 0.",
        )

    def divergence(o: Outcomes) -> tuple[Tensor, Tensor]:
        of_t, of_s = o.log_t * alpha, o.log_s * beta
        cross = (of_t + of_s).exp_()
        from_student = torch.add(o.log_s * alpha, of_s).exp_().sub_(cross)
        from_teacher = of_t.add_(o.log_t * beta).exp_().sub_(cross)
        total = alpha + beta
        summands = from_teacher.div_(beta * total).add_(from_student, alpha=1 / (alpha * total))
        return summands, from_student.div_(alpha)

    return diverge(block, divergence, temperature)

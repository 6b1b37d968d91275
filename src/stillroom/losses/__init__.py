"""Losses: nats per position, with their gradients. One family a file; linear.py is the fused head and divergence."""

from stillroom.losses.adaptive_kl import adaptive_kl
from stillroom.losses.alpha_beta import alpha_beta
from stillroom.losses.block import Block, Loss
from stillroom.losses.cross_entropy import cross_entropy
from stillroom.losses.kl import forward_kl, reverse_kl
from stillroom.losses.linear import LinearLosses, linear_losses
from stillroom.losses.logits import hinge_ranking, logistic_ranking, logit_mse
from stillroom.losses.mixtures import jensen_shannon, skew_kl, skew_reverse_kl
from stillroom.losses.objective import Objective
from stillroom.losses.sparse import check_sparse
from stillroom.losses.total_variation import total_variation

LOSSES: dict[str, Loss] = {
    loss.__name__: loss
    for loss in (
        forward_kl,
        reverse_kl,
        jensen_shannon,
        skew_kl,
        skew_reverse_kl,
        adaptive_kl,
        alpha_beta,
        total_variation,
        logit_mse,
        hinge_ranking,
        logistic_ranking,
        cross_entropy,
    )
}
"""Every loss by its name in a recipe."""

__all__ = [
    "LOSSES",
    "Block",
    "LinearLosses",
    "Loss",
    "Objective",
    "adaptive_kl",
    "alpha_beta",
    "check_sparse",
    "cross_entropy",
    "forward_kl",
    "hinge_ranking",
    "jensen_shannon",
    "linear_losses",
    "logistic_ranking",
    "logit_mse",
    "reverse_kl",
    "skew_kl",
    "skew_reverse_kl",
    "total_variation",
]

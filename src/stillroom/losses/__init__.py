"""Losses: nats per position, with their gradients. One family a file; linear.py is the fused head and divergence."""

from stillroom.losses.block import LogitBlock, Loss
from stillroom.losses.cka import linear_cka
from stillroom.losses.divergences import (
    adaptive_kl,
    alpha_beta,
    forward_kl,
    jensen_shannon,
    reverse_kl,
    skew_kl,
    skew_reverse_kl,
    total_variation,
)
from stillroom.losses.fused_linear import LinearLosses, linear_losses
from stillroom.losses.hidden import (
    Distance,
    channel_kl,
    channel_scaled_mse,
    cosine,
    mse,
    normalized_mse,
)
from stillroom.losses.logits import cross_entropy, hinge_ranking, logistic_ranking, logit_mse
from stillroom.losses.objective import Objective
from stillroom.losses.relation import attention_relation
from stillroom.losses.sparse import check_sparse

DISTANCES: dict[str, Distance] = {
    distance.__name__: distance
    for distance in (
        mse,
        normalized_mse,
        channel_scaled_mse,
        cosine,
        channel_kl,
        linear_cka,
        attention_relation,
    )
}
"""Every distance by its name in a recipe."""


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
    "DISTANCES",
    "LOSSES",
    "LinearLosses",
    "LogitBlock",
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

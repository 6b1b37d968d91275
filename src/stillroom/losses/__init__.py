"""Losses: nats per position, with their gradients. One family a file; linear.py is the fused head and divergence."""

from stillroom.losses.block import Block, Loss
from stillroom.losses.cross_entropy import cross_entropy
from stillroom.losses.kl import forward_kl, reverse_kl
from stillroom.losses.linear import LinearLosses, Objective, linear_losses
from stillroom.losses.sparse import check_sparse

LOSSES: dict[str, Loss] = {"forward_kl": forward_kl, "reverse_kl": reverse_kl, "cross_entropy": cross_entropy}
"""Every loss by its name in a recipe."""

__all__ = [
    "LOSSES",
    "Block",
    "LinearLosses",
    "Loss",
    "Objective",
    "check_sparse",
    "cross_entropy",
    "forward_kl",
    "linear_losses",
    "reverse_kl",
]

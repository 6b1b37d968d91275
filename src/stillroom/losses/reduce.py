"""Reduce: from nats per position to the one number that is minimised."""

import torch
from jaxtyping import Float
from torch import Tensor

from stillroom.batch import Batch


def position_weights(batch: Batch, num_kept_of_step: int) -> Float[Tensor, " kept"]:
    """What each kept position of a micro-batch counts: one over the kept positions of the *whole* optimizer step.

    ``num_kept_of_step`` counts all micro-batches (and all ranks), so the sum over them is the step's mean, however the
    step was split.
    """
    device = batch.tokens.device
    return torch.full(batch.kept.shape, 1 / num_kept_of_step, dtype=widest_float(device), device=device)


def widest_float(device: torch.device) -> torch.dtype:
    """The type that sums over a step are held in: float64, but for Apple's devices, which have none."""
    return torch.float32 if device.type == "mps" else torch.float64

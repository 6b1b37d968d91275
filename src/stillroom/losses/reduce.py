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
    return torch.full(batch.kept.shape, 1 / num_kept_of_step, dtype=torch.float64, device=batch.tokens.device)

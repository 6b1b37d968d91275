"""An objective is a loss with its weight; reduction turns nats per position into the one number that is minimized."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from stillroom.batch import Batch
from stillroom.errors import MismatchError
from stillroom.losses.block import LogitBlock, Loss
from stillroom.losses.metrics import student_entropy, teacher_entropy

Measure = Callable[[LogitBlock], Tensor]
"""A number for each position that is only reported, such as agreement."""


@dataclass(frozen=True)
class Objective:
    """A loss with its weight in the sum, and the loss's keyword arguments."""

    name: str
    loss: Loss
    weight: float = 1.0
    arguments: dict[str, Any] = field(default_factory=dict)
    token_weight: Measure | None = None
    """What each position counts in it besides; 1 by default."""


TokenWeight = Callable[[LogitBlock], Tensor]
"""What each position of a block counts, [r]. It is a number like any other to the gradient, which does not pass it."""


def by_entropy(who: Literal["student", "teacher"], *, certain: float, uncertain: float) -> TokenWeight:
    """``certain + (uncertain − certain) · H / log v`` with the entropy H at temperature 1 over v columns."""

    def weight(block: LogitBlock) -> Float[Tensor, " r"]:
        entropy = student_entropy(block) if who == "student" else teacher_entropy(block)
        share = entropy / math.log(max(2, block.vocab_size))
        return certain + (uncertain - certain) * share

    return weight


def by_data(block: LogitBlock) -> Float[Tensor, " r"]:
    """The batch's own weights.

    Raises:
        MismatchError: it has none.
    """
    if block.data_weights is None:
        raise MismatchError(
            "an objective counts tokens by the data, and the batch brings no weights",
            {"token_weight": "data", "batch.weights": "none"},
            why="Every token would count alike, which is not what was asked for.",
            fix="Set data.weight to the column that holds each row's weight.",
        )
    return block.data_weights.to(block.logits("student").dtype)


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

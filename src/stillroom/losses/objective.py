"""Objective: a loss as one part of what is minimised."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from stillroom.losses.block import Block, Loss

Measure = Callable[[Block], Tensor]
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

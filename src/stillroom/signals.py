"""Signals: what the teacher said about each position."""

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from stillroom.head import Head


@dataclass(frozen=True)
class Dense:
    """Everything: the teacher's last hidden states and its head, from which its logits are formed chunk by chunk."""

    hidden: Float[Tensor, "n d"]
    head: Head

    def at(self, positions: Int[Tensor, " k"]) -> "Dense":
        """The signal of some of the positions only."""
        return Dense(self.hidden[positions], self.head)


Signal = Dense

"""Batch: what a model reads and what it is to predict, already shifted. Losses never shift."""

from dataclasses import dataclass, fields
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """``b`` rows of ``t`` positions. A row holds one or several documents; the rest of it is padding."""

    tokens: Int[Tensor, "b t"]
    """What the model reads."""
    labels: Int[Tensor, "b t"]
    """What follows each token in its document: the token to predict. 0 where nothing does."""
    loss_mask: Bool[Tensor, "b t"]
    """True where the position counts: its next token is to be learnt."""
    positions: Int[Tensor, "b t"]
    """The place in its document, from 0. It restarts with each document, which is how attention is kept inside."""
    documents: Int[Tensor, "b t"]
    """The number of the document in its data set, from 0; -1 on padding."""
    weights: Float[Tensor, "b t"] | None = None
    """What the data say that each position counts, where they say it."""

    @cached_property
    def kept(self) -> Int[Tensor, " kept"]:
        """Where the positions that count lie in the flattened batch."""
        return self.loss_mask.flatten().nonzero().squeeze(-1)

    @property
    def num_kept(self) -> int:
        return len(self.kept)

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on a device. ``kept`` goes with it, since finding it there would wait for the device."""
        there = {f.name: tensor for f in fields(self) if (tensor := getattr(self, f.name)) is not None}
        moved = Batch(**{name: tensor.to(device, non_blocking=True) for name, tensor in there.items()})
        moved.__dict__["kept"] = self.kept.to(device, non_blocking=True)
        return moved

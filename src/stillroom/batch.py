"""Batch: the input tokens of a model and its labels, already shifted. Losses never shift."""

from dataclasses import dataclass, fields
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """``b`` rows of ``t`` positions. A row holds one or more documents, and then padding."""

    tokens: Int[Tensor, "b t"]
    """The input tokens."""
    labels: Int[Tensor, "b t"]
    """The token to predict: the next one in the document. 0 where there is none."""
    loss_mask: Bool[Tensor, "b t"]
    """True where the position counts, so that its label is learned."""
    positions: Int[Tensor, "b t"]
    """The index in the document, from 0. It restarts with each document, which keeps attention inside it."""
    documents: Int[Tensor, "b t"]
    """The number of the document in its data set, from 0; -1 on padding."""
    weights: Float[Tensor, "b t"] | None = None
    """The weights that the data give to each position, where there are any."""

    @cached_property
    def kept(self) -> Int[Tensor, " kept"]:
        """The indices of the positions that count, in the flattened batch."""
        return self.loss_mask.flatten().nonzero().squeeze(-1)

    @property
    def num_kept(self) -> int:
        return len(self.kept)

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on a device. ``kept`` goes with it, since finding it there would wait for the device."""
        tensors = {f.name: tensor for f in fields(self) if (tensor := getattr(self, f.name)) is not None}
        moved = Batch(**{name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()})
        moved.__dict__["kept"] = self.kept.to(device, non_blocking=True)
        return moved

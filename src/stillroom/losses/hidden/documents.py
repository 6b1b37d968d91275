"""Documents: which positions belong together, so that those of equally long ones are worked on at once."""

import torch
from jaxtyping import Int
from torch import Tensor


def by_length(documents: Int[Tensor, " n"]) -> list[Int[Tensor, "g m"]]:
    """For each length ``m`` that occurs, the positions of all ``g`` documents that are so long.

    Nothing is padded, so what is computed of a document knows nothing of the others. There are at most √(2n) lengths.
    """
    _, counts = torch.unique_consecutive(documents, return_counts=True)
    starts = counts.cumsum(0) - counts
    return [
        starts[counts == length].unsqueeze(-1) + torch.arange(length, device=documents.device)
        for length in counts.unique().tolist()
    ]

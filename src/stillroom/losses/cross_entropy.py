"""Cross-entropy with the data's own next tokens."""

import torch
from jaxtyping import Float
from torch import Tensor

from stillroom.losses.block import LOWEST_LOGIT, Block


def cross_entropy(
    block: Block, *, temperature: float = 1.0, smoothing: float = 0.0
) -> tuple[Float[Tensor, " r"], Float[Tensor, "r v"]]:
    """``−T² · Σ y log s`` at temperature T; gradient ``T (s − y)``.

    ``y`` is 1 on the next token; with label smoothing ε it is 1 − ε there, and ε / v more on each of the v columns that
    the student holds possible (arXiv 1512.00567).
    """
    column = block.next_tokens.unsqueeze(-1)
    log_student = block.student(temperature)
    nats = log_student.gather(-1, column).squeeze(-1).neg()
    gradient = block.student_probabilities(temperature).clone()
    if smoothing:
        possible = ~(block.logits("student") <= LOWEST_LOGIT)
        share = smoothing / possible.sum(-1, keepdim=True).to(log_student.dtype)
        nats = nats * (1 - smoothing) - (torch.where(possible, log_student, 0) * share).sum(-1)
        gradient -= possible * share
    gradient.scatter_add_(-1, column, gradient.new_full(column.shape, smoothing - 1.0))
    return nats * temperature**2, gradient if temperature == 1.0 else gradient.mul_(temperature)

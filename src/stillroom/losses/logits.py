"""Losses of the logits themselves: cross-entropy of the labels, squared differences, and rankings."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from stillroom.kernels.selection import top_indices
from stillroom.losses.block import LOWEST_LOGIT, LogitBlock
from stillroom.losses.sparse import check_sparse


def cross_entropy(
    block: LogitBlock, *, temperature: float = 1.0, smoothing: float = 0.0
) -> tuple[Float[Tensor, " r"], Float[Tensor, "r v"]]:
    """``−T² · Σ y log s`` at temperature T; gradient ``T (s − y)``.

    ``y`` is 1 on the next token; with label smoothing ε it is 1 − ε there, and ε / v more on each of the v tokens that
    are possible for the student (arXiv 1512.00567).
    """
    label = block.labels.unsqueeze(-1)
    log_student = block.student(temperature)
    nats = log_student.gather(-1, label).squeeze(-1).neg()
    gradient = block.student_probabilities(temperature).clone()
    if smoothing:
        possible = ~(block.logits("student") <= LOWEST_LOGIT)
        share = smoothing / possible.sum(-1, keepdim=True).to(log_student.dtype)
        nats = nats * (1 - smoothing) - (torch.where(possible, log_student, 0) * share).sum(-1)
        gradient -= possible * share
    gradient.scatter_add_(-1, label, gradient.new_full(label.shape, smoothing - 1.0))
    return nats * temperature**2, gradient if temperature == 1.0 else gradient.mul_(temperature)


def logit_mse(block: LogitBlock) -> tuple[Float[Tensor, " r"], Float[Tensor, "r v"]]:
    """``1/v · Σ (a − b)²`` where a and b are the student's and the teacher's logits, each less its mean; gradient
    ``2/v (a − b)``.

    It is the limit of 2 T² KL for T → ∞ (arXiv 1503.02531, 2105.08919), in logits squared. Tokens that are impossible
    (−inf) for either do not count.

    Raises:
        MismatchError: the teacher's signal is sparse.
    """
    if block.sparse is not None:
        check_sparse("logit_mse", sampled=block.sparse.sampled, temperatures=())
    student, teacher = block.logits("student"), block.logits("teacher")
    on = ~((student <= LOWEST_LOGIT) | (teacher <= LOWEST_LOGIT))
    count = on.sum(-1, keepdim=True).clamp_(min=1).to(student.dtype)
    gap = torch.where(on, student - teacher, 0)
    gap.sub_(gap.sum(-1, keepdim=True) / count).mul_(on)
    return (gap.square() / count).sum(-1), gap.mul_(2 / count)


def hinge_ranking(
    block: LogitBlock, *, k: int = 16, margin: float = 1.0
) -> tuple[Float[Tensor, " r"], Float[Tensor, "r v"]]:
    """Mean over pairs i before j of the teacher's top k tokens of ``max(0, margin − (a_i − a_j))`` with student
    logits a; the gradient is −1 on ``a_i`` and 1 on ``a_j`` of each pair within the margin, over the number of pairs.

    The student learns the order and a distance, and is free in all else. The unit is logits.
    """

    def cost(ahead: Tensor) -> tuple[Tensor, Tensor]:
        short = margin - ahead
        return short.clamp(min=0), (short > 0).to(ahead.dtype).neg_()

    return _ranking(block, k, cost)


def logistic_ranking(block: LogitBlock, *, k: int = 16) -> tuple[Float[Tensor, " r"], Float[Tensor, "r v"]]:
    """Mean over pairs i before j of the teacher's top k tokens of ``log(1 + exp(−(a_i − a_j)))`` with student
    logits a (RankNet); the gradient is ``−σ(a_j − a_i)`` on ``a_i`` and as much on ``a_j``, over the number of pairs.

    It is a smooth hinge that is never 0: a pair is pushed apart ever further, though ever less.
    """

    def cost(ahead: Tensor) -> tuple[Tensor, Tensor]:
        return torch.nn.functional.softplus(-ahead), torch.sigmoid(-ahead).neg_()

    return _ranking(block, k, cost)


def _ranking(
    block: LogitBlock, k: int, cost: Callable[[Tensor], tuple[Tensor, Tensor]]
) -> tuple[Float[Tensor, " r"], Float[Tensor, "r v"]]:
    """The mean over pairs of a cost, which is a function of the difference of the two student logits."""
    student = block.logits("student")
    if block.sparse is not None:
        check_sparse("a ranking", sampled=block.sparse.sampled, temperatures=())
        ids, defined = block.sparse.ids[:, :k], block.sparse.log_probs[:, :k] > -torch.inf
    else:
        logits, ids = top_indices(block.logits("teacher"), k)
        defined = logits > LOWEST_LOGIT
    scores = student.gather(-1, ids)
    values, slopes = cost(scores.unsqueeze(-1) - scores.unsqueeze(-2))
    pairs = (defined.unsqueeze(-1) & defined.unsqueeze(-2)).triu(1)
    share = 1 / pairs.sum((-1, -2)).clamp(min=1).to(student.dtype)
    slopes = torch.where(pairs, slopes, 0) * share[:, None, None]
    gradient = torch.zeros_like(student).scatter_add_(-1, ids, slopes.sum(-1) - slopes.sum(-2))
    return torch.where(pairs, values, 0).sum((-1, -2)) * share, gradient

"""Losses of the logits themselves, cross-entropy of the labels, squared differences and rankings; and the measures:
numbers for each position that are reported and never minimized."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from stillroom.errors import MismatchError
from stillroom.kernels import LOWEST_LOGIT
from stillroom.kernels.selection import top_indices
from stillroom.losses.block import LogitBlock, NatsAndGradient, check_sparse


def cross_entropy(block: LogitBlock, *, temperature: float = 1.0, smoothing: float = 0.0) -> NatsAndGradient:
    """``−T² · Σ y log s`` at temperature T; gradient ``T (s − y)``.

    ``y`` is 1 on the next token; with label smoothing ε it is 1 − ε there, and ε / v more on each of the v tokens that
    are possible for the student (arXiv 1512.00567).
    """
    label = block.labels.unsqueeze(-1)
    log_student = block.log_probs("student", temperature)
    nats = log_student.gather(-1, label).squeeze(-1).neg()
    gradient = block.probs("student", temperature).clone()
    if smoothing:
        possible = ~(block.logits("student") <= LOWEST_LOGIT)
        share = smoothing / possible.sum(-1, keepdim=True).to(log_student.dtype)
        nats = nats * (1 - smoothing) - (torch.where(possible, log_student, 0) * share).sum(-1)
        gradient -= possible * share
    gradient.scatter_add_(-1, label, gradient.new_full(label.shape, smoothing - 1.0))
    return nats * temperature**2, gradient if temperature == 1.0 else gradient.mul_(temperature)


def logit_mse(block: LogitBlock) -> NatsAndGradient:
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


def hinge_ranking(block: LogitBlock, *, k: int = 16, margin: float = 1.0) -> NatsAndGradient:
    """Mean over pairs i before j of the teacher's top k tokens of ``max(0, margin − (a_i − a_j))`` with student
    logits a; the gradient is −1 on ``a_i`` and 1 on ``a_j`` of each pair within the margin, over the number of pairs.

    The student learns the order and a distance, and is free in all else. The unit is logits.
    """

    def cost(ahead: Tensor) -> tuple[Tensor, Tensor]:
        short = margin - ahead
        return short.clamp(min=0), (short > 0).to(ahead.dtype).neg_()

    return _ranking(block, k, cost)


def logistic_ranking(block: LogitBlock, *, k: int = 16) -> NatsAndGradient:
    """Mean over pairs i before j of the teacher's top k tokens of ``log(1 + exp(−(a_i − a_j)))`` with student
    logits a (RankNet); the gradient is ``−σ(a_j − a_i)`` on ``a_i`` and as much on ``a_j``, over the number of pairs.

    It is a smooth hinge that is never 0: a pair is pushed apart ever further, though ever less.
    """

    def cost(ahead: Tensor) -> tuple[Tensor, Tensor]:
        return torch.nn.functional.softplus(-ahead), torch.sigmoid(-ahead).neg_()

    return _ranking(block, k, cost)


def _ranking(block: LogitBlock, k: int, cost: Callable[[Tensor], tuple[Tensor, Tensor]]) -> NatsAndGradient:
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


def student_entropy(block: LogitBlock) -> Float[Tensor, " r"]:
    """``−Σ s log s``: the entropy of the student's distribution, in nats."""
    return -(block.probs("student") * block.log_probs("student")).sum(-1)


def teacher_entropy(block: LogitBlock) -> Float[Tensor, " r"]:
    """``−Σ t log t``: the entropy of the teacher's distribution, in nats.

    Raises:
        MismatchError: the signal is sparse and does not contain it, or is a sample, whose noise would be in it.
    """
    signal = block.sparse
    if signal is None:
        return -(block.probs("teacher") * block.log_probs("teacher")).sum(-1)
    if signal.sampled or signal.entropy is None:
        raise MismatchError(
            "the stored signal does not tell the teacher's entropy",
            {"needed": "the entropy at each position", "stored": "a sample" if signal.sampled else "none"},
            why="From a sample it comes with the noise of the same draws as the loss, so their product is biased.",
            fix="Capture with signal.kind=top_k or top_p and signal.entropy=true, or use a live teacher.",
        )
    return signal.entropy.to(block.dtype)


def top1_agreement(block: LogitBlock) -> Float[Tensor, " r"]:
    """1 where student and teacher have the same top token, else 0. A sparse signal's first entry is the top one."""
    student = block.log_probs("student")
    top_of_teacher = block.log_probs("teacher").argmax(-1) if block.sparse is None else block.sparse.ids[:, 0]
    return (student.argmax(-1) == top_of_teacher).to(student.dtype)


def top10_overlap(block: LogitBlock) -> Float[Tensor, " r"]:
    """``|top 10 of t ∩ top 10 of s| / 10``: the share of the teacher's top ten tokens that are the student's too.

    A vocabulary of fewer than ten tokens is compared whole.

    Raises:
        MismatchError: there is no dense teacher.
    """
    k = min(10, block.vocab_size)
    (_, student), (_, teacher) = (top_indices(block.logits(who), k) for who in ("student", "teacher"))
    both = student.unsqueeze(-1) == teacher.unsqueeze(-2)
    return both.sum((-1, -2)).to(block.dtype) / k


def confidence(block: LogitBlock) -> Float[Tensor, " r"]:
    """``max s``: the student's probability of its top token."""
    logits = block.logits("student")
    return (logits.amax(-1) - logits.logsumexp(-1)).exp()


def correct(block: LogitBlock) -> Float[Tensor, " r"]:
    """1 where the student's top token is the data's next token, else 0."""
    logits = block.logits("student")
    return (logits.argmax(-1) == block.labels).to(logits.dtype)


def accepted_mass(block: LogitBlock) -> Float[Tensor, " r"]:
    """``Σ min(t, s)``: the rate at which speculative decoding accepts the student's drafts; 1 less the total variation.

    Everything that a truncated signal left out is one outcome, which can only make it higher.
    """
    outcomes = block.outcomes()
    return torch.minimum(outcomes.t, outcomes.s).sum(-1)


def teacher_cross_entropy(block: LogitBlock) -> Float[Tensor, " r"]:
    """``−log t[next token]``: the teacher's own cross-entropy with the data, in nats."""
    if block.sparse is not None:
        assert block.sparse.label_log_probs is not None  # it is measured only where it was kept
        return block.sparse.label_log_probs.to(block.dtype).neg()
    return block.log_probs("teacher").gather(-1, block.labels.unsqueeze(-1)).squeeze(-1).neg()

"""Measures: numbers for each position that are reported and never minimized."""

import torch
from jaxtyping import Float
from torch import Tensor

from stillroom.errors import MismatchError
from stillroom.kernels.selection import top_indices
from stillroom.losses import sparse
from stillroom.losses.block import LogitBlock


def student_entropy(block: LogitBlock) -> Float[Tensor, " r"]:
    """``−Σ s log s``: the entropy of the student's distribution, in nats."""
    return -(block.student_probabilities() * block.student()).sum(-1)


def teacher_entropy(block: LogitBlock) -> Float[Tensor, " r"]:
    """``−Σ t log t``: the entropy of the teacher's distribution, in nats.

    Raises:
        MismatchError: the signal is sparse and does not contain it, or is a sample, whose noise would be in it.
    """
    signal = block.sparse
    if signal is None:
        return -(block.teacher_probabilities() * block.teacher()).sum(-1)
    if signal.sampled or signal.entropy is None:
        raise MismatchError(
            "the stored signal does not tell the teacher's entropy",
            {"needed": "the entropy at each position", "stored": "a sample" if signal.sampled else "none"},
            why="From a sample it comes with the noise of the same draws as the loss, so their product is biased.",
            fix="Capture with signal.kind=top_k or top_p and signal.entropy=true, or use a live teacher.",
        )
    return signal.entropy.to(block.logits("student").dtype)


def top1_agreement(block: LogitBlock) -> Float[Tensor, " r"]:
    """1 where student and teacher have the same top token, else 0. A sparse signal's first entry is the top one."""
    student = block.student()
    top_of_teacher = block.teacher().argmax(-1) if block.sparse is None else block.sparse.ids[:, 0]
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
    return both.sum((-1, -2)).to(block.logits("student").dtype) / k


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
    if block.sparse is not None:
        seen = sparse.see(block, block.sparse, 1.0)
        return torch.minimum(seen.t, seen.s).sum(-1)
    return torch.minimum(block.teacher_probabilities(), block.student_probabilities()).sum(-1)


def teacher_cross_entropy(block: LogitBlock) -> Float[Tensor, " r"]:
    """``−log t[next token]``: the teacher's own cross-entropy with the data, in nats."""
    if block.sparse is not None:
        assert block.sparse.label_log_probs is not None  # it is measured only where it was kept
        return block.sparse.label_log_probs.to(block.logits("student").dtype).neg()
    return block.teacher().gather(-1, block.labels.unsqueeze(-1)).squeeze(-1).neg()

"""Measures: numbers for each position that are reported and never minimised."""

from jaxtyping import Float
from torch import Tensor

from stillroom.losses.block import Block


def top1_agreement(block: Block) -> Float[Tensor, " r"]:
    """1 where student and teacher hold the same token for the likeliest, else 0. A sparse signal names it first."""
    student = block.student()
    likeliest = block.teacher().argmax(-1) if block.sparse is None else block.sparse.ids[:, 0]
    return (student.argmax(-1) == likeliest).to(student.dtype)


def teacher_cross_entropy(block: Block) -> Float[Tensor, " r"]:
    """``−log t[next token]``: the teacher's own cross-entropy with the data, in nats."""
    if block.sparse is not None:
        assert block.sparse.label_log_probs is not None  # it is measured only where it was kept
        return block.sparse.label_log_probs.to(block.student().dtype).neg()
    return block.teacher().gather(-1, block.next_tokens.unsqueeze(-1)).squeeze(-1).neg()

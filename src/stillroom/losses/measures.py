"""Measures: numbers for each position that are reported and never minimised."""

from jaxtyping import Float
from torch import Tensor

from stillroom.losses.block import Block


def top1_agreement(block: Block) -> Float[Tensor, " r"]:
    """1 where student and teacher hold the same token for the likeliest, else 0."""
    student, teacher = block.student(), block.teacher()
    return (student.argmax(-1) == teacher.argmax(-1)).to(student.dtype)


def teacher_cross_entropy(block: Block) -> Float[Tensor, " r"]:
    """``−log t[next token]``: the teacher's own cross-entropy with the data, in nats."""
    return block.teacher().gather(-1, block.next_tokens.unsqueeze(-1)).squeeze(-1).neg()

"""The losses as the textbook has them, in float64, and the table of losses that every test of this folder runs over.

A loss that is added to ``stillroom.losses.LOSSES`` joins all these tests by one line in ``LOSSES`` below.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from stillroom import losses
from stillroom.head import Head
from stillroom.losses import Block, Objective
from stillroom.signals import Dense

TEMPERATURES = (0.25, 1.0, 2.0, 7.5)

properties = settings(deadline=None, max_examples=60, derandomize=True, database=None)


def softmax(logits: Tensor, temperature: float) -> Tensor:
    exponentials = ((logits - logits.max()) / temperature).exp()
    return exponentials / exponentials.sum()


def kl(p: Tensor, q: Tensor) -> Tensor:
    """Σ p log(p / q) of two vectors; a column where p is 0 counts 0."""
    on = p > 0
    return (p[on] * (p[on].log() - q[on].log())).sum()


def forward_kl(student: Tensor, teacher: Tensor, next_token: int, temperature: float = 1.0) -> Tensor:  # noqa: ARG001
    return temperature**2 * kl(softmax(teacher, temperature), softmax(student, temperature))


def reverse_kl(student: Tensor, teacher: Tensor, next_token: int, temperature: float = 1.0) -> Tensor:  # noqa: ARG001
    return temperature**2 * kl(softmax(student, temperature), softmax(teacher, temperature))


def cross_entropy(student: Tensor, teacher: Tensor, next_token: int, temperature: float = 1.0) -> Tensor:  # noqa: ARG001
    return -(temperature**2) * softmax(student, temperature)[next_token].log()


@dataclass(frozen=True)
class Row:
    """A loss of the table.

    Args:
        naive: its value at one position, from student's logits, teacher's logits, next token and the loss's arguments.
        divergence: it compares student and teacher, is never negative, and 0 where they are equal and only there.
        settings: sets of arguments to try; a divergence is tried at further temperatures besides.
    """

    naive: Callable[..., Tensor]
    divergence: bool
    settings: tuple[dict[str, float], ...] = tuple({"temperature": t} for t in TEMPERATURES)


LOSSES = {
    "forward_kl": Row(forward_kl, divergence=True),
    "reverse_kl": Row(reverse_kl, divergence=True),
    "cross_entropy": Row(cross_entropy, divergence=False),
}
DIVERGENCES = [name for name, row in LOSSES.items() if row.divergence]
CASES = [(name, arguments) for name, row in LOSSES.items() for arguments in row.settings]
every_case = pytest.mark.parametrize(("name", "arguments"), CASES, ids=str)
"""Every loss with every set of its arguments."""


def objective(name: str, weight: float = 1.0, **arguments: float) -> Objective:
    return Objective(name, losses.LOSSES[name], weight, arguments)


SEVERAL = [
    objective("forward_kl", 0.9, temperature=2.0),
    objective("reverse_kl", -0.3),
    objective("cross_entropy", 0.1),
]
"""A sum of objectives."""


def value_and_gradient(name: str, student: Tensor, teacher: Tensor, next_tokens: Tensor, **arguments: float):
    """What the package says of ``[r, v]`` logits, which it may change: so it gets copies."""
    return losses.LOSSES[name](Block(student.clone(), teacher.clone(), next_tokens), **arguments)


def naive_nats(name: str, student: Tensor, teacher: Tensor, next_tokens: Tensor, **arguments: float) -> Tensor:
    """The value at each of ``r`` positions, one position after another, in float64, differentiable."""
    rows = zip(student.double(), teacher.double(), next_tokens.tolist(), strict=True)
    return torch.stack([LOSSES[name].naive(s, t, token, **arguments) for s, t, token in rows])


def naive_logits(hidden: Tensor, head: Head, num_columns: int | None = None) -> Tensor:
    """All logits in float64, with everything that the head does to them."""
    logits = hidden.double() @ head.weight.double().T
    if head.bias is not None:
        logits = logits + head.bias.double()
    logits = logits * head.scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return logits[:, :num_columns]


def naive_total(
    hidden: Tensor,
    head: Head,
    objectives: Sequence[Objective],
    next_tokens: Tensor,
    weights: Tensor,
    signal: Dense,
    num_columns: int | None = None,
) -> Tensor:
    """What ``linear_losses`` minimises, with whole logits held, in float64, differentiable."""
    student = naive_logits(hidden, head, num_columns)
    teacher = naive_logits(signal.hidden, signal.head, num_columns)
    total = torch.zeros((), dtype=torch.float64)
    for o in objectives:
        for i, nats in enumerate(naive_nats(o.name, student, teacher, next_tokens, **o.arguments)):
            total = total + o.weight * weights[i].double() * nats
    return total


@dataclass
class Problem:
    """Inputs of ``linear_losses``: a student, a teacher of another width and with more columns, and next tokens."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor
    next_tokens: Tensor
    weights: Tensor
    signal: Dense

    def head(self, **transformation: float) -> Head:
        return Head(self.weight, self.bias, **transformation)

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.hidden, self.weight, self.bias

    def gradients(self, total: Tensor) -> list[Tensor]:
        """Of the hidden states, the head's weight and its bias."""
        return list(torch.autograd.grad(total, self.leaves))


def problem(
    n: int = 11,
    columns: int = 13,
    width: int = 6,
    *,
    teacher_columns: int | None = None,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Problem:
    """A random problem; the teacher has 3 dimensions more than the student, and as many columns unless told."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    teacher = Head(normal(teacher_columns or columns, width + 3), normal(teacher_columns or columns), scale=0.5)
    return Problem(
        hidden=normal(n, width).requires_grad_(),
        weight=normal(columns, width).requires_grad_(),
        bias=normal(columns).requires_grad_(),
        next_tokens=torch.randint(0, columns - 3, (n,), generator=g),
        weights=torch.rand(n, generator=g, dtype=torch.float64) + 0.1,
        signal=Dense(normal(n, width + 3), teacher),
    )


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """The norm of the difference over the norm of what was wanted."""
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def _pairs(num_columns: int) -> st.SearchStrategy[tuple[list[float], list[float]]]:
    logits = st.lists(st.floats(-30, 30, width=32), min_size=num_columns, max_size=num_columns)
    return st.tuples(logits, logits)


logit_pairs = st.integers(2, 6).flatmap(_pairs)
"""Student's and teacher's logits of one position."""
temperatures = st.floats(0.05, 50)

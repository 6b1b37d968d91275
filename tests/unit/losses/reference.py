"""The losses as the textbook has them, in float64, and the table of losses that every test of this folder runs over.

A loss that is added to ``stillroom.losses.config.LOSSES`` joins all these tests by one line in ``LOSSES`` below.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from stillroom.lm_head import LMHead
from stillroom.losses import config
from stillroom.losses.block import LogitBlock
from stillroom.losses.objective import Objective
from stillroom.signals import Dense

TEMPERATURES = (0.25, 1.0, 2.0, 7.5)

properties = settings(deadline=None, max_examples=30, derandomize=True, database=None)


def softmax(logits: Tensor, temperature: float) -> Tensor:
    exponentials = ((logits - logits.max()) / temperature).exp()
    return exponentials / exponentials.sum()


def kl(p: Tensor, q: Tensor) -> Tensor:
    """Σ p log(p / q) of two vectors; a column where p is 0 counts 0."""
    on = p > 0
    return (p[on] * (p[on].log() - q[on].log())).sum()


def naive(divergence: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A divergence of two vectors of probabilities, teacher's and student's, as a function of logits."""

    def value(student: Tensor, teacher: Tensor, next_token: int, temperature: float = 1.0, **arguments) -> Tensor:  # noqa: ARG001
        arguments.pop("missing", None)
        return temperature**2 * divergence(softmax(teacher, temperature), softmax(student, temperature), **arguments)

    return value


def jensen_shannon(t: Tensor, s: Tensor, beta: float = 0.5) -> Tensor:
    m = beta * t + (1 - beta) * s
    return beta * kl(t, m) + (1 - beta) * kl(s, m)


def skew_kl(t: Tensor, s: Tensor, alpha: float = 0.1) -> Tensor:
    return kl(t, alpha * t + (1 - alpha) * s)


def skew_reverse_kl(t: Tensor, s: Tensor, alpha: float = 0.1) -> Tensor:
    return kl(s, alpha * s + (1 - alpha) * t)


def adaptive_kl(t: Tensor, s: Tensor, mu: float = 0.5) -> Tensor:
    order = t.argsort(descending=True, stable=True)
    before = t[order].cumsum(0) - t[order]
    head = order[before < mu]
    gap = (t - s).abs().detach()
    share = gap[head].sum() / gap.sum() if gap.sum() > 0 else 0.5
    return share * kl(t, s) + (1 - share) * kl(s, t)


def alpha_beta(t: Tensor, s: Tensor, alpha: float = 0.5, beta: float = 0.5) -> Tensor:
    c = alpha + beta

    def power(x: Tensor, exponent: float) -> Tensor:
        return torch.where(x > 0, x.clamp(min=1e-320) ** exponent, 0)

    terms = power(t, alpha) * power(s, beta) - alpha / c * power(t, c) - beta / c * power(s, c)
    return -terms.sum() / (alpha * beta)


def total_variation(t: Tensor, s: Tensor) -> Tensor:
    return (t - s).abs().sum() / 2


def logit_mse(student: Tensor, teacher: Tensor, next_token: int) -> Tensor:  # noqa: ARG001
    on = student.isfinite() & teacher.isfinite()
    student, teacher = student[on], teacher[on]
    return ((student - student.mean()) - (teacher - teacher.mean())).square().mean()


def ranking(cost: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def value(student: Tensor, teacher: Tensor, next_token: int, k: int = 16, **arguments) -> Tensor:  # noqa: ARG001
        on = teacher.isfinite()
        order = [i for i in teacher.argsort(descending=True, stable=True).tolist() if on[i]][:k]
        costs = [cost(student[i] - student[j], **arguments) for n, i in enumerate(order) for j in order[n + 1 :]]
        return torch.stack(costs).mean() if costs else 0 * student.sum()

    return value


def hinge(ahead: Tensor, margin: float = 1.0) -> Tensor:
    return (margin - ahead).clamp(min=0)


def logistic(ahead: Tensor) -> Tensor:
    return torch.logaddexp(torch.zeros_like(ahead), -ahead)


def cross_entropy(
    student: Tensor,
    teacher: Tensor,  # noqa: ARG001
    next_token: int,
    temperature: float = 1.0,
    smoothing: float = 0.0,
) -> Tensor:
    logs = torch.log_softmax(student / temperature, 0)
    smooth = logs[student.isfinite()].mean()
    return -(temperature**2) * ((1 - smoothing) * logs[next_token] + smoothing * smooth)


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
    settings: tuple[dict[str, Any], ...] = tuple({"temperature": t} for t in TEMPERATURES)


def tempered(**arguments: float) -> tuple[dict[str, float], ...]:
    return tuple({"temperature": t, **arguments} for t in TEMPERATURES)


LOSSES = {
    "forward_kl": Row(naive(kl), divergence=True),
    "reverse_kl": Row(naive(lambda t, s: kl(s, t)), divergence=True),
    "jensen_shannon": Row(
        naive(jensen_shannon), divergence=True, settings=(*tempered(), {"beta": 0.1}, {"beta": 0.9, "temperature": 2.0})
    ),
    "skew_kl": Row(naive(skew_kl), divergence=True, settings=(*tempered(), {"alpha": 0.7})),
    "skew_reverse_kl": Row(naive(skew_reverse_kl), divergence=True, settings=(*tempered(), {"alpha": 0.7})),
    "adaptive_kl": Row(
        naive(adaptive_kl), divergence=True, settings=(*tempered(), {"mu": 0.1}, {"mu": 0.9, "temperature": 2.0})
    ),
    "alpha_beta": Row(
        naive(alpha_beta),
        divergence=True,
        settings=(*tempered(), {"alpha": 0.2, "beta": 0.7}, {"alpha": 1.5, "beta": 0.5}),
    ),
    "total_variation": Row(naive(total_variation), divergence=True),
    "logit_mse": Row(logit_mse, divergence=True, settings=({},)),
    "hinge_ranking": Row(ranking(hinge), divergence=False, settings=({}, {"k": 3, "margin": 4.0})),
    "logistic_ranking": Row(ranking(logistic), divergence=False, settings=({}, {"k": 3})),
    "cross_entropy": Row(cross_entropy, divergence=False, settings=(*tempered(), {"smoothing": 0.3})),
}
TEMPERED = [name for name, row in LOSSES.items() if "temperature" in row.settings[0]]
DIVERGENCES = [name for name, row in LOSSES.items() if row.divergence]
CASES = [(name, arguments) for name, row in LOSSES.items() for arguments in row.settings]
SMOOTH = [(name, row.settings[-1]) for name, row in LOSSES.items() if name != "adaptive_kl"]
"""Each loss once, but for the one whose gradient holds a part of it fixed, so that differences do not agree with it."""
BOUNDED = ("jensen_shannon", "skew_kl", "skew_reverse_kl", "alpha_beta", "total_variation")
"""Where student and teacher are both sure and of different minds, the gradients of these vanish."""
every_case = pytest.mark.parametrize(("name", "arguments"), CASES, ids=str)
"""Every loss with every set of its arguments."""
every_case_not_saturated = pytest.mark.parametrize(
    ("name", "arguments"), [(n, a) for n, a in CASES if n not in BOUNDED or a.get("temperature", 1.0) >= 1], ids=str
)
"""Every loss but where a gradient that vanishes would be held to a share of itself."""


def objective(name: str, weight: float = 1.0, **arguments) -> Objective:
    return Objective(name, config.LOSSES[name].load(), weight, arguments)


SEVERAL = [
    objective("forward_kl", 0.9, temperature=2.0),
    objective("reverse_kl", -0.3),
    objective("cross_entropy", 0.1),
]
"""A sum of objectives."""


def value_and_gradient(name: str, student: Tensor, teacher: Tensor, labels: Tensor, **arguments: float):
    """What the package says of ``[r, v]`` logits, which it may change: so it gets copies."""
    return config.LOSSES[name].load()(LogitBlock(student.clone(), teacher.clone(), labels), **arguments)


def naive_nats(name: str, student: Tensor, teacher: Tensor, labels: Tensor, **arguments: float) -> Tensor:
    """The value at each of ``r`` positions, one position after another, in float64, differentiable."""
    rows = zip(student.double(), teacher.double(), labels.tolist(), strict=True)
    return torch.stack([LOSSES[name].naive(s, t, token, **arguments) for s, t, token in rows])


def naive_logits(hidden: Tensor, head: LMHead, vocab_size: int | None = None) -> Tensor:
    """All logits in float64, with everything that the head does to them."""
    logits = hidden.double() @ head.weight.double().T
    if head.bias is not None:
        logits = logits + head.bias.double()
    logits = logits * head.scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return logits[:, :vocab_size]


def naive_total(
    hidden: Tensor,
    head: LMHead,
    objectives: Sequence[Objective],
    labels: Tensor,
    weights: Tensor,
    signal: Dense,
    vocab_size: int | None = None,
) -> Tensor:
    """What ``linear_losses`` minimizes, with whole logits held, in float64, differentiable."""
    student = naive_logits(hidden, head, vocab_size)
    teacher = naive_logits(signal.hidden, signal.head, vocab_size)
    total = torch.zeros((), dtype=torch.float64)
    for o in objectives:
        for i, nats in enumerate(naive_nats(o.name, student, teacher, labels, **o.arguments)):
            total = total + o.weight * weights[i].double() * nats
    return total


@dataclass
class Problem:
    """Inputs of ``linear_losses``: a student, a teacher of another width and with more columns, and next tokens."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor
    labels: Tensor
    weights: Tensor
    signal: Dense

    def head(self, **transformation: float) -> LMHead:
        return LMHead(self.weight, self.bias, **transformation)

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

    teacher = LMHead(normal(teacher_columns or columns, width + 3), normal(teacher_columns or columns), scale=0.5)
    return Problem(
        hidden=normal(n, width).requires_grad_(),
        weight=normal(columns, width).requires_grad_(),
        bias=normal(columns).requires_grad_(),
        labels=torch.randint(0, columns - 3, (n,), generator=g),
        weights=torch.rand(n, generator=g, dtype=torch.float64) + 0.1,
        signal=Dense(normal(n, width + 3), teacher),
    )


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """The norm of the difference over the norm of what was wanted."""
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def _pairs(vocab_size: int) -> st.SearchStrategy[tuple[list[float], list[float]]]:
    logits = st.lists(st.floats(-30, 30, width=32), min_size=vocab_size, max_size=vocab_size)
    return st.tuples(logits, logits)


logit_pairs = st.integers(2, 6).flatmap(_pairs)
"""Student's and teacher's logits of one position."""
temperatures = st.floats(0.05, 50)

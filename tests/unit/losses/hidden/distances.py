"""Naive float64 formulas of the distances, document by document and position by position, and how they are called."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from stillroom.losses.config import DISTANCES
from stillroom.losses.hidden import Pair
from stillroom.signals import Attention

ARGUMENTS: dict[str, dict[str, Any]] = {"channel_kl": {"temperature": 2.0}, "attention_relation": {"heads": 2}}
BY_POSITION = ("mse", "normalized_mse", "channel_scaled_mse", "cosine", "channel_kl")
NAMES = (*BY_POSITION, "linear_cka", "attention_relation")
LENGTHS = (5, 1, 9, 3, 9, 2)
"""Of documents: for 6 channels the CKA of 9 positions is computed by channels, of the others by positions."""

every_distance = pytest.mark.parametrize("name", NAMES)

States = Sequence[Tensor]
"""The states [n, d]; or queries, keys and values, for the attention relation."""


def scale_of(width: int) -> Tensor:
    return torch.linspace(0.3, 3.0, width, dtype=torch.float64)


def random_states(
    name: str, lengths: Sequence[int] = LENGTHS, width: int = 6, *, seed: int = 0, dtype: torch.dtype = torch.float64
) -> States:
    g = torch.Generator().manual_seed(seed)
    count = 3 if name == "attention_relation" else 1
    return [torch.randn(sum(lengths), width, generator=g, dtype=torch.float64).to(dtype) for _ in range(count)]


def documents_of(lengths: Sequence[int]) -> Tensor:
    """Numbered as packed rows are: the same number comes again, but not beside itself."""
    return (torch.arange(len(lengths)) % 3).repeat_interleave(torch.tensor(lengths, dtype=torch.long))


def values(name: str, student: States, teacher: States, lengths: Sequence[int] = LENGTHS, **arguments: Any) -> Tensor:
    ours, theirs = ((x[0] if len(x) == 1 else Attention(*x)) for x in (student, teacher))
    scale = scale_of(teacher[0].shape[1]) if name == "channel_scaled_mse" else None
    pair = Pair(ours, theirs, documents_of(lengths), scale)
    return DISTANCES[name].load()(pair, **(ARGUMENTS.get(name, {}) | arguments))


def values_and_gradients(
    name: str, student: States, teacher: States, lengths: Sequence[int] = LENGTHS, **arguments: Any
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The gradient is that of a sum in which the positions count differently."""
    student = [x.detach().clone().requires_grad_() for x in student]
    found = values(name, student, teacher, lengths, **arguments)
    counts = torch.linspace(0.5, 2.0, len(found), dtype=found.dtype)
    return found.detach(), torch.autograd.grad((found * counts).sum(), student)


def naive(name: str, student: States, teacher: States, lengths: Sequence[int] = LENGTHS) -> Tensor:
    """The values in float64, as differentiable functions of the student's states."""
    parts = []
    start = 0
    for m in lengths:
        s, t = ([x[start : start + m].double() for x in side] for side in (student, teacher))
        parts.append(_OF_A_DOCUMENT[name](s, t))
        start += m
    return torch.cat(parts)


def by_position(function):
    return lambda s, t: torch.stack([function(a, b) for a, b in zip(s[0], t[0], strict=True)])


def kl(teacher: Tensor, student: Tensor) -> Tensor:
    """Of two vectors of logits."""
    t, s = (x.exp() / x.exp().sum() for x in (teacher, student))
    return (t * (t.log() - s.log())).sum()


def _linear_cka(s: States, t: States) -> Tensor:
    if len(s[0]) < 3:
        return 0 * s[0].sum(1)
    x, y = (states[0] - states[0].mean(0) for states in (s, t))
    alignment = (x.T @ y).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm())
    return (1 - alignment).expand(len(x))


def _attention_relation(s: States, t: States) -> Tensor:
    heads = ARGUMENTS["attention_relation"]["heads"]
    rows = []
    for i in range(len(s[0])):
        row = torch.zeros((), dtype=torch.float64)
        for ours, theirs in zip(s, t, strict=True):
            for a, b in zip(ours.chunk(heads, 1), theirs.chunk(heads, 1), strict=True):
                scores = [x[: i + 1] @ x[i] / x.shape[1] ** 0.5 for x in (b, a)]
                row = row + kl(*scores) / heads
        rows.append(row)
    return torch.stack(rows)


_OF_A_DOCUMENT = {
    "mse": by_position(lambda s, t: ((s - t) ** 2).sum() / len(s)),
    "normalized_mse": by_position(lambda s, t: ((s - t) ** 2).sum() / (t**2).sum()),
    "channel_scaled_mse": by_position(lambda s, t: (((s - t) / scale_of(len(s))) ** 2).sum() / len(s)),
    "cosine": by_position(lambda s, t: 1 - (s @ t) / (s.norm() * t.norm())),
    "channel_kl": by_position(lambda s, t: 4 * kl(t / 2, s / 2)),
    "linear_cka": _linear_cka,
    "attention_relation": _attention_relation,
}

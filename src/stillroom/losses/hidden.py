"""Distances between hidden states of student and teacher, one value per position, with their gradients."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from stillroom.errors import MismatchError, NonFiniteError
from stillroom.lm_head import accumulator
from stillroom.losses.divergences import Outcomes, of_teacher
from stillroom.signals import Attention

EPS = 1e-6
"""The least mean square that a row is divided by, as in most models' norms, so that a row of zeros stays finite."""


@dataclass(frozen=True)
class Pair:
    """The states of student and teacher at the same ``n`` kept positions of one layer each."""

    student: Float[Tensor, "n d"] | Attention
    """States after the projector, with the teacher's width; queries, keys and values for the attention relation."""
    teacher: Float[Tensor, "n e"] | Attention
    """``e`` is ``d``, except for linear CKA and the attention relation, which compare any widths."""
    documents: Int[Tensor, " n"]
    """The document of each position; equal numbers are adjacent."""
    scale: Float[Tensor, " d"] | None = None
    """The divisor of each channel's difference, for the channel-scaled MSE."""

    def states(self) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n d"]]:
        """Student's and teacher's states, in float32, or float64 where the student's are. The teacher has no gradient.

        Raises:
            MismatchError: their widths differ.
        """
        student, teacher = self.student, self.teacher
        assert isinstance(student, Tensor)
        assert isinstance(teacher, Tensor)
        if student.shape[1] != teacher.shape[1]:
            raise MismatchError(
                "the states of student and teacher have different widths",
                {"student": f"{student.shape[1]} channels", "teacher": f"{teacher.shape[1]} channels"},
                why="This distance compares them channel by channel.",
                fix="Use a projector, or linear_cka, which compares states of any widths.",
            )
        dtype = accumulator(student.dtype)
        return student.to(dtype), teacher.detach().to(dtype)


Distance = Callable[..., Float[Tensor, " n"]]
"""``distance(pair, **arguments)``: one value for each position, differentiable in the student's states.

It is at least 0, and 0 with a gradient of 0 where the student's states are the teacher's. A state that is not finite
gives a value that is not finite.
"""


def mean_square(states: Float[Tensor, "n d"]) -> Float[Tensor, "n 1"]:
    """The mean square of each row over its channels."""
    return states.square().mean(-1, keepdim=True)


def no_autocast(tensor: Tensor) -> torch.autocast:
    """A context in which products keep the type of their operands, inside an autocast too."""
    return torch.autocast(tensor.device.type, enabled=False)


def by_length(documents: Int[Tensor, " n"]) -> list[Int[Tensor, "g m"]]:
    """The positions of all ``g`` documents of length ``m``, for each length ``m`` that occurs.

    Nothing is padded, so each document is independent of the others. There are at most √(2n) lengths.
    """
    _, counts = torch.unique_consecutive(documents, return_counts=True)
    starts = counts.cumsum(0) - counts
    return [
        starts[counts == length].unsqueeze(-1) + torch.arange(length, device=documents.device)
        for length in counts.unique().tolist()
    ]


Normalize = Literal["rms", "layer_norm"]


def normalized(states: Float[Tensor, "n d"], by: Normalize) -> Float[Tensor, "n d"]:
    """Each row divided by its RMS over channels (``rms``), or centred and divided by its standard deviation
    (``layer_norm``), as in models' norms: ``EPS`` is added to the mean square, so a row of zeros stays a row of zeros.

    The result is float32, or float64 where the states are.
    """
    states = states.to(accumulator(states.dtype))
    if by == "layer_norm":
        states = states - states.mean(-1, keepdim=True)
    return states * (mean_square(states) + EPS).rsqrt()


FLOOR = 0.1
"""The least scale of a channel, as a share of the median of all that are not 0."""


def mse(pair: Pair) -> Float[Tensor, " n"]:
    """``1/d Σ (s − t)²``."""
    student, teacher = pair.states()
    return (student - teacher).square().mean(-1)


def normalized_mse(pair: Pair) -> Float[Tensor, " n"]:
    """``Σ (s − t)² / Σ t²``, each position by the teacher's own mean square there.

    A mean square below ``EPS`` counts as ``EPS``, so the value is continuous, and finite where the teacher's state is
    0.
    """
    student, teacher = pair.states()
    return (student - teacher).square().mean(-1) / mean_square(teacher).squeeze(-1).clamp(min=EPS)


def channel_scaled_mse(pair: Pair) -> Float[Tensor, " n"]:
    """``1/d Σ ((s − t) / scale)²``, so that a few channels with massive activations do not outweigh all others.

    Raises:
        MismatchError: the pair has no scale.
    """
    if pair.scale is None:
        raise MismatchError(
            "the states have no scale for their channels",
            {"needed": "one number for each channel", "given": None},
            why="The difference in each channel is divided by it.",
            fix="Measure it by `channel_scale` on the teacher's states of the first batch.",
        )
    student, teacher = pair.states()
    return ((student - teacher) / pair.scale.to(student.dtype)).square().mean(-1)


def channel_scale(sum_of_squares: Float[Tensor, " d"], count: int) -> Float[Tensor, " d"]:
    """The RMS of each channel over ``count`` positions, and at least a tenth of the median of those that are not 0.

    So a channel in which the teacher is almost silent is not blown up, and a massive one does not move the floor.
    Where all are 0 the scale is 1.

    Raises:
        NonFiniteError: a sum is not finite, or there are no positions.
    """
    rms = (sum_of_squares / count if count else sum_of_squares * torch.nan).sqrt()
    if not rms.isfinite().all():
        raise NonFiniteError(
            "the scale of the channels is not finite",
            {"channels": f"{int((~rms.isfinite()).sum())} of {len(rms)}", "positions": count},
            why="Each channel's difference is divided by it.",
            fix="Look for infinite activations in the teacher, and for a first batch that keeps no position.",
        )
    alive = rms[rms > 0]
    return rms.clamp(min=FLOOR * alive.median().item()) if len(alive) else torch.ones_like(rms)


def cosine(pair: Pair) -> Float[Tensor, " n"]:
    """``1 − cos(s, t)``, as ``½ ‖s/‖s‖ − t/‖t‖‖²``: never negative, and exact where the two are near.

    A state whose mean square is below ``EPS`` is divided as if it were ``EPS``; so one of zeros has length 0 rather
    than 1, and counts ½ beside any other.
    """
    student, teacher = (
        states / (mean_square(states).clamp(min=EPS) * states.shape[1]).sqrt() for states in pair.states()
    )
    return (student - teacher).square().sum(-1) / 2


def channel_kl(pair: Pair, *, temperature: float = 1.0) -> Float[Tensor, " n"]:
    """``T² · KL(softmax(t / T) ‖ softmax(s / T))`` over the channels, in nats."""
    student, teacher = pair.states()
    apply: Any = _ChannelKL.apply
    return apply(student, teacher, temperature)


def channel_forward_kl(student: Float[Tensor, "*r c"], teacher: Float[Tensor, "*r c"]) -> tuple[Tensor, Tensor]:
    """``KL(t ‖ s)`` of the softmaxes over the last axis, and its gradient ``s − t`` in the student's logits."""
    log_t, log_s = teacher.log_softmax(-1), student.log_softmax(-1)
    summands, gradient = of_teacher(Outcomes(log_t, log_s, log_t.exp(), log_s.exp()))
    return summands.sum(-1).clamp_(min=0), gradient


class _ChannelKL(torch.autograd.Function):
    """Has the gradient as a formula, which is exactly 0 where student and teacher are equal."""

    @staticmethod
    def forward(ctx, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        nats, gradient = channel_forward_kl(student / temperature, teacher / temperature)
        ctx.save_for_backward(gradient.mul_(temperature))
        return nats.mul_(temperature**2)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        (gradient,) = ctx.saved_tensors
        return gradient * upstream.unsqueeze(-1), None, None

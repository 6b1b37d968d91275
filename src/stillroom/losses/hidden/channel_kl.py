"""Forward KL between softmaxes over channels, as if states were logits."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from stillroom.losses.hidden.pair import Pair
from stillroom.losses.kl import of_teacher
from stillroom.losses.pointwise import Outcomes


def channel_kl(pair: Pair, *, temperature: float = 1.0) -> Float[Tensor, " n"]:
    """``T² · KL(softmax(t / T) ‖ softmax(s / T))`` over the channels, in nats."""
    student, teacher = pair.states()
    apply: Any = _ChannelKL.apply
    return apply(student, teacher, temperature)


def forward_kl(student: Float[Tensor, "*r c"], teacher: Float[Tensor, "*r c"]) -> tuple[Tensor, Tensor]:
    """``KL(t ‖ s)`` of the softmaxes over the last axis, and its gradient ``s − t`` in the student's logits."""
    log_t, log_s = teacher.log_softmax(-1), student.log_softmax(-1)
    summands, gradient = of_teacher(Outcomes(log_t, log_s, log_t.exp(), log_s.exp()))
    return summands.sum(-1).clamp_(min=0), gradient


class _ChannelKL(torch.autograd.Function):
    """With the gradient as a formula, which is exactly 0 where student and teacher are equal."""

    @staticmethod
    def forward(ctx, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        nats, gradient = forward_kl(student / temperature, teacher / temperature)
        ctx.save_for_backward(gradient.mul_(temperature))
        return nats.mul_(temperature**2)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        (gradient,) = ctx.saved_tensors
        return gradient * upstream.unsqueeze(-1), None, None

"""Linear centred kernel alignment between the states of each document."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from stillroom.lm_head import accumulator
from stillroom.losses.hidden import Pair, by_length, no_autocast

CHUNK_BYTES = 64 * 2**20
"""The budget for the matrices of the documents that are worked on at once; one document is never divided."""


def linear_cka(pair: Pair) -> Float[Tensor, " n"]:
    """``1 − ‖XᵀY‖² / (‖XᵀX‖ ‖YᵀY‖)`` of each document, at each of its positions (arXiv 1905.00414).

    X and Y are the student's and the teacher's states at the document's kept positions, [m, channels], each channel
    centred over them. A document of one position or two (where any states are alike), or with the same state at all of
    them, tells nothing: 0, and no gradient.
    """
    student, teacher = pair.student, pair.teacher
    assert isinstance(student, Tensor)
    assert isinstance(teacher, Tensor)
    apply: Any = _LinearCKA.apply
    return apply(student, teacher.detach(), by_length(pair.documents))


class _LinearCKA(torch.autograd.Function):
    """A document's gradient is computed beside its value; backward only scales it."""

    @staticmethod
    def forward(ctx, student: Tensor, teacher: Tensor, groups: Sequence[Tensor]) -> Tensor:
        dtype = accumulator(student.dtype)
        values = student.new_empty(len(student), dtype=dtype)
        gradient = torch.empty_like(student, dtype=dtype) if ctx.needs_input_grad[0] else None
        with no_autocast(student):
            for positions in _chunks(groups, student.shape[1] + teacher.shape[1], values.itemsize):
                x, y = (states[positions].to(dtype) for states in (student, teacher))
                value, slope = _one_minus_cka(x, y)
                values[positions] = value.unsqueeze(-1)
                if gradient is not None:
                    gradient[positions] = slope
        ctx.groups = groups
        ctx.save_for_backward(gradient)
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        (gradient,) = ctx.saved_tensors
        total = torch.empty_like(upstream)
        for positions in ctx.groups:
            total[positions] = upstream[positions].sum(-1, keepdim=True)
        return gradient * total.unsqueeze(-1), None, None


def _chunks(groups: Sequence[Tensor], width: int, itemsize: int) -> list[Tensor]:
    """The groups, in parts for which the budget is enough."""
    parts = []
    for positions in groups:
        m = positions.shape[1]
        bytes_each = itemsize * m * (2 * width + 3 * min(m, width))
        parts.extend(positions.split(max(1, CHUNK_BYTES // bytes_each)))
    return parts


def _one_minus_cka(
    x: Float[Tensor, "g m d"], y: Float[Tensor, "g m e"]
) -> tuple[Float[Tensor, " g"], Float[Tensor, "g m d"]]:
    """The value of each document, and its gradient in x.

    Both are centred and brought to length 1 first, so nothing overflows. CKA knows neither a shift nor a factor, so its
    gradient in what comes of that is also the gradient in x, but for the length.
    """
    (x, length), (y, length_y) = _centred(x), _centred(y)
    m, d, e = x.shape[1], x.shape[2], y.shape[2]
    told = ((length != 0) & (length_y != 0) & (m > 2)) | length.isnan() | length_y.isnan()
    value, gradient = (_by_gram if 2 * m * m <= d * d + e * e + d * e else _by_features)(x, y)
    gradient /= length.view(-1, 1, 1)
    return _where(told, value), _where(told, gradient)


def _where(told: Bool[Tensor, " g"], x: Tensor) -> Tensor:
    return torch.where(told.view(-1, *[1] * (x.ndim - 1)), x, 0)


def _centred(x: Float[Tensor, "g m d"]) -> tuple[Float[Tensor, "g m d"], Float[Tensor, " g"]]:
    """Of each document, the centred states brought to length 1, and the length. Equal states have the length 0."""
    varies = (x - x[:, :1] != 0).flatten(1).any(-1)  # true of what is not a number
    x = x - x.mean(1, keepdim=True)
    length = torch.where(varies, torch.linalg.vector_norm(x, dim=(1, 2)), 0)
    return x / length.view(-1, 1, 1), length


def _by_gram(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """CKA is the cosine of XXᵀ and YYᵀ; one less it is half the square of the distance between their directions."""
    (k, a), (other, _) = _direction(x @ x.mT), _direction(y @ y.mT)
    gap = k - other
    value = gap.square().sum((1, 2)) / 2
    gradient = gap.addcmul_(k, value.view(-1, 1, 1), value=-1) @ x
    return value, gradient.mul_(2 / a)


def _by_features(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The difference of nearly equal numbers where CKA is near 1: exact to a rounding of 1."""
    (k, a), (_, b), c = _direction(x.mT @ x), _direction(y.mT @ y), y.mT @ x
    norm = _norm(c)
    cka = (norm / a) * (norm / b)
    gradient = (x @ k).mul_(cka) - y @ (c / b)
    return (1 - cka).view(-1).clamp_(min=0), gradient.mul_(2 / a)


def _direction(matrices: Float[Tensor, "g r c"]) -> tuple[Float[Tensor, "g r c"], Float[Tensor, "g 1 1"]]:
    norm = _norm(matrices)
    return matrices / norm, norm


def _norm(matrices: Float[Tensor, "g r c"]) -> Float[Tensor, "g 1 1"]:
    return torch.linalg.vector_norm(matrices, dim=(1, 2), keepdim=True)

"""Distances that compare relations between the positions of a document: linear CKA and attention relations."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from stillroom.errors import MismatchError
from stillroom.kernels import LOWEST_LOGIT
from stillroom.lm_head import accumulator
from stillroom.losses.hidden import Pair, by_length, channel_forward_kl, no_autocast
from stillroom.signals import Attention

CKA_BYTES = 64 * 2**20
"""The budget for the matrices of the documents that are worked on at once; one document is never divided."""
RELATION_BYTES = 16 * 2**20
"""The default budget for the attention relations that are held at once."""
NUM_TENSORS = 9
"""The most tensors of a chunk's shape that the attention relation holds."""


def linear_cka(pair: Pair) -> Float[Tensor, " n"]:
    """``1 − ‖XᵀY‖² / (‖XᵀX‖ ‖YᵀY‖)`` of each document, at each of its positions (arXiv 1905.00414).

    X and Y are the student's and the teacher's states at the document's kept positions, [m, channels], each channel
    centered over them. A document of one position or two (where any states are alike), or with the same state at all of
    them, contributes 0 and no gradient.
    """
    student, teacher = pair.student, pair.teacher
    assert isinstance(student, Tensor)
    assert isinstance(teacher, Tensor)
    apply: Any = _LinearCKA.apply
    return apply(student, teacher.detach(), by_length(pair.documents))


class _LinearCKA(torch.autograd.Function):
    """Computes a document's gradient beside its value; backward only scales it."""

    @staticmethod
    def forward(ctx, student: Tensor, teacher: Tensor, groups: Sequence[Tensor]) -> Tensor:
        dtype = accumulator(student.dtype)
        values = student.new_empty(len(student), dtype=dtype)
        gradient = torch.empty_like(student, dtype=dtype) if ctx.needs_input_grad[0] else None
        with no_autocast(student):
            for group in groups:
                m, width = group.shape[1], student.shape[1] + teacher.shape[1]
                bytes_each = values.itemsize * m * (2 * width + 3 * min(m, width))
                for positions in group.split(max(1, CKA_BYTES // bytes_each)):
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


def _one_minus_cka(
    x: Float[Tensor, "g m d"], y: Float[Tensor, "g m e"]
) -> tuple[Float[Tensor, " g"], Float[Tensor, "g m d"]]:
    """The value of each document, and its gradient in x.

    Both are centered and scaled to length 1 first, so nothing overflows. CKA does not depend on a shift or a factor, so
    the gradient in the scaled states, divided by the length, is the gradient in x.

    The value is computed from the m × m Gram matrices where these are smaller, and otherwise from products of
    features. CKA is the cosine of XXᵀ and YYᵀ, so 1 less it is half the square of the distance between their
    directions; from features it is a difference of nearly equal numbers where CKA is near 1, exact to a rounding of 1.
    """
    (x, length), (y, length_y) = _centered(x), _centered(y)
    m, d, e = x.shape[1], x.shape[2], y.shape[2]
    defined = ((length != 0) & (length_y != 0) & (m > 2)) | length.isnan() | length_y.isnan()
    if 2 * m * m <= d * d + e * e + d * e:
        (k, a), (other, _) = _direction(x @ x.mT), _direction(y @ y.mT)
        gap = k - other
        value = gap.square().sum((1, 2)) / 2
        gradient = gap.addcmul_(k, value.view(-1, 1, 1), value=-1) @ x
    else:
        (k, a), (_, b), c = _direction(x.mT @ x), _direction(y.mT @ y), y.mT @ x
        norm = torch.linalg.vector_norm(c, dim=(1, 2), keepdim=True)
        cka = (norm / a) * (norm / b)
        gradient = (x @ k).mul_(cka) - y @ (c / b)
        value = (1 - cka).view(-1).clamp_(min=0)
    gradient.mul_(2 / a).div_(length.view(-1, 1, 1))
    return torch.where(defined, value, 0), torch.where(defined.view(-1, 1, 1), gradient, 0)


def _centered(x: Float[Tensor, "g m d"]) -> tuple[Float[Tensor, "g m d"], Float[Tensor, " g"]]:
    """The centered states of each document, scaled to length 1, and the length: 0 where all states are equal."""
    varies = (x - x[:, :1] != 0).flatten(1).any(-1)  # true where a state is not a number
    x = x - x.mean(1, keepdim=True)
    length = torch.where(varies, torch.linalg.vector_norm(x, dim=(1, 2)), 0)
    return x / length.view(-1, 1, 1), length


def _direction(matrices: Float[Tensor, "g r c"]) -> tuple[Float[Tensor, "g r c"], Float[Tensor, "g 1 1"]]:
    norm = torch.linalg.vector_norm(matrices, dim=(1, 2), keepdim=True)
    return matrices / norm, norm


def attention_relation(pair: Pair, *, heads: int, chunk_bytes: int = RELATION_BYTES) -> Float[Tensor, " n"]:
    """``Σ over queries, keys and values of 1/heads Σ_h KL(R_teacher ‖ R_student)``, in nats, of each position's row.

    A vector x is split into ``heads`` relation heads, whatever number of attention heads the model has, and
    ``R_i = softmax over j of x_i · x_j / √(width of a head)``, over the kept positions j ≤ i of i's document.

    Args:
        chunk_bytes: budget for the relations held at once; the result does not depend on it but for rounding. Nothing
            that grows with the square of a document is kept for backward, which computes them again.

    Raises:
        MismatchError: a width is not divided by ``heads``.
    """
    student, teacher = pair.student, pair.teacher
    assert isinstance(student, Attention)
    assert isinstance(teacher, Attention)
    _check_heads(student, teacher, heads)
    groups = by_length(pair.documents)
    apply: Any = _Relation.apply
    nats = [apply(s, t.detach(), groups, heads, chunk_bytes) for s, t in zip(student, teacher, strict=True)]
    return nats[0] + nats[1] + nats[2]


def _check_heads(student: Attention, teacher: Attention, heads: int) -> None:
    widths = {
        f"{who} {name}": x.shape[1]
        for who, attention in (("student", student), ("teacher", teacher))
        for name, x in attention._asdict().items()
    }
    wrong = {name: f"{width} channels" for name, width in widths.items() if heads < 1 or width % heads}
    if wrong:
        raise MismatchError(
            f"vectors cannot be split into {heads} relation heads",
            {"heads": heads, **wrong},
            why="Each relation head takes an equal share of the channels.",
            fix="Choose a number of heads that divides the widths of queries, keys and values in both models.",
        )


class _Relation(torch.autograd.Function):
    """One of queries, keys and values. Backward computes the relations again: they can be weighted only then."""

    @staticmethod
    def forward(
        ctx, student: Tensor, teacher: Tensor, groups: Sequence[Tensor], heads: int, chunk_bytes: int
    ) -> Tensor:
        ctx.save_for_backward(student, teacher)
        ctx.work = groups, heads, chunk_bytes
        nats = student.new_empty(len(student), dtype=accumulator(student.dtype))
        with no_autocast(student):
            for positions, size in _chunks(groups, heads, chunk_bytes, nats.itemsize):
                s, t = (_split(x, positions, heads, nats.dtype) for x in (student, teacher))
                for rows in _rows(positions.shape[1], size):
                    found = channel_forward_kl(_scores(s, rows), _scores(t, rows))[0]
                    nats[positions[:, rows]] = found.unflatten(0, (-1, heads)).mean(1)
        return nats

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        student, teacher = ctx.saved_tensors
        groups, heads, chunk_bytes = ctx.work
        gradient = torch.empty_like(student)
        with no_autocast(student):
            for positions, size in _chunks(groups, heads, chunk_bytes, upstream.itemsize):
                s, t = (_split(x, positions, heads, upstream.dtype) for x in (student, teacher))
                weights = upstream[positions] / (heads * s.shape[-1] ** 0.5)
                weights = weights.repeat_interleave(heads, 0).unsqueeze(-1)
                total = torch.zeros_like(s)
                for rows in _rows(positions.shape[1], size):
                    grad_terms = _scores(s, rows).softmax(-1).sub_(_scores(t, rows).softmax(-1)).mul_(weights[:, rows])
                    total[:, rows].baddbmm_(grad_terms, s[:, : rows.stop])
                    total[:, : rows.stop].baddbmm_(grad_terms.mT, s[:, rows])
                gradient[positions] = total.unflatten(0, (-1, heads)).transpose(1, 2).flatten(2).to(gradient.dtype)
        return gradient, None, None, None, None


def _chunks(groups: Sequence[Tensor], heads: int, chunk_bytes: int, itemsize: int) -> list[tuple[Tensor, int]]:
    """The positions of documents that are worked on at once, [g, m], and the number of their rows that are: all m,
    unless there is one document."""
    chunks = []
    for positions in groups:
        m = positions.shape[1]
        row_bytes = NUM_TENSORS * heads * m * itemsize
        some = positions.split(max(1, chunk_bytes // (row_bytes * m)))
        chunks += [(part, max(1, chunk_bytes // row_bytes)) for part in some]
    return chunks


def _rows(m: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, m)) for start in range(0, m, size)]


def _split(x: Float[Tensor, "n w"], positions: Int[Tensor, "g m"], heads: int, dtype: torch.dtype) -> Tensor:
    """The vectors at some positions, as [documents · heads, m, width of a head]."""
    return x[positions].to(dtype).unflatten(-1, (heads, -1)).transpose(1, 2).flatten(0, 1)


def _scores(x: Float[Tensor, "b m w"], rows: slice) -> Float[Tensor, "b r c"]:
    """``x_i · x_j / √w`` of some rows i, for j up to the last of them; an entry with j > i is impossible."""
    scores = (x[:, rows] * x.shape[-1] ** -0.5) @ x[:, : rows.stop].mT
    later = torch.ones(scores.shape[1:], dtype=torch.bool, device=x.device).triu_(rows.start + 1)
    return scores.masked_fill_(later, LOWEST_LOGIT)

"""Attention relations: whom each position's queries, keys and values resemble, as in MiniLMv2 (arXiv 2012.15828)."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from stillroom.errors import MismatchError
from stillroom.kernels.terms import LOWEST_LOGIT
from stillroom.lm_head import accumulator
from stillroom.losses.hidden import Pair, by_length, channel_forward_kl, no_autocast
from stillroom.signals import Attention

CHUNK_BYTES = 16 * 2**20
"""The default budget for the relations that are held at once."""

NUM_TENSORS = 9
"""How many tensors of a chunk's shape are held at most."""


def attention_relation(pair: Pair, *, heads: int, chunk_bytes: int = CHUNK_BYTES) -> Float[Tensor, " n"]:
    """``Σ over queries, keys and values of 1/heads Σ_h KL(R_teacher ‖ R_student)``, in nats, of each position's row.

    A vector x is split into so many relation heads, whatever number of attention heads the model has, and
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
    """One of the three. The values' gradients cannot be added up before it is known what each position counts."""

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
                    pulls = _scores(s, rows).softmax(-1).sub_(_scores(t, rows).softmax(-1)).mul_(weights[:, rows])
                    total[:, rows].baddbmm_(pulls, s[:, : rows.stop])
                    total[:, : rows.stop].baddbmm_(pulls.mT, s[:, rows])
                gradient[positions] = total.unflatten(0, (-1, heads)).transpose(1, 2).flatten(2).to(gradient.dtype)
        return gradient, None, None, None, None


def _chunks(groups: Sequence[Tensor], heads: int, chunk_bytes: int, itemsize: int) -> list[tuple[Tensor, int]]:
    """The positions of documents that are worked on at once, [g, m], and how many of their rows: all, unless there is
    one document."""
    found = []
    for positions in groups:
        m = positions.shape[1]
        row_bytes = NUM_TENSORS * heads * m * itemsize
        some = positions.split(max(1, chunk_bytes // (row_bytes * m)))
        found += [(part, max(1, chunk_bytes // row_bytes)) for part in some]
    return found


def _rows(m: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, m)) for start in range(0, m, size)]


def _split(x: Float[Tensor, "n w"], positions: Int[Tensor, "g m"], heads: int, dtype: torch.dtype) -> Tensor:
    """[documents · heads, m, width of a head]."""
    return x[positions].to(dtype).unflatten(-1, (heads, -1)).transpose(1, 2).flatten(0, 1)


def _scores(x: Float[Tensor, "b m w"], rows: slice) -> Float[Tensor, "b r c"]:
    """``x_i · x_j / √w`` of some rows i, up to the last row's column; what lies after its row is impossible."""
    scores = (x[:, rows] * x.shape[-1] ** -0.5) @ x[:, : rows.stop].mT
    later = torch.ones(scores.shape[1:], dtype=torch.bool, device=x.device).triu_(rows.start + 1)
    return scores.masked_fill_(later, LOWEST_LOGIT)

"""Distances between hidden states of student and teacher, one value per position, with their gradients: channel by
channel, or of the relations between the positions of a document (linear CKA and attention relations)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from stillroom.errors import MismatchError, NonFiniteError
from stillroom.kernels import LOWEST_LOGIT
from stillroom.lm_head import accumulator
from stillroom.losses.block import Outcomes
from stillroom.losses.config import Normalize
from stillroom.losses.divergences import of_teacher
from stillroom.signals import Attention

EPS = 1e-6
"""The least mean square that a row is divided by, as in most models' norms, so that a row of zeros stays finite."""
FLOOR = 0.1
"""The least scale of a channel, as a share of the median of all that are not 0."""
CKA_BYTES = 64 * 2**20
"""The budget for the matrices of the documents that are worked on at once; one document is never divided."""
RELATION_BYTES = 16 * 2**20
"""The default budget for the attention relations that are held at once."""
NUM_TENSORS = 9
"""The most tensors of a chunk's shape that the attention relation holds."""


@dataclass(frozen=True)
class Pair:
    """The states of student and teacher at the same ``n`` kept positions of one layer each.

    A distance is a function of a pair: one value for each position, differentiable in the student's states. It is at
    least 0, and 0 with a gradient of 0 where the student's states are the teacher's. A state that is not finite gives
    a value that is not finite.
    """

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


def normalized(states: Float[Tensor, "n d"], by: Normalize) -> Float[Tensor, "n d"]:
    """Each row divided by its RMS over channels (``rms``), or centered and divided by its standard deviation
    (``layer_norm``), as in models' norms: ``EPS`` is added to the mean square, so a row of zeros stays a row of zeros.

    The result is float32, or float64 where the states are.
    """
    states = states.to(accumulator(states.dtype))
    if by == "layer_norm":
        states = states - states.mean(-1, keepdim=True)
    return states * (mean_square(states) + EPS).rsqrt()


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
    nats, gradient = channel_forward_kl(student.detach() / temperature, teacher / temperature)
    apply: Any = _WithGradient.apply
    return apply(student, nats.mul_(temperature**2), gradient.mul_(temperature), ())


def channel_forward_kl(student: Float[Tensor, "*r c"], teacher: Float[Tensor, "*r c"]) -> tuple[Tensor, Tensor]:
    """``KL(t ‖ s)`` of the softmaxes over the last axis, and its gradient ``s − t`` in the student's logits."""
    log_t, log_s = teacher.log_softmax(-1), student.log_softmax(-1)
    summands, gradient = of_teacher(Outcomes(log_t, log_s, log_t.exp(), log_s.exp()))
    return summands.sum(-1).clamp_(min=0), gradient


class _WithGradient(torch.autograd.Function):
    """Values with the gradient that a formula gives, which is exactly 0 where student and teacher are equal.

    Positions that are of one of the ``groups`` have one value together.
    """

    @staticmethod
    def forward(ctx, _states: Tensor, values: Tensor, gradient: Tensor, groups: Sequence[Tensor]) -> Tensor:
        ctx.groups = groups
        ctx.save_for_backward(gradient)
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        (gradient,) = ctx.saved_tensors
        total = upstream.clone() if ctx.groups else upstream
        for positions in ctx.groups:
            total[positions] = upstream[positions].sum(-1, keepdim=True)
        return gradient * total.unsqueeze(-1), None, None, None


def linear_cka(pair: Pair) -> Float[Tensor, " n"]:
    """``1 − ‖XᵀY‖² / (‖XᵀX‖ ‖YᵀY‖)`` of each document, at each of its positions (arXiv 1905.00414).

    X and Y are the student's and the teacher's states at the document's kept positions, [m, channels], each channel
    centered over them. A document of one position or two (where any states are alike), or with the same state at all of
    them, contributes 0 and no gradient.
    """
    assert isinstance(pair.student, Tensor)
    assert isinstance(pair.teacher, Tensor)
    student, teacher, dtype = pair.student.detach(), pair.teacher.detach(), accumulator(pair.student.dtype)
    values, gradient = student.new_empty(len(student), dtype=dtype), torch.empty_like(student, dtype=dtype)
    groups, width = by_length(pair.documents), student.shape[1] + teacher.shape[1]
    with no_autocast(student):
        for group in groups:
            m = group.shape[1]
            bytes_each = values.itemsize * m * (2 * width + 3 * min(m, width))
            for positions in group.split(max(1, CKA_BYTES // bytes_each)):
                x, y = (states[positions].to(dtype) for states in (student, teacher))
                value, gradient[positions] = _one_minus_cka(x, y)
                values[positions] = value.unsqueeze(-1)
    apply: Any = _WithGradient.apply
    return apply(pair.student, values, gradient, groups)


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
    sides = {"student": student._asdict(), "teacher": teacher._asdict()}
    widths = {f"{who} {name}": x.shape[1] for who, vectors in sides.items() for name, x in vectors.items()}
    wrong = {name: f"{width} channels" for name, width in widths.items() if heads < 1 or width % heads}
    if wrong:
        raise MismatchError(
            f"vectors cannot be split into {heads} relation heads",
            {"heads": heads, **wrong},
            why="Each relation head takes an equal share of the channels.",
            fix="Choose a number of heads that divides the widths of queries, keys and values in both models.",
        )
    groups = by_length(pair.documents)
    apply: Any = _Relation.apply
    nats = [apply(s, t.detach(), groups, heads, chunk_bytes) for s, t in zip(student, teacher, strict=True)]
    return nats[0] + nats[1] + nats[2]


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
            for positions, ranges in _chunks(groups, heads, chunk_bytes, nats.itemsize):
                s, t = (_split(x, positions, heads, nats.dtype) for x in (student, teacher))
                for rows in ranges:
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
            for positions, ranges in _chunks(groups, heads, chunk_bytes, upstream.itemsize):
                s, t = (_split(x, positions, heads, upstream.dtype) for x in (student, teacher))
                weights = upstream[positions] / (heads * s.shape[-1] ** 0.5)
                weights = weights.repeat_interleave(heads, 0).unsqueeze(-1)
                total = torch.zeros_like(s)
                for rows in ranges:
                    grad_terms = _scores(s, rows).softmax(-1).sub_(_scores(t, rows).softmax(-1)).mul_(weights[:, rows])
                    total[:, rows].baddbmm_(grad_terms, s[:, : rows.stop])
                    total[:, : rows.stop].baddbmm_(grad_terms.mT, s[:, rows])
                gradient[positions] = total.unflatten(0, (-1, heads)).transpose(1, 2).flatten(2).to(gradient.dtype)
        return gradient, None, None, None, None


def _chunks(
    groups: Sequence[Tensor], heads: int, chunk_bytes: int, itemsize: int
) -> Iterator[tuple[Int[Tensor, "g m"], list[slice]]]:
    """The positions of documents that are worked on at once, and the ranges of their rows that are: all m in one,
    unless there is one document."""
    for positions in groups:
        m = positions.shape[1]
        row_bytes = NUM_TENSORS * heads * m * itemsize
        size = max(1, chunk_bytes // row_bytes)
        ranges = [slice(start, min(start + size, m)) for start in range(0, m, size)]
        for some in positions.split(max(1, chunk_bytes // (row_bytes * m))):
            yield some, ranges


def _split(x: Float[Tensor, "n w"], positions: Int[Tensor, "g m"], heads: int, dtype: torch.dtype) -> Tensor:
    """The vectors at some positions, as [documents · heads, m, width of a head]."""
    return x[positions].to(dtype).unflatten(-1, (heads, -1)).transpose(1, 2).flatten(0, 1)


def _scores(x: Float[Tensor, "b m w"], rows: slice) -> Float[Tensor, "b r c"]:
    """``x_i · x_j / √w`` of some rows i, for j up to the last of them; an entry with j > i is impossible."""
    scores = (x[:, rows] * x.shape[-1] ** -0.5) @ x[:, : rows.stop].mT
    later = torch.ones(scores.shape[1:], dtype=torch.bool, device=x.device).triu_(rows.start + 1)
    return scores.masked_fill_(later, LOWEST_LOGIT)

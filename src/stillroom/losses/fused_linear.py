"""The fused head and divergence: losses of a hidden state, with no ``[tokens, vocabulary]`` tensor ever held.

Rows are taken in chunks that a byte budget allows. For each chunk the student's and the teacher's logits are multiplied
out into two buffers that are used again; then, in blocks small enough to stay in the processor's cache, each loss gives
its value and its gradient, which takes the place of the student's logits; two more products turn that into the
gradients of the hidden state and of the head. So the whole costs four matrix products, and backward only scales.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from stillroom.errors import MismatchError
from stillroom.lm_head import LMHead, accumulator, add_product, logits_into
from stillroom.losses.block import LogitBlock
from stillroom.losses.fused import fused_for
from stillroom.losses.objective import Measure, Objective
from stillroom.signals import Signal, Sparse

CHUNK_BYTES = 256 * 2**20
"""The default budget for the two buffers of logits."""

BLOCK_BYTES = 2 * 2**20
"""The budget for one tensor of the element-wise part, on a CPU: it should stay in the cache between two operations."""


class Buffers:
    """Memory for logits, used again by one caller: on a CPU new memory costs time."""

    def __init__(self) -> None:
        self._flat: dict[tuple[int, torch.dtype], Tensor] = {}

    def take(self, number: int, rows: int, columns: int, like: Tensor) -> list[Float[Tensor, "rows columns"]]:
        """So many tensors that hold anything, of the type of ``like`` and where it is."""
        if like.device.type != "cpu":
            return [like.new_empty(rows, columns) for _ in range(number)]
        found = []
        for i in range(number):
            flat = self._flat.get((i, like.dtype))
            if flat is None or len(flat) < rows * columns:
                with torch.inference_mode(False):  # or later calls could not train
                    flat = self._flat[i, like.dtype] = torch.empty(rows * columns, dtype=like.dtype)
            found.append(flat[: rows * columns].view(rows, columns))
        return found


class LinearLosses(NamedTuple):
    total: Float[Tensor, ""]
    """Σ over objectives of weight · Σ over positions of position weight · token weight · nats. The only one with a
    gradient."""
    nats: Float[Tensor, "objectives n"]
    """Every objective's value at every position, unweighted."""
    measures: Float[Tensor, "measures n"]


def linear_losses(
    hidden: Float[Tensor, "n d"],
    head: LMHead,
    objectives: Sequence[Objective],
    labels: Int[Tensor, " n"],
    weights: Float[Tensor, " n"],
    signal: Signal | None = None,
    *,
    vocab_size: int | None = None,
    measures: Sequence[Measure] = (),
    chunk_bytes: int = CHUNK_BYTES,
    data_weights: Float[Tensor, " n"] | None = None,
    buffers: Buffers | None = None,
) -> LinearLosses:
    """Objectives (and measures) of ``n`` positions, differentiable in ``hidden`` and in the head's weight and bias.

    Args:
        weights: what each position counts in ``total``; no gradient flows to it.
        signal: the teacher's, for the same positions; None where no objective needs it.
        vocab_size: only the first so many columns of both heads exist for softmax and loss; all by default.
        data_weights: what the data say that each position counts, for objectives that go by it.
        buffers: those of the calls before; new ones by default.
        chunk_bytes: budget for the buffers of logits; the result does not depend on it but for rounding.
    """
    columns = head.columns(vocab_size)
    if signal is not None:
        _check_columns(columns, signal)
    _check_positions(len(hidden), labels, weights, signal)
    buffers = buffers or Buffers()
    work = _Work(head, objectives, measures, labels, weights, signal, columns, chunk_bytes, data_weights, buffers)
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    work.differentiate = torch.is_grad_enabled()
    apply: Any = _LinearLosses.apply
    if torch.compiler.is_compiling():  # the model around it may be compiled; this is one operation already
        apply = torch.compiler.disable(apply)
    total, nats, measured = apply(hidden, head.weight, head.bias, work)
    return LinearLosses(total, nats, measured)


def _check_positions(n: int, labels: Tensor, weights: Tensor, signal: Signal | None) -> None:
    found = {"next_tokens": len(labels), "weights": len(weights), "hidden": n}
    if signal is not None:
        found["signal"] = len(signal)
    for name, number in found.items():
        if number != n:
            raise MismatchError(
                f"`{name}` and `hidden` speak of different positions",
                {name: f"{number} positions", "hidden": f"{n} positions"},
                why="Each position's loss would be taken with the target of another.",
                fix="Take both at the same positions; `Signal.at(batch.kept)` does so for a signal.",
            )


def _check_columns(columns: int, signal: Signal) -> None:
    there = signal.vocab_size
    if isinstance(signal, Sparse):
        if there not in (None, columns):
            raise MismatchError(
                "the stored signal was taken over other columns",
                {"stored": f"{there} columns", "compared now": f"{columns} columns"},
                why="Its probabilities sum to 1 over its own columns only.",
                fix=f"Compare {there} columns.",
            )
    elif there is None or there < columns:
        raise MismatchError(
            f"{columns} columns cannot be taken from the teacher",
            {"asked for": f"{columns} columns", "the teacher has": f"{there} columns"},
            why="The others would be whatever lies in memory.",
            fix="Compare at most the columns that both have.",
        )


@dataclass
class _Work:
    """What the fused operation is told besides its differentiable inputs."""

    head: LMHead
    objectives: Sequence[Objective]
    measures: Sequence[Measure]
    labels: Tensor
    weights: Tensor
    signal: Signal | None
    columns: int
    chunk_bytes: int
    data_weights: Tensor | None
    buffers: Buffers
    differentiate: bool = False

    @property
    def num_buffers(self) -> int:
        """The student's logits have one, and the teacher's where there are any."""
        return 1 if self.signal is None or isinstance(self.signal, Sparse) else 2

    def rows_of_chunk(self, itemsize: int) -> int:
        return max(1, self.chunk_bytes // (self.columns * itemsize * self.num_buffers))

    def rows_of_block(self, itemsize: int, on_cpu: bool) -> int:
        return max(1, BLOCK_BYTES // (self.columns * itemsize)) if on_cpu else self.rows_of_chunk(itemsize)


class _LinearLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None, work: _Work):
        with torch.autocast(hidden.device.type, enabled=False):
            total, nats, measured, gradients = _chunks(hidden, weight, bias, work, ctx.needs_input_grad)
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(nats, measured)
        return total, nats, measured

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor, *_):  # pyright: ignore[reportIncompatibleMethodOverride]
        if upstream.device.type == "cpu" and upstream == 1:  # as it is of a loss that is minimised: nothing is copied
            return (*ctx.saved_tensors, None)
        return (*(None if g is None else g * upstream.to(g.dtype) for g in ctx.saved_tensors), None)


def _chunks(hidden: Tensor, weight: Tensor, bias: Tensor | None, work: _Work, needs: Sequence[bool]):
    """All chunks, one after another: the total, the values, and the gradients that are needed (None elsewhere)."""
    dtype, n = accumulator(hidden.dtype), len(hidden)
    head = LMHead(weight.to(hidden.dtype), bias, work.head.scale, work.head.softcap)
    wanted = [need and work.differentiate for need in needs[:3]]
    hidden_grad = torch.empty(hidden.shape, dtype=dtype, device=hidden.device) if wanted[0] else None
    weight_grad = torch.empty(weight.shape, dtype=dtype, device=hidden.device) if wanted[1] else None
    if weight_grad is not None:
        weight_grad[work.columns if n else 0 :] = 0
    bias_grad = torch.zeros(len(weight), dtype=dtype, device=hidden.device) if wanted[2] else None
    nats = torch.empty(len(work.objectives), n, dtype=dtype, device=hidden.device)
    measured = torch.empty(len(work.measures), n, dtype=dtype, device=hidden.device)
    counts = work.weights.to(dtype).repeat(len(work.objectives), 1)
    factors = torch.tensor([o.weight for o in work.objectives], dtype=dtype, device=hidden.device)
    if not (work.objectives or work.measures):  # nothing is asked of the logits
        return nats.new_zeros(()), nats, measured, [None, None, None]
    fused = None
    if work.head.softcap is None:
        fused = fused_for(work.objectives, work.measures, work.signal, dtype=dtype, device=hidden.device)
    if fused is not None:
        _count_by_data(counts, work)

    size = work.rows_of_chunk(nats.itemsize)
    buffers = work.buffers.take(work.num_buffers, min(size, n), work.columns, nats)
    for start in range(0, n, size):
        rows = slice(start, min(start + size, n))
        student, *teacher = (buffer[: rows.stop - start] for buffer in buffers)
        logits_into(student, hidden[rows], head)
        if work.signal is not None and not isinstance(work.signal, Sparse):
            work.signal.logits_into(teacher[0], rows)
        of_teacher = teacher[0] if teacher else None
        if fused is None:
            _blocks(student, of_teacher, rows, work, nats, counts, measured, any(wanted))
        else:
            weights = factors.unsqueeze(-1) * work.head.scale * counts[:, rows]
            sparse = work.signal.at(rows) if isinstance(work.signal, Sparse) else None
            nats[:, rows], measured[:, rows] = fused(
                student, of_teacher, work.labels[rows], sparse, weights, gradient=any(wanted)
            )
        if hidden_grad is not None:
            add_product(hidden_grad[rows], student, head.weight[: work.columns], first=True)
        if weight_grad is not None:
            add_product(weight_grad[: work.columns], student.T, hidden[rows], first=start == 0)
        if bias_grad is not None:
            bias_grad[: work.columns] += student.sum(0)

    total = factors @ (nats * counts).sum(-1)
    gradients = zip((hidden_grad, weight_grad, bias_grad), (hidden, weight, bias), strict=True)
    return total, nats, measured, [None if g is None or x is None else g.to(x.dtype) for g, x in gradients]


def _count_by_data(counts: Tensor, work: _Work) -> None:
    for count, objective in zip(counts, work.objectives, strict=True):
        if objective.token_weight is not None:
            empty = counts.new_empty(len(work.labels), 0)
            count *= objective.token_weight(LogitBlock(empty, None, work.labels, None, work.data_weights))


def _blocks(
    student: Tensor,
    teacher: Tensor | None,
    rows: slice,
    work: _Work,
    nats: Tensor,
    counts: Tensor,
    measured: Tensor,
    gradient: bool,
) -> None:
    """The element-wise part of a chunk: fills in the values, what each position counts in them, and the measures; and
    puts the gradient in the place of the logits."""
    size = work.rows_of_block(student.itemsize, student.device.type == "cpu")
    for start in range(0, len(student), size):
        here = slice(start, start + size)
        there = slice(rows.start + start, min(rows.start + start + size, rows.stop))
        logits = student[here]
        slope = None
        if gradient and work.head.softcap is not None:
            slope = 1 - (logits / work.head.softcap).square()
        sparse = work.signal.at(there) if isinstance(work.signal, Sparse) else None
        of_data = None if work.data_weights is None else work.data_weights[there]
        block = LogitBlock(logits, None if teacher is None else teacher[here], work.labels[there], sparse, of_data)
        gradients = []
        for i, objective in enumerate(work.objectives):
            nats[i, there], g = objective.loss(block, **objective.arguments)
            if objective.token_weight is not None:
                counts[i, there] *= objective.token_weight(block)
            gradients.append((objective.weight * work.head.scale * counts[i, there], g))
        for i, measure in enumerate(work.measures):
            measured[i, there] = measure(block)
        if gradient:
            _weigh(logits, gradients, slope)


def _weigh(out: Tensor, gradients: list[tuple[Tensor, Tensor]], slope: Tensor | None) -> None:
    """``out = Σ weight of each row · gradient``, times the slope of the head's own transformation."""
    (first_weight, first), *rest = gradients
    torch.mul(first, first_weight.unsqueeze(-1), out=out)
    for weight, gradient in rest:
        out.addcmul_(gradient, weight.unsqueeze(-1))
    if slope is not None:
        out *= slope

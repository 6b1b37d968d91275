"""The fused head and loss: losses of a hidden state, with no ``[tokens, vocabulary]`` tensor ever held.

Rows are taken in chunks that a byte budget allows. For each chunk the student's and the teacher's logits are multiplied
out into two buffers that are used again; then each loss gives its value and its gradient, which takes the place of the
student's logits: by a kernel where one knows all of them, otherwise on tensors, in blocks small enough to stay in the
processor's cache. Two more products turn that into the gradients of the hidden state and of the head. So the whole
costs four matrix products, and backward only scales.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from stillroom.errors import MismatchError
from stillroom.kernels import MEASURES, Term
from stillroom.lm_head import LMHead, accumulator, add_product, logits_into
from stillroom.losses import metrics, sparse
from stillroom.losses.block import LogitBlock
from stillroom.losses.objective import Measure, Objective, by_data
from stillroom.signals import Signal, Sparse

CHUNK_BYTES = 256 * 2**20
"""The default budget for the two buffers of logits."""
BLOCK_BYTES = 2 * 2**20
"""The budget for one tensor of the element-wise part, on a CPU: it should stay in the cache between two operations."""


class Buffers:
    """Memory for logits, used again by one caller: on a CPU new memory costs time."""

    def __init__(self) -> None:
        self._flat: dict[tuple[int, torch.dtype], Tensor] = {}

    def take(self, number: int, rows: int, vocab_size: int, like: Tensor) -> list[Float[Tensor, "rows vocab_size"]]:
        """``number`` tensors with arbitrary contents, of the type and device of ``like``."""
        if like.device.type != "cpu":
            return [like.new_empty(rows, vocab_size) for _ in range(number)]
        buffers = []
        for i in range(number):
            flat = self._flat.get((i, like.dtype))
            if flat is None or len(flat) < rows * vocab_size:
                with torch.inference_mode(False):  # or later calls could not train
                    flat = self._flat[i, like.dtype] = torch.empty(rows * vocab_size, dtype=like.dtype)
            buffers.append(flat[: rows * vocab_size].view(rows, vocab_size))
        return buffers


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
        weights: the weight of each position in ``total``; no gradient flows to it.
        signal: the teacher's, for the same positions; None where no objective needs it.
        vocab_size: softmax and loss are taken over the first ``vocab_size`` logits of both heads; all by default.
        data_weights: the weights that the data give to each position, for objectives that use them.
        buffers: those of the calls before; new ones by default.
        chunk_bytes: budget for the buffers of logits; the result depends on it only by rounding.

    Raises:
        MismatchError: the arguments are of different positions or vocabularies, or the signal lacks what an objective
            or a measure needs.
        ConfigError: a loss does not accept its arguments.
    """
    work = _Work(
        head, tuple(objectives), tuple(measures), labels, weights, signal, head.checked_vocab_size(vocab_size),
        chunk_bytes, data_weights, buffers or Buffers(), torch.is_grad_enabled(),
    )  # fmt: skip
    _check(work, len(hidden))
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    apply: Any = _LinearLosses.apply
    if torch.compiler.is_compiling():  # the model around it may be compiled; this is one operation already
        apply = torch.compiler.disable(apply)
    return LinearLosses(*apply(hidden, head.weight, head.bias, work))


@dataclass
class _Work:
    """The inputs of the fused operation that have no gradient, and its outputs at each position."""

    head: LMHead
    objectives: tuple[Objective, ...]
    measures: tuple[Measure, ...]
    labels: Tensor
    weights: Tensor
    signal: Signal | None
    vocab_size: int
    chunk_bytes: int
    data_weights: Tensor | None
    buffers: Buffers
    differentiate: bool

    def start(self, n: int, dtype: torch.dtype, device: torch.device) -> None:
        """Makes room for the outputs, and chooses between a kernel and tensors."""
        m = len(self.objectives)
        self.nats = torch.empty(m, n, dtype=dtype, device=device)
        self.measured = torch.empty(len(self.measures), n, dtype=dtype, device=device)
        self.counts = self.weights.to(dtype).repeat(m, 1)
        """The weight of each position in each objective."""
        self.factors = torch.tensor([o.weight for o in self.objectives], dtype=dtype, device=device)
        self.kernel = None
        if self.head.softcap is None:
            self.kernel = kernel_for(self.objectives, self.measures, self.signal, dtype=dtype, device=device)
        if self.kernel is not None:
            block = LogitBlock(self.counts.new_empty(n, 0), None, self.labels, None, self.data_weights)
            for count, objective in zip(self.counts, self.objectives, strict=True):
                if objective.token_weight is not None:  # by_data, the only one that needs no logits
                    count *= objective.token_weight(block)

    def on_tensors(self, student: Tensor, teacher: Tensor | None, rows: slice, gradient: bool) -> None:
        """Fills in the outputs of a chunk. With ``gradient`` the student's logits become the gradient in the logits
        before scale and softcap."""
        block_bytes = BLOCK_BYTES if student.device.type == "cpu" else self.chunk_bytes
        size = max(1, block_bytes // (self.vocab_size * student.itemsize))
        for start in range(0, len(student), size):
            here = slice(start, start + size)
            there = slice(rows.start + start, min(rows.start + start + size, rows.stop))
            logits, softcap = student[here], self.head.softcap
            slope = 1 - (logits / softcap).square() if gradient and softcap is not None else None
            of_signal = self.signal.at(there) if isinstance(self.signal, Sparse) else None
            of_data = None if self.data_weights is None else self.data_weights[there]
            of_teacher = None if teacher is None else teacher[here]
            block = LogitBlock(logits, of_teacher, self.labels[there], of_signal, of_data)
            gradients = []
            for i, objective in enumerate(self.objectives):
                self.nats[i, there], g = objective.loss(block, **objective.arguments)
                if objective.token_weight is not None:
                    self.counts[i, there] *= objective.token_weight(block)
                gradients.append((objective.weight * self.head.scale * self.counts[i, there], g))
            for i, measure in enumerate(self.measures):
                self.measured[i, there] = measure(block)
            if gradient:
                _weighted_sum(logits, gradients, slope)


def _weighted_sum(out: Tensor, gradients: list[tuple[Tensor, Tensor]], slope: Tensor | None) -> None:
    """``out = Σ weight of each row · gradient``, times the slope of the softcap; 0 where there are no gradients."""
    if not gradients:
        out.zero_()
    for i, (weight, gradient) in enumerate(gradients):
        if i == 0:
            torch.mul(gradient, weight.unsqueeze(-1), out=out)
        else:
            out.addcmul_(gradient, weight.unsqueeze(-1))
    if slope is not None:
        out *= slope


def _check(work: _Work, n: int) -> None:
    """Raises MismatchError where labels, weights and signal are of other positions or another vocabulary."""
    signal, vocab_size = work.signal, work.vocab_size
    known = None if signal is None else signal.vocab_size
    if isinstance(signal, Sparse):
        if known not in (None, vocab_size):
            raise MismatchError(
                "the stored signal was taken over other columns",
                {"stored": f"{known} columns", "compared now": f"{vocab_size} columns"},
                why="Its probabilities sum to 1 over its own columns only.",
                fix=f"Compare {known} columns.",
            )
    elif signal is not None and (known is None or known < vocab_size):
        raise MismatchError(
            f"{vocab_size} columns cannot be taken from the teacher",
            {"asked for": f"{vocab_size} columns", "the teacher has": f"{known} columns"},
            why="The others would be whatever lies in memory.",
            fix="Compare at most the columns that both have.",
        )
    lengths = {"next_tokens": len(work.labels), "weights": len(work.weights)}
    for name, number in (lengths if signal is None else {**lengths, "signal": len(signal)}).items():
        if number != n:
            raise MismatchError(
                f"`{name}` and `hidden` speak of different positions",
                {name: f"{number} positions", "hidden": f"{n} positions"},
                why="Each position's loss would be taken with the target of another.",
                fix="Take both at the same positions; `Signal.at(batch.kept)` does so for a signal.",
            )


class _LinearLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None, work: _Work):
        """Takes all chunks, one after another, and saves the gradients that are needed for backward."""
        dtype, n, device = accumulator(hidden.dtype), len(hidden), hidden.device
        needed = [need and work.differentiate for need in ctx.needs_input_grad[:3]]
        hidden_grad = torch.empty(hidden.shape, dtype=dtype, device=device) if needed[0] else None
        weight_grad = torch.empty(weight.shape, dtype=dtype, device=device) if needed[1] else None
        bias_grad = torch.zeros(len(weight), dtype=dtype, device=device) if needed[2] else None
        if weight_grad is not None:
            weight_grad[work.vocab_size if n else 0 :] = 0
        dense = None if isinstance(work.signal, Sparse) else work.signal
        num_buffers = 1 if dense is None else 2
        size = max(1, work.chunk_bytes // (work.vocab_size * dtype.itemsize * num_buffers))
        if not (work.objectives or work.measures):  # no logits are needed
            size, n, hidden_grad, weight_grad, bias_grad = 1, 0, None, None, None
        with torch.autocast(device.type, enabled=False):
            work.start(len(hidden), dtype, device)
            head = LMHead(weight.to(hidden.dtype), bias, work.head.scale, work.head.softcap)
            buffers = work.buffers.take(num_buffers, min(size, n), work.vocab_size, work.nats)
            for start in range(0, n, size):
                rows = slice(start, min(start + size, n))
                student, *others = (buffer[: rows.stop - start] for buffer in buffers)
                teacher = others[0] if others else None
                logits_into(student, hidden[rows], head)
                if dense is not None:
                    dense.logits_into(others[0], rows)
                if work.kernel is None:
                    work.on_tensors(student, teacher, rows, any(needed))
                else:
                    work.nats[:, rows], work.measured[:, rows] = work.kernel(
                        student,
                        teacher,
                        work.labels[rows],
                        work.signal.at(rows) if isinstance(work.signal, Sparse) else None,
                        work.factors.unsqueeze(-1) * work.head.scale * work.counts[:, rows],
                        gradient=any(needed),
                    )
                if hidden_grad is not None:
                    add_product(hidden_grad[rows], student, head.weight[: work.vocab_size], first=True)
                if weight_grad is not None:
                    add_product(weight_grad[: work.vocab_size], student.T, hidden[rows], first=start == 0)
                if bias_grad is not None:
                    bias_grad[: work.vocab_size] += student.sum(0)
            total = work.factors @ (work.nats * work.counts).sum(-1)
        grads = zip((hidden_grad, weight_grad, bias_grad), (hidden, weight, bias), strict=True)
        ctx.save_for_backward(*(None if g is None or x is None else g.to(x.dtype) for g, x in grads))
        ctx.mark_non_differentiable(work.nats, work.measured)
        return total, work.nats, work.measured

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor, *_):  # pyright: ignore[reportIncompatibleMethodOverride]
        if upstream.device.type == "cpu" and upstream == 1:  # as it is of a loss that is minimized: nothing is copied
            return (*ctx.saved_tensors, None)
        return (*(None if g is None else g * upstream.to(g.dtype) for g in ctx.saved_tensors), None)


@dataclass(frozen=True)
class Kernel:
    """Objectives and measures that the kernels of a device compute together."""

    terms: tuple[Term, ...]
    measures: tuple[Measure, ...]
    missing: sparse.Missing
    """The setting of forward KL, for a sparse signal."""

    def __call__(
        self,
        student: Float[Tensor, "r v"],
        teacher: Float[Tensor, "r v"] | None,
        labels: Int[Tensor, " r"],
        signal: Sparse | None,
        weights: Float[Tensor, "m r"],
        *,
        gradient: bool,
    ) -> tuple[Float[Tensor, "m r"], Float[Tensor, "measures r"]]:
        """Values of objectives and measures; with ``gradient`` the student's logits become ``Σ weights · gradient``.

        Raises:
            MismatchError: an id of the signal is not in the student's vocabulary.
        """
        places = [MEASURES.index(measure.__name__) for measure in self.measures]
        if student.is_cuda:
            from stillroom.kernels import triton_fused

            nats, measured = triton_fused.fused(student, teacher, labels, self.terms, weights, gradient=gradient)
            return nats, measured[places]
        from stillroom.kernels import numba_fused

        block = LogitBlock(student.new_zeros(len(student), 1), None, labels, signal)  # for all that needs no logits
        entries = None
        if signal is not None:
            (temperature,) = (t.temperature for t in self.terms if t.name == "forward_kl")
            if signal.sampled or self.missing != "bucket":
                ids, targets, entropy = sparse.targets(block, signal, temperature, self.missing)
                entries = numba_fused.Entries(ids, targets, None, entropy)
            else:
                targets, residual = (x.float().exp() for x in signal.log_targets(temperature))
                entries = numba_fused.Entries(signal.ids, targets, residual, None)
            _check_ids(entries.ids, student.shape[1])
        nats, measured = numba_fused.fused(
            student, teacher, labels, self.terms, weights, gradient=gradient, measures=places, entries=entries
        )
        measured = measured[places]
        for i, measure in enumerate(self.measures):
            if signal is not None and measure in (metrics.teacher_entropy, metrics.teacher_cross_entropy):
                measured[i] = measure(block)  # a sparse signal contains it
        return nats, measured


def _check_ids(ids: Int[Tensor, "r k"], vocab_size: int) -> None:
    """Raises MismatchError where an id is not in the vocabulary: kernels would read and write beside the logits."""
    lowest, highest = (int(x) for x in ids.aminmax()) if ids.numel() else (0, 0)
    if lowest < 0 or highest >= vocab_size:
        raise MismatchError(
            "the teacher's entries are not in the student's vocabulary",
            {"ids": f"{lowest} to {highest}", "columns": f"0 to {vocab_size - 1}"},
            why="Their logits do not exist. With missing=label, a next token counts as an entry too.",
            fix="Compare the columns that the signal was taken over, and keep only positions whose next token is one.",
        )


def kernel_for(
    objectives: Sequence[Objective],
    measures: Sequence[Measure],
    signal: Signal | None,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> Kernel | None:
    """The kernel for objectives and measures of a signal; None where these must be computed on tensors.

    Raises:
        ConfigError: a loss does not accept its arguments.
    """
    if dtype != torch.float32 or any(o.token_weight not in (None, by_data) for o in objectives):
        return None
    terms = tuple(o.term for o in objectives if o.term is not None and o.term.name in _losses_on(device.type))
    known_measures = {getattr(metrics, name) for name in MEASURES}
    if not terms or len(terms) < len(objectives) or not known_measures.issuperset(measures):
        return None
    missing: Any = next((o.arguments["missing"] for o in objectives if "missing" in o.arguments), "bucket")
    names = [t.name for t in terms]
    if signal is None and (set(names) != {"cross_entropy"} or set(measures) - {metrics.student_entropy}):
        return None
    if isinstance(signal, Sparse):
        if device.type != "cpu" or names.count("forward_kl") != 1 or set(names) - {"forward_kl", "cross_entropy"}:
            return None
        at_one = terms[names.index("forward_kl")].temperature == 1
        has_bucket = not signal.sampled and missing == "bucket" and at_one
        if metrics.accepted_mass in measures and not has_bucket:
            return None
    return Kernel(terms, tuple(measures), missing)


@cache
def _losses_on(device: str) -> frozenset[str]:
    """The losses that the kernels of a type of device compute."""
    if device == "cpu":
        from stillroom.kernels.numba_fused import KINDS

        return frozenset(KINDS)
    if device == "cuda" and find_spec("triton"):
        from stillroom.kernels.triton_fused import KINDS

        return frozenset(KINDS)
    return frozenset()

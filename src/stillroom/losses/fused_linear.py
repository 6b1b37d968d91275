"""The fused head and loss: losses of a hidden state, with no ``[tokens, vocabulary]`` tensor ever held.

Rows are taken in chunks that a byte budget allows. For each chunk the student's and the teacher's logits are multiplied
out into two buffers that are used again; then each loss gives its value and its gradient, which takes the place of the
student's logits: by a kernel where one knows all of them, otherwise on tensors, in blocks small enough to stay in the
processor's cache. Two more products turn that into the gradients of the hidden state and of the head. So the whole
costs four matrix products, and backward only scales.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from stillroom.config import LOGITS_BYTES
from stillroom.errors import MismatchError
from stillroom.kernels import MEASURES, Term
from stillroom.lm_head import LMHead, accumulator, add_product, check_columns, logits_into
from stillroom.losses import logits
from stillroom.losses.block import LogitBlock
from stillroom.losses.objective import Measure, Objective, by_data
from stillroom.signals import Signal, Sparse

BLOCK_BYTES = 2 * 2**20
"""The budget for one tensor of the element-wise part, on a CPU: it should stay in the cache between two operations."""


class Buffers:
    """Memory for logits, used again by one caller: on a CPU new memory costs time."""

    def __init__(self) -> None:
        self._flat = torch.empty(0)

    def take(self, number: int, rows: int, vocab_size: int, like: Tensor) -> Float[Tensor, "number rows vocab_size"]:
        """Tensors with arbitrary contents, of the type and device of ``like``."""
        size = number * rows * vocab_size
        if like.device.type != "cpu":
            return like.new_empty(number, rows, vocab_size)
        if len(self._flat) < size or self._flat.dtype != like.dtype:
            with torch.inference_mode(False):  # or later calls could not train
                self._flat = torch.empty(size, dtype=like.dtype)
        return self._flat[:size].view(number, rows, vocab_size)


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
    chunk_bytes: int = LOGITS_BYTES,
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
        head, objectives, measures, labels, weights, signal, head.vocab_size if vocab_size is None else vocab_size,
        chunk_bytes, data_weights, buffers or Buffers(), torch.is_grad_enabled(),
    )  # fmt: skip
    work.check(len(hidden))
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
    objectives: Sequence[Objective]
    measures: Sequence[Measure]
    labels: Tensor
    weights: Tensor
    signal: Signal | None
    vocab_size: int
    chunk_bytes: int
    data_weights: Tensor | None
    buffers: Buffers
    differentiate: bool

    def check(self, n: int) -> None:
        """Raises MismatchError where labels, weights and signal are of other positions or another vocabulary."""
        signal, vocab_size = self.signal, self.vocab_size
        check_columns(vocab_size, self.head.vocab_size, "head")
        if signal is not None and not isinstance(signal, Sparse):
            check_columns(vocab_size, signal.vocab_size, "teacher")
        elif signal is not None and signal.vocab_size not in (None, vocab_size):
            raise MismatchError(
                "the stored signal was taken over other columns",
                {"stored": f"{signal.vocab_size} columns", "compared now": f"{vocab_size} columns"},
                why="Its probabilities sum to 1 over its own columns only.",
                fix=f"Compare {signal.vocab_size} columns.",
            )
        of_data = ("data_weights", self.data_weights)
        for name, given in (("labels", self.labels), ("weights", self.weights), ("signal", signal), of_data):
            if given is not None and len(given) != n:
                raise MismatchError(
                    f"`{name}` and `hidden` speak of different positions",
                    {name: f"{len(given)} positions", "hidden": f"{n} positions"},
                    why="Each position's loss would be taken with the target of another.",
                    fix="Take both at the same positions; `Signal.at(batch.kept)` does so for a signal.",
                )

    def start(self, n: int, dtype: torch.dtype, device: torch.device) -> None:
        """Makes room for the outputs, and chooses between a kernel and tensors."""
        m = len(self.objectives)
        self.nats = torch.empty(m, n, dtype=dtype, device=device)
        self.measured = torch.empty(len(self.measures), n, dtype=dtype, device=device)
        self.counts = self.weights.to(dtype).repeat(m, 1)
        """The weight of each position in each objective."""
        self.factors = torch.tensor([o.weight for o in self.objectives], dtype=dtype, device=device)
        self.terms = None
        if self.head.softcap is None:
            self.terms = kernel_terms(self.objectives, self.measures, self.signal, dtype=dtype, device=device)
        if self.terms is not None:
            block = LogitBlock(self.counts.new_empty(n, 0), None, self.labels, None, self.data_weights)
            for count, objective in zip(self.counts, self.objectives, strict=True):
                if objective.token_weight is not None:  # by_data, the only one that needs no logits
                    count *= objective.token_weight(block)

    def by_kernel(self, student: Tensor, teacher: Tensor | None, rows: slice, gradient: bool) -> None:
        """Fills in the outputs of a chunk. With ``gradient`` the student's logits become the gradient in the logits
        before the head's scale."""
        assert self.terms is not None
        labels, places = self.labels[rows], [MEASURES.index(measure.__name__) for measure in self.measures]
        weights = self.factors.unsqueeze(-1) * self.head.scale * self.counts[:, rows]
        if student.is_cuda:
            from stillroom.kernels import triton_fused

            nats, measured = triton_fused.fused(student, teacher, labels, self.terms, weights, gradient=gradient)
            self.nats[:, rows], self.measured[:, rows] = nats, measured[places]
            return
        from stillroom.kernels import numba_fused

        block = entries = None
        if isinstance(self.signal, Sparse):
            block = LogitBlock(student.new_zeros(len(student), 1), None, labels, self.signal.at(rows))
            entries = self.entries(block)
        nats, measured = numba_fused.fused(
            student, teacher, labels, self.terms, weights, gradient=gradient, measures=places, entries=entries
        )
        self.nats[:, rows], self.measured[:, rows] = nats, measured[places]
        for i, measure in enumerate(self.measures):
            if block is not None and measure in (logits.teacher_entropy, logits.teacher_cross_entropy):
                self.measured[i, rows] = measure(block)  # a sparse signal contains it

    def entries(self, block: LogitBlock) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """The ``Entries`` of a sparse signal for its one forward KL.

        Raises:
            MismatchError: an id is not in the vocabulary: kernels would read and write beside the logits.
        """
        assert block.sparse is not None
        (arguments,) = (o.arguments for o in self.objectives if o.term is not None and o.term.name == "forward_kl")
        temperature, missing = arguments.get("temperature", 1.0), arguments.get("missing", "bucket")
        ids, residual, entropy = block.sparse.ids, None, None
        if block.sparse.sampled or missing != "bucket":
            ids, targets, entropy = block.targets(temperature, missing)
        else:
            targets, residual = (x.float().exp() for x in block.sparse.log_targets(temperature))
        lowest, highest = (int(x) for x in ids.aminmax()) if ids.numel() else (0, 0)
        if lowest < 0 or highest >= self.vocab_size:
            raise MismatchError(
                "the teacher's entries are not in the student's vocabulary",
                {"ids": f"{lowest} to {highest}", "columns": f"0 to {self.vocab_size - 1}"},
                why="Their logits do not exist. With missing=label, a next token counts as an entry too.",
                fix="Compare the columns of the signal, and keep only positions whose next token is one of them.",
            )
        return ids, targets, residual, entropy

    def on_tensors(self, student: Tensor, teacher: Tensor | None, rows: slice, gradient: bool) -> None:
        """The same, whatever the losses, and before the softcap too."""
        block_bytes = BLOCK_BYTES if student.device.type == "cpu" else self.chunk_bytes
        size = max(1, block_bytes // (self.vocab_size * student.itemsize))
        for start in range(0, len(student), size):
            here = slice(start, start + size)
            there = slice(rows.start + start, min(rows.start + start + size, rows.stop))
            student_logits, softcap = student[here], self.head.softcap
            slope = 1 - (student_logits / softcap).square() if gradient and softcap is not None else None
            of_signal = self.signal.at(there) if isinstance(self.signal, Sparse) else None
            of_data = None if self.data_weights is None else self.data_weights[there]
            of_teacher = None if teacher is None else teacher[here]
            block = LogitBlock(student_logits, of_teacher, self.labels[there], of_signal, of_data)
            gradients = []
            for i, objective in enumerate(self.objectives):
                self.nats[i, there], g = objective.loss(block, **objective.arguments)
                if objective.token_weight is not None:
                    self.counts[i, there] *= objective.token_weight(block)
                gradients.append((g, (objective.weight * self.head.scale * self.counts[i, there]).unsqueeze(-1)))
            for i, measure in enumerate(self.measures):
                self.measured[i, there] = measure(block)
            if gradient:
                if gradients:
                    torch.mul(*gradients[0], out=student_logits)
                else:
                    student_logits.zero_()
                for g, weight in gradients[1:]:
                    student_logits.addcmul_(g, weight)
                if slope is not None:
                    student_logits *= slope


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
                student, *others = buffers[:, : rows.stop - start]
                teacher = others[0] if others else None
                logits_into(student, hidden[rows], head)
                if dense is not None:
                    dense.logits_into(others[0], rows)
                (work.on_tensors if work.terms is None else work.by_kernel)(student, teacher, rows, any(needed))
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


def kernel_terms(
    objectives: Sequence[Objective],
    measures: Sequence[Measure],
    signal: Signal | None,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Term, ...] | None:
    """The objectives for the device's kernel; None where they and the measures must be computed on tensors.

    Raises:
        ConfigError: a loss does not accept its arguments.
    """
    if dtype != torch.float32 or any(o.token_weight not in (None, by_data) for o in objectives):
        return None
    if device.type == "cpu":
        from stillroom.kernels.numba_fused import KINDS
    elif device.type == "cuda" and find_spec("triton"):
        from stillroom.kernels.triton_fused import KINDS
    else:
        return None
    terms = tuple(o.term for o in objectives if o.term is not None and o.term.name in KINDS)
    known_measures = {getattr(logits, name) for name in MEASURES}
    if not terms or len(terms) < len(objectives) or not known_measures.issuperset(measures):
        return None
    names = [t.name for t in terms]
    if signal is None and (set(names) != {"cross_entropy"} or set(measures) - {logits.student_entropy}):
        return None
    if isinstance(signal, Sparse):
        if device.type != "cpu" or names.count("forward_kl") != 1 or set(names) - {"forward_kl", "cross_entropy"}:
            return None
        forward_kl = objectives[names.index("forward_kl")].arguments
        has_bucket = not signal.sampled and forward_kl.get("missing", "bucket") == "bucket"
        at_one = forward_kl.get("temperature", 1.0) == 1
        if logits.accepted_mass in measures and not (has_bucket and at_one):
            return None
    return terms

"""Fused: whether kernels can do the element-wise part of some losses, and having them do it."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stillroom.errors import MismatchError
from stillroom.kernels.terms import MEASURES, Term
from stillroom.losses import metrics, sparse
from stillroom.losses.block import LogitBlock, Loss
from stillroom.losses.divergences import (
    adaptive_kl,
    alpha_beta,
    forward_kl,
    jensen_shannon,
    reverse_kl,
    skew_kl,
    skew_reverse_kl,
    total_variation,
)
from stillroom.losses.logits import cross_entropy, logit_mse
from stillroom.losses.objective import Measure, Objective, by_data
from stillroom.signals import Signal, Sparse

KNOWN: dict[str, tuple[Loss, tuple[str, ...]]] = {
    "forward_kl": (forward_kl, ()),
    "reverse_kl": (reverse_kl, ()),
    "jensen_shannon": (jensen_shannon, ("beta",)),
    "skew_kl": (skew_kl, ("alpha",)),
    "skew_reverse_kl": (skew_reverse_kl, ("alpha",)),
    "adaptive_kl": (adaptive_kl, ("mu",)),
    "alpha_beta": (alpha_beta, ("alpha", "beta")),
    "total_variation": (total_variation, ()),
    "cross_entropy": (cross_entropy, ("smoothing",)),
    "logit_mse": (logit_mse, ()),
}
"""The losses that kernels know, and which of their arguments are the numbers of a term."""
STUDENT_ENTROPY, TEACHER_ENTROPY, _, ACCEPTED_MASS, TEACHER_CROSS_ENTROPY = range(len(MEASURES))
"""Where these measures stand in MEASURES."""


@dataclass(frozen=True)
class Fused:
    """Losses and measures that kernels can do on a device."""

    terms: tuple[Term, ...]
    measures: tuple[Measure, ...]
    rows: tuple[int, ...]
    """Where the measures stand in ``terms.MEASURES``."""
    missing: sparse.Missing
    """Of the forward KL, where the signal is sparse."""

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
        """Values of losses and measures; with ``gradient`` the student's logits become the weighted sum of the losses'
        gradients by them."""
        if student.is_cuda:
            from stillroom.kernels import triton_fused

            nats, measured = triton_fused.fused(student, teacher, labels, self.terms, weights, gradient=gradient)
            return nats, measured[list(self.rows)]
        from stillroom.kernels import numba_fused

        block = LogitBlock(student.new_zeros(len(student), 1), None, labels, signal)  # for what no column is needed
        entries = None if signal is None else self._entries(block, signal)
        if entries is not None:
            _check_ids(entries.ids, student.shape[1])
        nats, measured = numba_fused.fused(
            student, teacher, labels, self.terms, weights, gradient=gradient, measures=self.rows, entries=entries
        )
        measured = measured[list(self.rows)]
        for i, row in enumerate(self.rows):
            if signal is not None and row in (TEACHER_ENTROPY, TEACHER_CROSS_ENTROPY):  # which it tells by itself
                measured[i] = self.measures[i](block)
        return nats, measured

    def _entries(self, block: LogitBlock, signal: Sparse) -> Any:
        from stillroom.kernels.numba_fused import Entries

        (temperature,) = (t.temperature for t in self.terms if t.name == "forward_kl")
        if not signal.sampled and self.missing == "bucket":
            log_targets, log_rest = signal.log_targets(temperature)
            return Entries(signal.ids, log_targets.float().exp(), log_rest.float().exp(), None)
        ids, targets, entropy = sparse.targets(block, signal, temperature, self.missing)
        return Entries(ids, targets, None, entropy)


def _check_ids(ids: Int[Tensor, "r k"], columns: int) -> None:
    """Raises MismatchError where an id is none of the columns: kernels would read and write beside them."""
    lowest, highest = (int(x) for x in ids.aminmax()) if ids.numel() else (0, 0)
    if lowest < 0 or highest >= columns:
        raise MismatchError(
            "the teacher's entries are not in the student's vocabulary",
            {"ids": f"{lowest} to {highest}", "columns": f"0 to {columns - 1}"},
            why="Their logits do not exist. With missing=label, a next token counts as an entry too.",
            fix="Compare the columns that the signal was taken over, and keep only positions whose next token is one.",
        )


def fused_for(
    objectives: Sequence[Objective],
    measures: Sequence[Measure],
    signal: Signal | None,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> Fused | None:
    """The kernels for losses and measures of a signal; None where these must be taken on tensors.

    Raises:
        ConfigError: a loss does not accept its arguments.
    """
    if dtype != torch.float32 or any(o.token_weight not in (None, by_data) for o in objectives):
        return None
    terms, rows = [_term(o.loss, o.arguments) for o in objectives], _rows_of(measures)
    known = _known(device.type)
    if not terms or rows is None or any(t is None or t.name not in known for t in terms):
        return None
    missing: Any = next((o.arguments["missing"] for o in objectives if "missing" in o.arguments), "bucket")
    fused = Fused(tuple(t for t in terms if t is not None), tuple(measures), tuple(rows), missing)
    return fused if _fits(fused, signal, device) else None


def _fits(fused: Fused, signal: Signal | None, device: torch.device) -> bool:
    """Whether the signal has all that the kernels need."""
    names = [t.name for t in fused.terms]
    if signal is None:
        return set(names) == {"cross_entropy"} and set(fused.rows) <= {STUDENT_ENTROPY}
    if not isinstance(signal, Sparse):
        return True
    if device.type != "cpu" or names.count("forward_kl") != 1 or set(names) - {"forward_kl", "cross_entropy"}:
        return False
    sees_bucket = not signal.sampled and fused.missing == "bucket"
    at_one = all(t.temperature == 1 for t in fused.terms if t.name == "forward_kl")
    return ACCEPTED_MASS not in fused.rows or (sees_bucket and at_one)


@cache
def _known(device: str) -> frozenset[str]:
    """The losses that the kernels of a device know."""
    if device == "cpu":
        from stillroom.kernels import numba_fused

        return frozenset(numba_fused.KINDS)
    if device == "cuda" and find_spec("triton"):
        from stillroom.kernels import triton_fused

        return frozenset(triton_fused.KINDS)
    return frozenset()


def _term(loss: Loss, arguments: dict[str, Any]) -> Term | None:
    """The term of a loss with its arguments; None where kernels do not know it.

    Raises:
        ConfigError: the loss does not accept its arguments.
    """
    name = next((name for name, (known, _) in KNOWN.items() if known is loss), None)
    if name is None:
        return None
    column = torch.zeros(1, 1)
    loss(LogitBlock(column, column.clone(), torch.zeros(1, dtype=torch.long)), **arguments)  # which checks them
    defaults = {name: p.default for name, p in inspect.signature(loss).parameters.items()}
    values = defaults | arguments
    return Term(name, values.get("temperature", 1.0), *(values[number] for number in KNOWN[name][1]))


def _rows_of(wanted: Sequence[Measure]) -> list[int] | None:
    """Where the measures stand in MEASURES; None where one of them is another function."""
    known = [getattr(metrics, name) for name in MEASURES]
    return [known.index(measure) for measure in wanted] if all(m in known for m in wanted) else None

"""The first step's states: what projectors are fitted to, and in which units channels are compared."""

from collections.abc import Iterable

import torch
from torch import Tensor

from stillroom import states
from stillroom.batch import Batch
from stillroom.distill.hidden import HiddenTerm, compared
from stillroom.distill.processes import ALONE, Processes
from stillroom.distill.sharding import let_go
from stillroom.distill.step import StudentStep
from stillroom.distill.teacher import Teacher
from stillroom.losses.hidden import channel_scale
from stillroom.signals import Hidden, Told
from stillroom.weights.parts import fill, own_rows

RIDGE = 1e-4
"""What is added to the diagonal of the fit, as a share of its mean: so that it is well conditioned, whatever the
states."""


@torch.no_grad()
def fit_to_first_step(
    module: StudentStep,
    teacher: Teacher,
    micros: Iterable[tuple[Batch, Told | None]],
    processes: Processes = ALONE,
    *,
    device: torch.device | None = None,
) -> None:
    """Sets what the hidden-state objectives measure on the first step, of its micro-batches together.

    Args:
        micros: this process's part of the step.
        processes: those that have the others.
        device: where the student works; None is where its parameters are.
    """
    waiting = [
        _Fit(term) for term in module.hidden.values() if isinstance(term, HiddenTerm) and term.spec.measures_first
    ]
    device = device or next(module.parameters()).device
    was_training = module.training
    module.eval()
    for micro, read in micros:
        batch = micro.to(device)
        _, student = module.within(
            lambda batch=batch: states.hidden_and_inner(module.model, batch, module.layers, module.attention)
        )
        told = teacher.tell(batch, read)
        assert told.hidden is not None  # the objectives need it
        for fit in waiting:
            fit.see(student, told.hidden)
    module.train(was_training)
    let_go(module)
    for fit in waiting:
        fit.finish(processes)


class _Fit:
    """Sums over the positions of a step: of products of states, and of squares."""

    def __init__(self, term: HiddenTerm) -> None:
        self.term = term
        inner, outer = term.spec.widths
        count = len(term.projectors) if term.spec.start == "least_squares" else 0
        self.own = [torch.zeros(inner, inner, dtype=torch.float64) for _ in range(count)]
        self.shared = [torch.zeros(inner, outer, dtype=torch.float64) for _ in range(count)]
        self.squares = torch.zeros(len(term.spec.pairs), outer, dtype=torch.float64)
        self.num_positions = 0

    def see(self, student: Hidden, teacher: Hidden) -> None:
        spec = self.term.spec
        for number, (s, t) in enumerate(spec.pairs):
            theirs = teacher.states[t].double().cpu()
            if self.own:
                ours, place = student.states[s].double().cpu(), 0 if spec.shared else number
                self.own[place] += ours.T @ ours
                self.shared[place] += ours.T @ theirs
            self.squares[number] += compared(theirs, spec).square().sum(0)
        self.num_positions += len(teacher.states[spec.pairs[0][1]])

    def finish(self, processes: Processes) -> None:
        for total in (*self.own, *self.shared, self.squares):
            processes.add(total)
        self.num_positions = int(processes.add(torch.tensor(self.num_positions)))
        for projector, own, shared in zip(self.term.projectors, self.own, self.shared, strict=False):
            fill(projector, _ridge(own, shared).T[own_rows(projector)])
        if self.term.spec.distance == "channel_scaled_mse":
            self.term.scales.copy_(torch.stack([channel_scale(row, self.num_positions) for row in self.squares]))  # pyright: ignore


def _ridge(own: Tensor, shared: Tensor) -> Tensor:
    """``(XᵀX + λ·mean diagonal·1)⁻¹ XᵀY``, the matrix by which X comes nearest to Y."""
    diagonal = own.diagonal().mean().clamp_min(torch.finfo(own.dtype).tiny)
    regular = own + RIDGE * diagonal * torch.eye(len(own), dtype=own.dtype)
    return torch.cholesky_solve(shared, torch.linalg.cholesky(regular))

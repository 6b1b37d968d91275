"""Hidden objectives that measure first: projectors by ridge least squares and channel scales, from the first step."""

from collections.abc import Iterable

import torch
from torch import Tensor

from stillroom.batch import Batch
from stillroom.distributed.group import SINGLE_RANK, RankGroup
from stillroom.distributed.sharding import let_go
from stillroom.losses.hidden import channel_scale
from stillroom.models import hidden_states
from stillroom.models.dtensor import fill_local, own_rows
from stillroom.signals import HiddenStates, TeacherOutput
from stillroom.teachers.base import Teacher
from stillroom.training.hidden_objective import HiddenLoss, compared
from stillroom.training.step import StudentStep

RIDGE = 1e-4
"""What is added to the diagonal of the fit, as a share of its mean: so that it is well conditioned, whatever the
states."""


@torch.no_grad()
def fit_to_first_step(
    module: StudentStep,
    teacher: Teacher,
    micro_batches: Iterable[tuple[Batch, TeacherOutput | None]],
    ranks: RankGroup = SINGLE_RANK,
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
        _Fit(term) for term in module.hidden.values() if isinstance(term, HiddenLoss) and term.spec.measures_first
    ]
    device = device or next(module.parameters()).device
    was_training = module.training
    module.eval()
    for micro_batch, read in micro_batches:
        batch = micro_batch.to(device)
        _, student = module.within(
            lambda batch=batch: hidden_states.all_hidden_states(module.model, batch, module.layers, module.attention)
        )
        told = teacher.forward(batch, read)
        assert told.hidden is not None  # the objectives need it
        for fit in waiting:
            fit.see(student, told.hidden)
    module.train(was_training)
    let_go(module)
    for fit in waiting:
        fit.finish(ranks)


class _Fit:
    """Sums over the positions of a step: of products of states, and of squares."""

    def __init__(self, term: HiddenLoss) -> None:
        self.term = term
        inner, outer = term.spec.widths
        count = len(term.projectors) if term.spec.start == "least_squares" else 0
        self.own = [torch.zeros(inner, inner, dtype=torch.float64) for _ in range(count)]
        self.shared = [torch.zeros(inner, outer, dtype=torch.float64) for _ in range(count)]
        self.squares = torch.zeros(len(term.spec.pairs), outer, dtype=torch.float64)
        self.num_positions = 0

    def see(self, student: HiddenStates, teacher: HiddenStates) -> None:
        spec = self.term.spec
        for number, (s, t) in enumerate(spec.pairs):
            theirs = teacher.states[t].double().cpu()
            if self.own:
                ours, place = student.states[s].double().cpu(), 0 if spec.shared else number
                self.own[place] += ours.T @ ours
                self.shared[place] += ours.T @ theirs
            self.squares[number] += compared(theirs, spec).square().sum(0)
        self.num_positions += len(teacher.states[spec.pairs[0][1]])

    def finish(self, ranks: RankGroup) -> None:
        for total in (*self.own, *self.shared, self.squares):
            ranks.all_reduce_(total)
        self.num_positions = int(ranks.all_reduce_(torch.tensor(self.num_positions)))
        for projector, own, shared in zip(self.term.projectors, self.own, self.shared, strict=False):
            fill_local(projector, _ridge(own, shared).T[own_rows(projector)])
        if self.term.spec.distance == "channel_scaled_mse":
            self.term.scales.copy_(torch.stack([channel_scale(row, self.num_positions) for row in self.squares]))  # pyright: ignore


def _ridge(own: Tensor, shared: Tensor) -> Tensor:
    """``(XᵀX + λ·mean diagonal·1)⁻¹ XᵀY``, the matrix by which X comes nearest to Y."""
    diagonal = own.diagonal().mean().clamp_min(torch.finfo(own.dtype).tiny)
    regular = own + RIDGE * diagonal * torch.eye(len(own), dtype=own.dtype)
    return torch.cholesky_solve(shared, torch.linalg.cholesky(regular))

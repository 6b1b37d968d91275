"""Objectives over hidden states: the projectors and the weighted distance of the layers that are compared, and what of
them is fitted to the first step: projectors by ridge least squares, and channel scales."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import linear

from stillroom.batch import Batch
from stillroom.distributed.group import SINGLE_RANK, RankGroup
from stillroom.distributed.sharding import reshard
from stillroom.layers import Layer, in_order
from stillroom.lm_head import accumulator
from stillroom.losses.config import DISTANCES, Normalize
from stillroom.losses.hidden import Pair, channel_scale, normalized
from stillroom.models import hidden_states
from stillroom.models.safetensors_io import fill_local, own_rows
from stillroom.signals import HiddenStates, TeacherOutput

ATTENTION = "attention_relation"

RIDGE = 1e-4
"""The share of the diagonal's mean that is added to the diagonal of a fit, so that it is well conditioned, whatever the
states."""


@dataclass(frozen=True)
class HiddenSpec:
    """The layers that a hidden-state objective compares, and how."""

    name: str
    distance: str
    """Its name in DISTANCES."""
    pairs: tuple[tuple[Layer, Layer], ...]
    """(student's layer, teacher's layer)"""
    widths: tuple[int, int]
    """The widths of the student's and of the teacher's states."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """The distance's keyword arguments."""
    start: str | None = None
    """The start of projectors: orthogonal, identity, least_squares; with None there are none."""
    shared: bool = False
    normalise: Normalize | None = None
    pair_weights: tuple[float, ...] | None = None
    """None is the mean over the pairs."""
    by_data: bool = False
    """Whether positions have the weights of the data."""
    places: tuple[int, ...] | None = None
    """The teacher's channel that each of the student's starts as, with identity; None takes the first ones."""

    @property
    def of_attention(self) -> bool:
        """Whether queries, keys and values are compared, and not states."""
        return self.distance == ATTENTION

    @property
    def measures_first(self) -> bool:
        """Whether it is fitted to the first step's states before it starts."""
        return self.start == "least_squares" or self.distance == "channel_scaled_mse"


class HiddenLoss(nn.Module):
    """``forward(student, teacher, documents, weights) -> (Σ weight · distance with gradient, Σ distance)``.

    Its parameters, the projectors, are trained and saved with the student step, and belong to no exported model.

    Args:
        seed: seeds projectors that start at random.
    """

    def __init__(self, spec: HiddenSpec, *, seed: int = 0) -> None:
        super().__init__()
        self.spec = spec
        count = 0 if spec.start is None else 1 if spec.shared else len(spec.pairs)
        generator = torch.Generator().manual_seed(seed)
        self.projectors = nn.ParameterList()
        for _ in range(count):  # [teacher's width, student's width]; what is fitted later starts from the identity
            matrix = torch.zeros(spec.widths[::-1])
            if spec.start == "orthogonal":
                nn.init.orthogonal_(matrix, generator=generator)
            else:
                places = spec.places or tuple(range(min(spec.widths)))
                matrix[list(places), torch.arange(len(places))] = 1.0
            self.projectors.append(nn.Parameter(matrix))
        if spec.distance == "channel_scaled_mse":
            self.register_buffer("scales", torch.ones(len(spec.pairs), spec.widths[1]))

    def projector(self, number: int) -> nn.Parameter | None:
        """Returns the matrix [teacher's width, student's width] of a pair; None where there is none."""
        return None if not len(self.projectors) else self.projectors[0 if self.spec.shared else number]

    def forward(
        self, student: HiddenStates, teacher: HiddenStates, documents: Int[Tensor, " n"], weights: Float[Tensor, " n"]
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        spec = self.spec
        counts = spec.pair_weights or [1 / len(spec.pairs)] * len(spec.pairs)
        with torch.autocast(documents.device.type, enabled=False):
            total = torch.zeros((), dtype=weights.dtype, device=documents.device)
            plain = torch.zeros_like(total)
            distance = DISTANCES[spec.distance].load()
            for number, (count, (s, t)) in enumerate(zip(counts, spec.pairs, strict=True)):
                if spec.of_attention:
                    pair = Pair(student.attention[int(s)], teacher.attention[int(t)], documents)
                else:
                    ours = student.states[s].to(accumulator(student.states[s].dtype))
                    theirs, scale = compared(teacher.states[t].to(ours.dtype), spec), None
                    if (matrix := self.projector(number)) is not None:
                        ours = linear(ours, matrix.to(ours.dtype))
                    if spec.distance == "channel_scaled_mse":
                        scale = self.scales[number].to(theirs.dtype)  # pyright: ignore
                    pair = Pair(compared(ours, spec), theirs, documents, scale)
                values = distance(pair, **spec.arguments)
                total = total + count * (values * weights.to(values.dtype)).sum()
                plain = plain + count * values.detach().sum()
        return total, plain


def compared(state: Float[Tensor, "n d"], spec: HiddenSpec) -> Float[Tensor, "n d"]:
    """Returns a state as the distance takes it."""
    return state if spec.normalise is None else normalized(state, spec.normalise)


def layers_of(specs: Sequence[HiddenSpec], side: int) -> tuple[tuple[Layer, ...], tuple[int, ...]]:
    """Returns the layers whose states, and those whose attention, the objectives need of student (0) or teacher (1)."""
    states = in_order(pair[side] for spec in specs if not spec.of_attention for pair in spec.pairs)
    attention = in_order(pair[side] for spec in specs if spec.of_attention for pair in spec.pairs)
    return states, tuple(int(layer) for layer in attention)


@torch.no_grad()
def fit_to_first_step(
    module: Any,
    teacher_forward: Callable[..., TeacherOutput],
    micro_batches: Iterable[tuple[Batch, TeacherOutput | None]],
    ranks: RankGroup = SINGLE_RANK,
    *,
    device: torch.device | None = None,
) -> None:
    """Fits the hidden-state objectives that need it to the first step, all its micro-batches together.

    Args:
        module: the student step that has them.
        teacher_forward: the teacher's ``forward``.
        micro_batches: this process's part of the step.
        ranks: the processes that have the other parts.
        device: where the student works; None is where its parameters are.
    """
    fits = [_Fit(term) for term in module.hidden.values() if isinstance(term, HiddenLoss) and term.spec.measures_first]
    place = device or next(module.parameters()).device
    was_training = module.training
    module.eval()
    for micro_batch, prefetched in micro_batches:
        batch = micro_batch.to(place)
        _, student = module.within(
            lambda batch=batch: hidden_states.all_hidden_states(module.model, batch, module.layers, module.attention)
        )
        output = teacher_forward(batch, prefetched)
        assert output.hidden is not None  # the objectives need it
        for fit in fits:
            fit.add(student, output.hidden)
    module.train(was_training)
    reshard(module)
    for fit in fits:
        fit.finish(ranks)


class _Fit:
    """Sums of products of states, and of squares, over the positions of a step."""

    def __init__(self, term: HiddenLoss) -> None:
        self.term = term
        inner, outer = term.spec.widths
        count = len(term.projectors) if term.spec.start == "least_squares" else 0
        self.own = [torch.zeros(inner, inner, dtype=torch.float64) for _ in range(count)]
        self.shared = [torch.zeros(inner, outer, dtype=torch.float64) for _ in range(count)]
        self.squares = torch.zeros(len(term.spec.pairs), outer, dtype=torch.float64)
        self.num_positions = 0

    def add(self, student: HiddenStates, teacher: HiddenStates) -> None:
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
            fill_local(projector, ridge(own, shared).T[own_rows(projector)])
        if self.term.spec.distance == "channel_scaled_mse":
            self.term.scales.copy_(torch.stack([channel_scale(row, self.num_positions) for row in self.squares]))  # pyright: ignore


def ridge(own: Tensor, shared: Tensor) -> Tensor:
    """Returns ``(XᵀX + λ·mean diagonal·1)⁻¹ XᵀY``, the matrix by which X comes nearest to Y."""
    diagonal = own.diagonal().mean().clamp_min(torch.finfo(own.dtype).tiny)
    regular = own + RIDGE * diagonal * torch.eye(len(own), dtype=own.dtype)
    return torch.cholesky_solve(shared, torch.linalg.cholesky(regular))

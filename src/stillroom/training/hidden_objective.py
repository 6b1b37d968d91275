"""Objectives over hidden states: the projectors and the weighted distance of the layers that are compared."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import linear

from stillroom.layers import Layer, in_order
from stillroom.lm_head import accumulator
from stillroom.losses.config import DISTANCES
from stillroom.losses.hidden import Normalize, Pair, normalized
from stillroom.signals import HiddenStates

ATTENTION = "attention_relation"


@dataclass(frozen=True)
class HiddenSpec:
    """What a hidden-state objective compares."""

    name: str
    distance: str
    """Its name in DISTANCES."""
    pairs: tuple[tuple[Layer, Layer], ...]
    """(student's layer, teacher's layer)"""
    widths: tuple[int, int]
    """Of the student's and of the teacher's states."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """The distance's keyword arguments."""
    start: str | None = None
    """What projectors start from: orthogonal, identity, least_squares; None has none."""
    shared: bool = False
    normalise: Normalize | None = None
    pair_weights: tuple[float, ...] | None = None
    """None is the mean over the pairs."""
    by_data: bool = False
    """Whether each position counts what the data say."""
    places: tuple[int, ...] | None = None
    """For a start from the identity: the teacher's channel that each of the student's is; None is the first ones."""

    @property
    def of_attention(self) -> bool:
        """Whether queries, keys and values are compared, and not states."""
        return self.distance == ATTENTION

    @property
    def measures_first(self) -> bool:
        """Whether it has to see the first step's states before it can start."""
        return self.start == "least_squares" or self.distance == "channel_scaled_mse"


class HiddenLoss(nn.Module):
    """``forward(student, teacher, documents, weights) -> (Σ weight · distance with gradient, Σ distance)``.

    Its parameters, the projectors, are trained and saved with the student step, and belong to no exported model.

    Args:
        seed: of projectors that start at random.
    """

    def __init__(self, spec: HiddenSpec, *, seed: int = 0) -> None:
        super().__init__()
        self.spec = spec
        count = 0 if spec.start is None else 1 if spec.shared else len(spec.pairs)
        generator = torch.Generator().manual_seed(seed)
        self.projectors = nn.ParameterList([_start(spec, generator) for _ in range(count)])
        if spec.distance == "channel_scaled_mse":
            self.register_buffer("scales", torch.ones(len(spec.pairs), spec.widths[1]))

    def projector(self, number: int) -> nn.Parameter | None:
        """The matrix [teacher's width, student's width] of a pair; None where there is none."""
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
            for number, count in enumerate(counts):
                values = distance(self._pair(number, student, teacher, documents), **spec.arguments)
                total = total + count * (values * weights.to(values.dtype)).sum()
                plain = plain + count * values.detach().sum()
        return total, plain

    def _pair(self, number: int, student: HiddenStates, teacher: HiddenStates, documents: Tensor) -> Pair:
        s, t = self.spec.pairs[number]
        if self.spec.of_attention:
            return Pair(student.attention[int(s)], teacher.attention[int(t)], documents)
        ours = student.states[s].to(accumulator(student.states[s].dtype))
        theirs = teacher.states[t].to(ours.dtype)
        if (matrix := self.projector(number)) is not None:
            ours = linear(ours, matrix.to(ours.dtype))
        ours, theirs = compared(ours, self.spec), compared(theirs, self.spec)
        scale = self.scales[number].to(theirs.dtype) if self.spec.distance == "channel_scaled_mse" else None  # pyright: ignore
        return Pair(ours, theirs, documents, scale)


def compared(state: Float[Tensor, "n d"], spec: HiddenSpec) -> Float[Tensor, "n d"]:
    """A state as the distance is given it."""
    return state if spec.normalise is None else normalized(state, spec.normalise)


def _start(spec: HiddenSpec, generator: torch.Generator) -> nn.Parameter:
    """A projector [teacher's width, student's width]; what is fitted later starts from the identity."""
    inner, outer = spec.widths
    matrix = torch.empty(outer, inner)
    if spec.start == "orthogonal":
        return nn.Parameter(nn.init.orthogonal_(matrix, generator=generator))
    places = spec.places or tuple(range(min(inner, outer)))
    matrix.zero_()
    matrix[list(places), torch.arange(len(places))] = 1.0
    return nn.Parameter(matrix)


def layers_of(specs: Sequence[HiddenSpec], side: int) -> tuple[tuple[Layer, ...], tuple[int, ...]]:
    """The layers whose states, and those whose attention, all objectives need of the student (0) or the teacher (1)."""
    states = in_order(pair[side] for spec in specs if not spec.of_attention for pair in spec.pairs)
    attention = in_order(pair[side] for spec in specs if spec.of_attention for pair in spec.pairs)
    return states, tuple(int(layer) for layer in attention)

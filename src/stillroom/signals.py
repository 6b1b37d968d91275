"""Signals: the teacher's output at each position."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stillroom.errors import MismatchError
from stillroom.layers import Layer
from stillroom.lm_head import LMHead, logits_into


@dataclass(frozen=True)
class Dense:
    """The teacher's last hidden states and its head, from which its logits are computed chunk by chunk."""

    hidden: Float[Tensor, "n d"]
    head: LMHead

    def __len__(self) -> int:
        return len(self.hidden)

    @property
    def vocab_size(self) -> int:
        return self.head.vocab_size

    def at(self, positions: Int[Tensor, " k"]) -> "Dense":
        """The signal of some of the positions only."""
        return Dense(self.hidden[positions], self.head)

    def to(self, device: torch.device | str) -> "Dense":
        """The same signal, its hidden states on a device."""
        return Dense(self.hidden.to(device, non_blocking=True), self.head)

    def logits_into(self, out: Float[Tensor, "r v"], rows: slice) -> None:
        """Writes the first ``v`` logits of some positions into ``out``."""
        logits_into(out, self.hidden[rows], self.head)


@dataclass(frozen=True)
class Logits:
    """All logits at once, for tests and tiny vocabularies only."""

    logits: Float[Tensor, "n v"]

    def __len__(self) -> int:
        return len(self.logits)

    @property
    def vocab_size(self) -> int:
        return self.logits.shape[1]

    def at(self, positions: Int[Tensor, " k"]) -> "Logits":
        """The signal of some of the positions only."""
        return Logits(self.logits[positions])

    def to(self, device: torch.device | str) -> "Logits":
        """The same signal on a device."""
        return Logits(self.logits.to(device, non_blocking=True))

    def logits_into(self, out: Float[Tensor, "r v"], rows: slice) -> None:
        """Writes the first ``v`` logits of some positions into ``out``."""
        out.copy_(self.logits[rows, : out.shape[1]])


@dataclass(frozen=True)
class Sparse:
    """A few entries of the teacher's distribution at each position, in one of two meanings.

    If it is *truncated* (``sampled`` off), the entries are exact, and all other ids are one further outcome of known
    mass, the bucket. If it is *sampled*, the entries are an unbiased estimate of the whole distribution, so nothing is
    left out in expectation, and their sum is 1 in expectation only.
    """

    ids: Int[Tensor, "n k"]
    """Token ids, distinct within a position. A position with fewer than k repeats its first."""
    log_probs: Float[Tensor, "n k"]
    """log of each entry's probability or weight; −inf where a position has fewer than k."""
    log_rests: Mapping[float, Float[Tensor, " n"]] = field(default_factory=dict)
    """If truncated: by temperature, log of the mass left out *at that temperature*, or −inf. It contains 1.0."""
    entropy: Float[Tensor, " n"] | None = None
    """The teacher's entropy in nats. A sampled signal always has it, as ``−Σ w log t`` over the entries, whose mean it
    is; so the noise of the draws cancels in a divergence, which is exactly 0 where student and teacher are equal."""
    label_log_probs: Float[Tensor, " n"] | None = None
    """log of the teacher's probability of the data's own next token, where it was kept."""
    sampled: bool = False
    vocab_size: int | None = None
    """The number of tokens that the distribution is over; None where it is not known."""

    def __len__(self) -> int:
        return len(self.ids)

    def at(self, positions: Int[Tensor, " k"] | slice) -> "Sparse":
        """The signal of some of the positions only."""
        return self._map(lambda tensor: tensor[positions])

    def to(self, device: torch.device | str) -> "Sparse":
        """The same signal on a device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def log_targets(self, temperature: float = 1.0) -> tuple[Float[Tensor, "n k"], Float[Tensor, " n"]]:
        """log of each entry's target and of the bucket's, at a temperature; truncated entries and bucket sum to 1.

        Truncated log-probabilities alone cannot be tempered: the mass beyond them is needed *at that temperature*.

        Raises:
            MismatchError: the mass left out is not known at this temperature, or the entries are a sample.
        """
        if self.sampled:
            if temperature != 1.0:
                raise untempered(temperature, "none: a sample is of temperature 1")
            return self.log_probs, torch.full_like(self.log_probs[:, 0], -torch.inf)
        if temperature not in self.log_rests:
            raise untempered(temperature, ", ".join(map(str, sorted(self.log_rests))))
        log_rest = self.log_rests[temperature]
        return tempered(self.log_probs, log_rest, temperature), log_rest

    def _map(self, change) -> "Sparse":
        changed = {name: tensor for name, tensor in vars(self).items() if isinstance(tensor, Tensor)}
        changed = {name: change(tensor) for name, tensor in changed.items()}
        return replace(self, log_rests={t: change(rest) for t, rest in self.log_rests.items()}, **changed)


def tempered(
    log_probs: Float[Tensor, "n k"], log_rest: Float[Tensor, " n"], temperature: float
) -> Float[Tensor, "n k"]:
    """log of the entries' targets at a temperature, beside a bucket of ``log_rest``: together they sum to 1."""
    scaled = log_probs / temperature
    log_rest = log_rest.clamp(max=-torch.finfo(log_rest.dtype).tiny)
    log_kept = torch.where(log_rest > -0.7, (-log_rest.expm1()).log(), (-log_rest.exp()).log1p())  # each where exact
    return scaled - (torch.logsumexp(scaled, -1) - log_kept).unsqueeze(-1)


def untempered(temperature: float, known: str) -> MismatchError:
    """The error of a temperature at which the mass that a sparse signal left out is not known."""
    return MismatchError(
        f"the stored signal cannot be used at temperature {temperature}",
        {"asked for": temperature, "stored": known},
        why="The tail that was left out grows with the temperature: at T = 2 it holds most of the mass beyond the top "
        "50, so targets made from the kept entries alone would be far too sharp.",
        fix="Use temperature 1.0, or capture with signal.kind=top_k and signal.temperatures=[…] that names this one.",
    )


Signal = Dense | Logits | Sparse
"""The teacher's distribution of the next token."""


class Attention(NamedTuple):
    """The projections of a layer's attention, before rotary position embeddings."""

    queries: Float[Tensor, "n q"]
    keys: Float[Tensor, "n k"]
    values: Float[Tensor, "n v"]


@dataclass(frozen=True)
class HiddenStates:
    """Hidden states of a model at some of its layers."""

    states: Mapping[Layer, Float[Tensor, "n d"]] = field(default_factory=dict)
    attention: Mapping[int, Attention] = field(default_factory=dict)

    def to(self, device: torch.device | str) -> "HiddenStates":
        """The same states on a device."""
        return HiddenStates(
            {layer: state.to(device, non_blocking=True) for layer, state in self.states.items()},
            {layer: Attention(*(x.to(device, non_blocking=True) for x in a)) for layer, a in self.attention.items()},
        )


class TeacherOutput(NamedTuple):
    """All outputs of a teacher at the same positions."""

    signal: Signal | None = None
    """Its distribution of the next token."""
    hidden: HiddenStates | None = None
    """Its hidden states, where they are requested."""

    def to(self, device: torch.device | str) -> "TeacherOutput":
        """The same output on a device."""
        signal, hidden = self
        return TeacherOutput(
            None if signal is None else signal.to(device), None if hidden is None else hidden.to(device)
        )

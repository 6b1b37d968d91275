"""An objective is a loss with its weight: built from a recipe's settings, reduced to the number to minimize."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from stillroom.batch import Batch
from stillroom.errors import MismatchError
from stillroom.kernels import Term
from stillroom.losses.block import LogitBlock, Loss
from stillroom.losses.config import LOSSES, ByEntropy, HiddenObjective, ObjectiveConfig, Schedule
from stillroom.losses.logits import student_entropy, teacher_entropy

Measure = Callable[[LogitBlock], Tensor]
"""A number for each position that is only reported, such as agreement."""

TokenWeight = Callable[[LogitBlock], Tensor]
"""The weight of each position of a block, [r]. It is a constant to the gradient."""


@dataclass(frozen=True)
class Objective:
    """A loss with its weight in the sum, and the loss's keyword arguments."""

    name: str
    loss: Loss
    weight: float = 1.0
    arguments: dict[str, Any] = field(default_factory=dict)
    token_weight: TokenWeight | None = None
    """A further weight of each position in this objective; 1 by default."""
    unit: str = "nats"
    """The unit of its value; "loss" where it has none."""

    @cached_property
    def term(self) -> Term | None:
        """The loss and its arguments as kernels know them; None where no kernel knows the loss.

        Raises:
            ConfigError: the loss does not accept its arguments.
        """
        entry = LOSSES.get(getattr(self.loss, "__name__", ""))
        if entry is None or entry.kernel_numbers is None or entry.load() is not self.loss:
            return None
        settings = entry.checked(self.arguments)
        numbers = (getattr(settings, number) for number in entry.kernel_numbers)
        return Term(self.loss.__name__, getattr(settings, "temperature", 1.0), *numbers)


def names(configs: Sequence[ObjectiveConfig]) -> list[str]:
    """The name of each objective: its kind, with a number behind it where several have the same kind."""
    kinds = [config.kind for config in configs]
    return [kind if kinds.count(kind) == 1 else f"{kind}_{kinds[:i].count(kind)}" for i, kind in enumerate(kinds)]


def build_objectives(configs: Sequence[ObjectiveConfig], progress: float = 1.0) -> tuple[Objective, ...]:
    """Builds an Objective for each of the settings that compare next-token distributions.

    Args:
        progress: how far the run has come, from 0 at its first step to 1 at its last, for settings with a schedule.
    """
    objectives = []
    for name, config in zip(names(configs), configs, strict=True):
        if isinstance(config, HiddenObjective):
            continue
        values = {field: value_at(getattr(config, field), progress) for field in type(config).model_fields}
        kind, weight, by = (values.pop(field) for field in ("kind", "weight", "token_weight"))
        token_weight = None if by is None else by_data
        if isinstance(by, ByEntropy):
            who = "teacher" if by.kind == "teacher_entropy" else "student"
            token_weight = by_entropy(who, certain=by.certain, uncertain=by.uncertain)
        objectives.append(Objective(name, LOSSES[kind].load(), weight, values, token_weight, LOSSES[kind].unit))
    return tuple(objectives)


def hidden_weights(configs: Sequence[ObjectiveConfig], progress: float = 1.0) -> dict[str, float]:
    """The weight of each objective that compares hidden states, by its name."""
    named = zip(names(configs), configs, strict=True)
    return {name: value_at(config.weight, progress) for name, config in named if isinstance(config, HiddenObjective)}


def value_at(setting: Any, progress: float) -> Any:
    """The value of a setting at a point of the run."""
    if not isinstance(setting, Schedule):
        return setting
    share = min(progress / setting.over, 1.0)
    if setting.kind == "cosine":
        share = (1 - math.cos(math.pi * share)) / 2
    return setting.start + (setting.stop - setting.start) * share


def scheduled(configs: Sequence[ObjectiveConfig]) -> bool:
    """Whether anything in them changes over the run."""
    return any(isinstance(value, Schedule) for c in configs for value in (c.weight, getattr(c, "temperature", None)))


def needs_teacher(configs: Sequence[ObjectiveConfig]) -> bool:
    return any(config.needs_teacher for config in configs)


def by_entropy(who: Literal["student", "teacher"], *, certain: float, uncertain: float) -> TokenWeight:
    """``certain + (uncertain − certain) · H / log v`` with the entropy H at temperature 1 over v tokens."""

    def weight(block: LogitBlock) -> Float[Tensor, " r"]:
        entropy = student_entropy(block) if who == "student" else teacher_entropy(block)
        share = entropy / math.log(max(2, block.vocab_size))
        return certain + (uncertain - certain) * share

    return weight


def by_data(block: LogitBlock) -> Float[Tensor, " r"]:
    """The batch's own weights.

    Raises:
        MismatchError: it has none.
    """
    if block.data_weights is None:
        raise MismatchError(
            "an objective counts tokens by the data, and the batch brings no weights",
            {"token_weight": "data", "batch.weights": "none"},
            why="Every token would count alike, which is not what was asked for.",
            fix="Set data.weight to the column that holds each row's weight.",
        )
    return block.data_weights.to(block.dtype)


def position_weights(batch: Batch, num_kept_of_step: int) -> Float[Tensor, " kept"]:
    """The weight of each kept position of a micro-batch: one over the kept positions of the *whole* optimizer step.

    ``num_kept_of_step`` counts all micro-batches (and all ranks), so the sum over them is the step's mean, however the
    step was split.
    """
    device = batch.tokens.device
    return torch.full(batch.kept.shape, 1 / num_kept_of_step, dtype=widest_float(device), device=device)


def widest_float(device: torch.device) -> torch.dtype:
    """The type that sums over a step are held in: float64, except on Apple's devices, which have none."""
    return torch.float32 if device.type == "mps" else torch.float64

"""From the objectives of a recipe to losses with their names, weights and arguments."""

import math
from collections.abc import Sequence
from typing import Any

from stillroom.distill.objective_config import (
    ByColumn,
    ByEntropy,
    HiddenObjective,
    LogitObjective,
    ObjectiveConfig,
    Schedule,
)
from stillroom.losses import LOSSES, Objective
from stillroom.losses.objective import TokenWeight, by_data, by_entropy


def names(configs: Sequence[ObjectiveConfig]) -> list[str]:
    """What each is called: by its kind; two of one kind are told apart by a number."""
    kinds = [config.kind for config in configs]
    return [kind if kinds.count(kind) == 1 else f"{kind}_{kinds[:i].count(kind)}" for i, kind in enumerate(kinds)]


def build_objectives(configs: Sequence[ObjectiveConfig], progress: float = 1.0) -> tuple[Objective, ...]:
    """One Objective for each that compares next-token distributions.

    Args:
        progress: how far the run has come, from 0 at its first step to 1 at its last, for what follows a schedule.
    """
    named = zip(names(configs), configs, strict=True)
    return tuple(_build(name, config, progress) for name, config in named if not isinstance(config, HiddenObjective))


def hidden_weights(configs: Sequence[ObjectiveConfig], progress: float = 1.0) -> dict[str, float]:
    """The weight of each that compares inner states, by its name."""
    named = zip(names(configs), configs, strict=True)
    return {name: value_at(config.weight, progress) for name, config in named if isinstance(config, HiddenObjective)}


def _build(name: str, config: LogitObjective, progress: float) -> Objective:
    arguments = {field: getattr(config, field) for field in type(config).model_fields}
    for field in ("kind", "weight", "token_weight"):
        del arguments[field]
    arguments = {field: value_at(value, progress) for field, value in arguments.items()}
    weight, token_weight = value_at(config.weight, progress), _token_weight(config.token_weight)
    return Objective(name, LOSSES[config.kind], weight, arguments, token_weight)


def value_at(setting: Any, progress: float) -> Any:
    """What a setting is at a point of the run."""
    if not isinstance(setting, Schedule):
        return setting
    share = min(progress / setting.over, 1.0)
    if setting.kind == "cosine":
        share = (1 - math.cos(math.pi * share)) / 2
    return setting.start + (setting.stop - setting.start) * share


def _token_weight(config: ByEntropy | ByColumn | None) -> TokenWeight | None:
    if isinstance(config, ByEntropy):
        whose = "teacher" if config.kind == "teacher_entropy" else "student"
        return by_entropy(whose, certain=config.certain, uncertain=config.uncertain)
    return None if config is None else by_data


def scheduled(configs: Sequence[ObjectiveConfig]) -> bool:
    """Whether anything in them changes over the run."""
    return any(isinstance(value, Schedule) for c in configs for value in (c.weight, getattr(c, "temperature", None)))


def needs_teacher(configs: Sequence[ObjectiveConfig]) -> bool:
    return any(config.needs_teacher for config in configs)

"""From the objectives of a recipe to losses with their names, weights and arguments."""

from collections.abc import Sequence

from stillroom.distill.config import ObjectiveConfig
from stillroom.losses import LOSSES, Objective


def build_objectives(configs: Sequence[ObjectiveConfig]) -> tuple[Objective, ...]:
    """One Objective for each; two of one kind are told apart by a number."""
    kinds = [config.kind for config in configs]
    names = [kind if kinds.count(kind) == 1 else f"{kind}_{kinds[:i].count(kind)}" for i, kind in enumerate(kinds)]
    return tuple(
        Objective(name, LOSSES[config.kind], config.weight, config.model_dump(exclude={"kind", "weight"}))
        for name, config in zip(names, configs, strict=True)
    )


def needs_teacher(configs: Sequence[ObjectiveConfig]) -> bool:
    return any(config.kind != "cross_entropy" for config in configs)

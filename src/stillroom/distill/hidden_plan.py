"""The plan of the hidden-state objectives: their layer maps and projectors, told before any model is loaded."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

from stillroom.distill.config import DistillConfig
from stillroom.distill.layer_maps import Side, check_objective, pair_layers, pairs_text, resolve_layers, side_of
from stillroom.errors import MismatchError
from stillroom.losses.config import ByColumn, HiddenObjective, Linear
from stillroom.losses.objective import names
from stillroom.store.reader import Store
from stillroom.training.hidden_objective import HiddenSpec


@dataclass(frozen=True)
class StudentOrigin:
    """What a student cut from this teacher was in it."""

    layers: tuple[int, ...] | None
    """The teacher's layer that each of the student's was; None where that is yet to be measured."""
    channels: tuple[int, ...] | None = None
    """The teacher's channel that each of the student's was; None where all are there, or that is yet to be measured."""


@dataclass(frozen=True)
class HiddenPlan:
    """What all hidden-state objectives of a run compare."""

    student: Side
    teacher: Side
    objectives: tuple[tuple[str, str, HiddenObjective], ...]
    """The name, the setting and the settings of each."""
    origin: StudentOrigin | None
    """None for a student that is not cut from this teacher."""

    def specs(self, origin: StudentOrigin | None) -> tuple[HiddenSpec, ...]:
        """What each compares, once it is known what the student was in its teacher."""
        return tuple(self._spec(name, setting, objective, origin) for name, setting, objective in self.objectives)

    def texts(self) -> dict[str, str]:
        """The map of each objective in words, by its name."""
        return {name: self._text(name, setting, objective) for name, setting, objective in self.objectives}

    def _text(self, name: str, setting: str, objective: HiddenObjective) -> str:
        spec = self._spec(name, setting, objective, self.origin)
        measured = self.origin is not None and self.origin.layers is None and _is_kept(objective)
        pairs = "each layer with the one that it was; which, is measured first" if measured else pairs_text(spec.pairs)
        if spec.of_attention:
            return f"{pairs}; queries, keys and values"
        through = "no projector"
        if isinstance(objective.projector, Linear):
            through = (
                f"{'one projector' if spec.shared else 'a projector each'} from {spec.widths[0]} to {spec.widths[1]}"
            )
        return f"{pairs}; {through}"

    def _spec(self, name: str, setting: str, objective: HiddenObjective, origin: StudentOrigin | None) -> HiddenSpec:
        student, teacher = self.student, self.teacher
        kept: Sequence[int] | None = None if origin is None else origin.layers or range(student.num_layers)
        pairs = pair_layers(objective.layers, student.num_layers, teacher.num_layers, kept, f"{setting}.layers")  # pyright: ignore[reportArgumentType]
        check_objective(objective, pairs, student, teacher, setting)
        projector = objective.projector if isinstance(objective.projector, Linear) else None
        distance: dict[str, Any] = objective.distance.model_dump()
        return HiddenSpec(
            name,
            distance.pop("kind"),
            pairs,
            (student.width, teacher.width),
            distance,
            start=None if projector is None else projector.start,
            shared=projector is not None and projector.shared,
            normalise=objective.normalise,
            pair_weights=objective.weights_by_layer,
            by_data=isinstance(objective.token_weight, ByColumn),
            places=None if origin is None else origin.channels,
        )


def plan_hidden(
    config: DistillConfig,
    student: PretrainedConfig,
    teacher: PretrainedConfig | None,
    store: Store | None,
    origin: StudentOrigin | None,
) -> tuple[DistillConfig, HiddenPlan | None]:
    """Resolves and checks the hidden-state objectives; None where there are none.

    Raises:
        MismatchError, ConfigError: a map, a projector or a store does not fit.
    """
    if not any(isinstance(objective, HiddenObjective) for objective in config.objectives):
        return config, None
    ours = side_of(student, "student")
    if store is not None:
        theirs = _stored_side(store)
    else:
        assert teacher is not None  # the config demands a teacher
        theirs = side_of(teacher, "teacher")
    heads = student.get_text_config().num_attention_heads
    config = resolve_layers(config, ours, theirs, heads, was_cut=origin is not None)
    objectives = tuple(
        (name, f"objectives.{i}", objective)
        for i, (name, objective) in enumerate(zip(names(config.objectives), config.objectives, strict=True))
        if isinstance(objective, HiddenObjective)
    )
    plan = HiddenPlan(ours, theirs, objectives, origin)
    plan.specs(origin)  # which raises where something does not fit
    return config, plan


def _is_kept(objective: HiddenObjective) -> bool:
    return getattr(objective.layers, "kind", None) == "kept"


def _stored_side(store: Store) -> Side:
    manifest = store.manifest
    if manifest.hidden is None:
        raise MismatchError(
            f"the store {store.path} holds no hidden states",
            {"needed by": "an objective of kind hidden", "stored": "signals alone"},
            why="Without the teacher's inner states there is nothing to compare with.",
            fix="Capture anew with hidden.layers=[…], use a live teacher, or leave out the objective.",
        )
    return Side(f"the store {store.path}", manifest.num_layers, manifest.hidden_width, (), store.layers)

"""The plan of the hidden-state objectives: which of the student's layers is compared with which of the teacher's, and
how, told from the configs before any model is loaded."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd
from typing import Any

from transformers import PretrainedConfig

from stillroom.config import replace
from stillroom.errors import ConfigError, MismatchError
from stillroom.layers import Layer, check_layers, evenly
from stillroom.losses.config import (
    PROJECTION_FREE,
    Auto,
    ByColumn,
    Every,
    HiddenObjective,
    Kept,
    LayerMap,
    Linear,
    ObjectiveConfig,
    Pairs,
    Uniform,
)
from stillroom.losses.objective import names
from stillroom.pruning.prune import PruneMask
from stillroom.store.reader import Store
from stillroom.training.hidden_objective import HiddenSpec


@dataclass(frozen=True)
class Side:
    """A model's layers, as far as they are known before it is loaded."""

    who: str
    num_layers: int
    width: int
    attention: tuple[int, ...] = ()
    """The widths of a block's queries, keys and values; empty where there are none to compare."""
    heads: int = 1
    stored: tuple[Layer, ...] | None = None
    """The layers that a store holds; None for a model, which has all."""

    @classmethod
    def of_model(cls, config: PretrainedConfig, who: str) -> "Side":
        text = config.get_text_config()
        heads = text.num_attention_heads
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
        groups = getattr(text, "num_key_value_heads", None) or heads
        attention = (heads * head_dim, *[groups * head_dim] * 2)
        return cls(who, text.num_hidden_layers, text.hidden_size, attention, heads)

    @classmethod
    def of_store(cls, store: Store) -> "Side":
        """Raises MismatchError where the store holds no states."""
        manifest = store.manifest
        if manifest.hidden is None:
            raise MismatchError(
                f"the store {store.path} holds no hidden states",
                {"needed by": "an objective of kind hidden", "stored": "signals alone"},
                why="Without the teacher's inner states there is nothing to compare with.",
                fix="Capture anew with hidden.layers=[…], use a live teacher, or leave out the objective.",
            )
        return cls(f"the store {store.path}", manifest.num_layers, manifest.hidden_width, stored=store.layers)


@dataclass(frozen=True)
class StudentOrigin:
    """The place in this teacher that a student was cut from."""

    layers: tuple[int, ...] | None
    """The teacher's layer that each of the student's was; None where that is yet to be measured."""
    channels: tuple[int, ...] | None = None
    """The teacher's channel that each of the student's was; None where all are there, or that is yet to be measured."""


@dataclass(frozen=True)
class HiddenPlan:
    """The comparisons of all hidden-state objectives of a run."""

    student: Side
    teacher: Side
    objectives: tuple[tuple[str, str, HiddenObjective], ...]
    """The name, the setting and the settings of each."""
    origin: StudentOrigin | None
    """None for a student that is not cut from this teacher."""

    def specs(self, cut: PruneMask | None = None) -> tuple[HiddenSpec, ...]:
        """Returns what each compares; ``cut`` is what the student was, once that is measured.

        Raises:
            MismatchError, ConfigError: a map, a projector or a store does not fit.
        """
        origin = self.origin if self.origin is None or cut is None else StudentOrigin(cut.layers, cut.channels)
        return tuple(self._spec(name, setting, objective, origin) for name, setting, objective in self.objectives)

    def texts(self) -> dict[str, str]:
        """Returns the map of each objective in words, by its name."""
        found = {}
        for spec, (name, _, objective) in zip(self.specs(), self.objectives, strict=True):
            pairs, through = pairs_text(spec.pairs), "no projector"
            if isinstance(objective.layers, Kept) and self.origin is not None and self.origin.layers is None:
                pairs = "each layer with the one that it was; which, is measured first"
            if spec.of_attention:
                through = "queries, keys and values"
            elif spec.start is not None:
                number = "one projector" if spec.shared else "a projector each"
                through = f"{number} from {spec.widths[0]} to {spec.widths[1]}"
            found[name] = f"{pairs}; {through}"
        return found

    def _spec(self, name: str, setting: str, objective: HiddenObjective, origin: StudentOrigin | None) -> HiddenSpec:
        student, teacher = self.student, self.teacher
        kept: Sequence[int] | None = None if origin is None else origin.layers or range(student.num_layers)
        pairs = pair_layers(objective.layers, student.num_layers, teacher.num_layers, kept, f"{setting}.layers")  # pyright: ignore[reportArgumentType]
        self._check(setting, objective, pairs)
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

    def _check(self, setting: str, objective: HiddenObjective, pairs: Sequence[tuple[Layer, Layer]]) -> None:
        """Returns where the distance can compare those layers.

        Raises:
            MismatchError: the widths differ and nothing projects them; or a store does not hold the layers.
            ConfigError: there is not one weight for each pair, or an end of the model is asked for its attention.
        """
        student, teacher = self.student, self.teacher
        needed = ", ".join(str(layer) for _, layer in pairs)
        if teacher.stored is not None and any(layer not in teacher.stored for _, layer in pairs):
            raise MismatchError(
                f"{setting} needs layers that the store does not hold",
                {"needed": needed, teacher.who: ", ".join(map(str, teacher.stored))},
                why="Without the teacher's states there is nothing to learn from.",
                fix=f"Name pairs of stored layers, or capture anew with hidden.layers=[{needed}].",
            )
        weights, name = objective.weights_by_layer, objective.distance.kind
        widths = {"student": f"{student.width} channels", teacher.who: f"{teacher.width} channels"}
        if weights is not None and (len(weights) != len(pairs) or not any(weights)):
            raise ConfigError(
                f"{setting}.weights_by_layer does not fit the layer map",
                {"weights": list(weights), "pairs": f"{len(pairs)}: {pairs_text(pairs)}"},
                why="Each pair needs a weight, and one of them more than 0.",
                fix=f"Give {len(pairs)} weights, or leave them out.",
            )
        if name == "attention_relation":
            self._check_attention(setting, objective, pairs)
        elif name not in PROJECTION_FREE and objective.projector is None and student.width != teacher.width:
            raise MismatchError(
                f"{setting} compares states of different widths, and has no projector",
                widths,
                why=f"The distance {name} goes channel by channel.",
                fix="Set projector=linear, or use the distance linear_cka, which needs none.",
            )
        elif getattr(objective.projector, "start", None) == "identity" and student.width > teacher.width:
            raise MismatchError(
                f"{setting}.projector cannot start from the identity",
                widths,
                why="Some of the student's channels would have no place.",
                fix="Use start=orthogonal or start=least_squares.",
            )

    def _check_attention(self, setting: str, objective: HiddenObjective, pairs: Sequence[tuple[Layer, Layer]]) -> None:
        if self.teacher.stored is not None:
            raise MismatchError(
                f"{setting} needs queries, keys and values, which a store does not hold",
                {"distance": "attention_relation", self.teacher.who: "hidden states alone"},
                why="Relations of attention are made of them.",
                fix="Use a live teacher, or another distance.",
            )
        for pair in pairs:
            if not all(isinstance(layer, int) for layer in pair):
                raise ConfigError(
                    f"{setting}.layers names an end of the model, which has no attention",
                    {"distance": "attention_relation", "pair": pairs_text([pair])},
                    why="Only blocks have queries, keys and values.",
                    fix="Name blocks by their numbers, or use another distance.",
                )
        heads: Any = getattr(objective.distance, "heads", 1)
        for side in (self.student, self.teacher):
            if wrong := [width for width in side.attention if width % heads]:
                raise MismatchError(
                    f"{setting}.distance.heads does not divide the {side.who}'s queries, keys and values",
                    {"heads": heads, f"the {side.who}'s widths": ", ".join(map(str, dict.fromkeys(wrong)))},
                    why="Each relation head takes an equal share of them.",
                    fix="Leave `heads` at auto.",
                )


def plan_hidden(
    objectives: Sequence[ObjectiveConfig],
    student: PretrainedConfig,
    teacher: PretrainedConfig | Store | None,
    origin: StudentOrigin | None,
) -> tuple[Sequence[ObjectiveConfig], HiddenPlan | None]:
    """Returns the objectives with each "auto" of those over hidden states resolved, and their plan, checked; None where
    there are none.

    Raises:
        MismatchError, ConfigError: a map, a projector or a store does not fit.
    """
    if not any(isinstance(objective, HiddenObjective) for objective in objectives):
        return objectives, None
    assert teacher is not None  # the config demands a teacher
    ours = Side.of_model(student, "student")
    theirs = Side.of_store(teacher) if isinstance(teacher, Store) else Side.of_model(teacher, "teacher")
    resolved, named = list(objectives), []
    for i, (name, objective) in enumerate(zip(names(objectives), objectives, strict=True)):
        if not isinstance(objective, HiddenObjective):
            continue
        values: dict[str, Any] = {}
        if isinstance(objective.layers, Auto):
            values["layers"] = {"kind": "uniform" if origin is None else "kept"}
        if isinstance(objective.projector, Auto):
            same = ours.width == theirs.width or objective.distance.kind in PROJECTION_FREE
            values["projector"] = None if same else {"kind": "linear"}
        if getattr(objective.distance, "heads", None) == "auto":
            common = gcd(*ours.attention, *theirs.attention)
            values["distance.heads"] = max(n for n in range(1, ours.heads + 1) if common % n == 0)
        resolved[i] = replace(objective, values)
        named.append((name, f"objectives.{i}", resolved[i]))
    plan = HiddenPlan(ours, theirs, tuple(named), origin)
    plan.specs()  # which raises where something does not fit
    return resolved, plan


def pair_layers(
    layers: LayerMap, num_student: int, num_teacher: int, kept: Sequence[int] | None, setting: str
) -> tuple[tuple[Layer, Layer], ...]:
    """Returns the pairs (student's layer, teacher's layer) of a map, in the student's order.

    Args:
        kept: the teacher's layer that each of the student's was, where it is cut from this teacher.
        setting: what errors call the map.

    Raises:
        ConfigError: the map needs layers that are not there, or a student that was cut from this teacher.
        MismatchError: a pair names a layer that is not there.
    """
    if isinstance(layers, Pairs):
        check_layers([student for student, _ in layers.pairs], num_student, "student", setting)
        check_layers([teacher for _, teacher in layers.pairs], num_teacher, "teacher", setting)
        if len(set(layers.pairs)) < len(layers.pairs):
            raise ConfigError(
                f"{setting} names a pair twice",
                {"pairs": len(layers.pairs), "different": len(set(layers.pairs))},
                why="It would count twice.",
                fix="Name each pair once; weights_by_layer says what it counts.",
            )
        return layers.pairs
    if isinstance(layers, Uniform):
        there = evenly(num_student, num_teacher) if num_student > 1 else (num_teacher - 1,)
        return tuple((i, there[i]) for i in sorted(range(num_student - 1, -1, -layers.one_in)))
    if isinstance(layers, Kept):
        if kept is None:
            raise MismatchError(
                f"{setting} is `kept`, and the student was not cut from this teacher",
                {"expected": "student.init.kind=from_teacher, or a folder that `stillroom prune` made of this teacher"},
                why="Nobody knows which of the teacher's layers the student's were.",
                fix="Use layers=uniform, or name the pairs.",
            )
        return tuple(enumerate(kept))
    assert not isinstance(layers, Auto)  # which is resolved before
    if isinstance(layers, Every):
        pairs = tuple((i, t) for i in range(num_student) if (t := layers.step * (i + 1) - 1) < num_teacher)
        asked, name = layers.step, "every"
    else:
        pairs = tuple(zip(*(range(n - layers.count, n) for n in (num_student, num_teacher)), strict=True))
        pairs = pairs if layers.count <= min(num_student, num_teacher) else ()
        asked, name = layers.count, "last"
    if not pairs:
        raise ConfigError(
            f"{setting}: there are not so many layers",
            {name: asked, "student": f"{num_student} layers", "teacher": f"{num_teacher} layers"},
            why="There would be nothing to compare.",
            fix=f"Give `{name}` a smaller number.",
        )
    return pairs


def pairs_text(pairs: Sequence[tuple[Layer, Layer]]) -> str:
    """Returns pairs as a person reads them."""
    return ", ".join(f"{student} → {teacher}" for student, teacher in pairs)

"""Layer maps: which of the student's layers is compared with which of the teacher's, told from the configs alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd
from typing import Any

from transformers import PretrainedConfig

from stillroom.config import replace
from stillroom.distill.config import DistillConfig
from stillroom.errors import ConfigError, MismatchError
from stillroom.layers import Layer, check_layers, evenly
from stillroom.losses.config import (
    PROJECTION_FREE,
    Auto,
    Every,
    HiddenObjective,
    Kept,
    LayerMap,
    Linear,
    Pairs,
    Uniform,
)


@dataclass(frozen=True)
class Side:
    """What is known of a model's layers before it is loaded."""

    who: str
    num_layers: int
    width: int
    attention: tuple[int, ...] = ()
    """The widths of a block's queries, keys and values; empty where there are none to compare."""
    stored: tuple[Layer, ...] | None = None
    """The layers that a store holds; None for a model, which has all."""


def side_of(config: PretrainedConfig, who: str) -> Side:
    """A model's side."""
    text = config.get_text_config()
    heads = text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    groups = getattr(text, "num_key_value_heads", None) or heads
    return Side(who, text.num_hidden_layers, text.hidden_size, (heads * head_dim, *[groups * head_dim] * 2))


def resolve_layers(config: DistillConfig, student: Side, teacher: Side, heads: int, *, was_cut: bool) -> DistillConfig:
    """The same settings with each "auto" of the hidden objectives replaced.

    Args:
        heads: the student's attention heads.
        was_cut: whether the student is cut from this teacher.
    """
    values: dict[str, Any] = {}
    for i, objective in enumerate(config.objectives):
        if not isinstance(objective, HiddenObjective):
            continue
        if isinstance(objective.layers, Auto):
            values[f"objectives.{i}.layers"] = {"kind": "kept" if was_cut else "uniform"}
        if isinstance(objective.projector, Auto):
            same = student.width == teacher.width or objective.distance.kind in PROJECTION_FREE
            values[f"objectives.{i}.projector"] = None if same else {"kind": "linear"}
        if getattr(objective.distance, "heads", None) == "auto":
            values[f"objectives.{i}.distance.heads"] = _relation_heads((*student.attention, *teacher.attention), heads)
    return replace(config, values)


def _relation_heads(widths: Sequence[int], most: int) -> int:
    """The most relation heads, up to ``most``, that divide all widths."""
    common = gcd(*widths)
    return max(n for n in range(1, most + 1) if common % n == 0)


def pair_layers(
    layers: LayerMap, num_student: int, num_teacher: int, kept: Sequence[int] | None, setting: str
) -> tuple[tuple[Layer, Layer], ...]:
    """The pairs (student's layer, teacher's layer) of a map, in the student's order.

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


def check_objective(
    objective: HiddenObjective, pairs: Sequence[tuple[Layer, Layer]], student: Side, teacher: Side, setting: str
) -> None:
    """Returns where the distance can compare those layers.

    Raises:
        MismatchError: the widths differ and nothing projects them; or a store does not hold the layers.
        ConfigError: there is not one weight for each pair, or an end of the model is asked for its attention.
    """
    _check_stored(pairs, teacher, setting)
    weights, name = objective.weights_by_layer, objective.distance.kind
    if weights is not None and (len(weights) != len(pairs) or not any(weights)):
        raise ConfigError(
            f"{setting}.weights_by_layer does not fit the layer map",
            {"weights": list(weights), "pairs": f"{len(pairs)}: {pairs_text(pairs)}"},
            why="Each pair needs a weight, and one of them more than 0.",
            fix=f"Give {len(pairs)} weights, or leave them out.",
        )
    if name == "attention_relation":
        _check_attention(objective, pairs, student, teacher, setting)
    elif name not in PROJECTION_FREE and objective.projector is None and student.width != teacher.width:
        raise MismatchError(
            f"{setting} compares states of different widths, and has no projector",
            {"student": f"{student.width} channels", teacher.who: f"{teacher.width} channels"},
            why=f"The distance {name} goes channel by channel.",
            fix="Set projector=linear, or use the distance linear_cka, which needs none.",
        )
    elif objective.projector is not None and isinstance(objective.projector, Linear):
        _check_start(objective.projector, student, teacher, setting)


def _check_stored(pairs: Sequence[tuple[Layer, Layer]], teacher: Side, setting: str) -> None:
    if teacher.stored is not None:
        missing = [layer for _, layer in pairs if layer not in teacher.stored]
        if missing:
            raise MismatchError(
                f"{setting} needs layers that the store does not hold",
                {
                    "needed": ", ".join(str(layer) for _, layer in pairs),
                    teacher.who: ", ".join(map(str, teacher.stored)),
                },
                why="Without the teacher's states there is nothing to learn from.",
                fix="Name pairs of stored layers, or capture anew with "
                f"hidden.layers=[{', '.join(str(layer) for _, layer in pairs)}].",
            )


def _check_start(projector: Linear, student: Side, teacher: Side, setting: str) -> None:
    if projector.start == "identity" and student.width > teacher.width:
        raise MismatchError(
            f"{setting}.projector cannot start from the identity",
            {"student": f"{student.width} channels", teacher.who: f"{teacher.width} channels"},
            why="Some of the student's channels would have no place.",
            fix="Use start=orthogonal or start=least_squares.",
        )


def _check_attention(
    objective: HiddenObjective, pairs: Sequence[tuple[Layer, Layer]], student: Side, teacher: Side, setting: str
) -> None:
    if teacher.stored is not None:
        raise MismatchError(
            f"{setting} needs queries, keys and values, which a store does not hold",
            {"distance": "attention_relation", teacher.who: "hidden states alone"},
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
    for side in (student, teacher):
        if wrong := [width for width in side.attention if width % heads]:
            raise MismatchError(
                f"{setting}.distance.heads does not divide the {side.who}'s queries, keys and values",
                {"heads": heads, f"the {side.who}'s widths": ", ".join(map(str, dict.fromkeys(wrong)))},
                why="Each relation head takes an equal share of them.",
                fix="Leave `heads` at auto.",
            )


def pairs_text(pairs: Sequence[tuple[Layer, Layer]]) -> str:
    """Pairs as a person reads them."""
    return ", ".join(f"{student} → {teacher}" for student, teacher in pairs)

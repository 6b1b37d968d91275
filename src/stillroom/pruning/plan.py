"""The plan of a cut: what the smaller model will be, as far as configs tell. No weights are read."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from transformers import PretrainedConfig

from stillroom.errors import ConfigError, MismatchError
from stillroom.layers import evenly
from stillroom.pruning.config import BestLayers, EveryLayer, Layers, PruningConfig, Width
from stillroom.pruning.families import Family, describe, head_dim
from stillroom.recipe import to_yaml


class Widths(NamedTuple):
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int


@dataclass(frozen=True)
class PruningPlan:
    """A cut out of a model of the config ``teacher``."""

    cut: PruningConfig
    family: Family
    teacher: PretrainedConfig
    config: PretrainedConfig
    """The smaller model's. Its numbers are always known; where its layers have to be measured, the type of each is
    that of evenly spaced ones until then."""
    layers: tuple[int, ...] | None
    """The layers that are kept; None where they have to be measured."""

    @property
    def measured(self) -> bool:
        """Whether the model and text are needed to choose what is kept."""
        return self.layers is None or widths_of(self.config) != widths_of(self.teacher)

    def facts(self) -> dict[str, str]:
        """Says what changes and what does not, for people."""
        there, left = self.teacher.num_hidden_layers, self.config.num_hidden_layers
        if self.layers is None:
            assert isinstance(self.cut.layers, BestLayers)
            rule = self.cut.layers
            shape = " after one stretch is dropped" if rule.contiguous else ""
            how = f"those that matter most by {rule.by.replace('_', ' ')}{shape}"
        else:
            how = ", ".join(map(str, self.layers))
        found = {"layers": f"all {there}" if left == there else f"{left} of {there}: {how}"}
        for name in Widths._fields:
            before, after = getattr(self.teacher, name), getattr(self.config, name)
            found[name] = f"{after}, as it is" if before == after else f"{after} of {before}"
        return {**found, "measured": f"on {self.cut.documents} documents" if self.measured else "nothing"}

    def __str__(self) -> str:
        return to_yaml(self.facts())


def plan_pruning(config: PruningConfig, teacher: PretrainedConfig, who: str = "teacher") -> PruningPlan:
    """Checks a cut against the config of the model that it is made in. Raises MismatchError where its family is not
    described, or it has not what is asked for; ConfigError where the widths asked for do not go together."""
    family = describe(teacher, who)
    layers = kept_layers(config.layers, teacher.num_hidden_layers, who)
    widths = _widths(config.width, teacher, family, who)
    known = layers
    if known is None:
        assert isinstance(config.layers, BestLayers)
        known = evenly(config.layers.count, teacher.num_hidden_layers)
    return PruningPlan(config, family, teacher, pruned_config(teacher, family, known, widths), layers)


def widths_of(config: PretrainedConfig) -> Widths:
    return Widths(*(getattr(config, name) for name in Widths._fields))


def pruned_config(teacher: PretrainedConfig, family: Family, layers: Sequence[int], widths: Widths) -> PretrainedConfig:
    """The config of the smaller model; with nothing removed, equal to the teacher's."""
    config = copy.deepcopy(teacher)
    for name in family.per_layer:
        if (values := getattr(teacher, name, None)) is not None:
            setattr(config, name, [values[layer] for layer in layers])
    for name in family.counts_layers:
        dropped = set(range(teacher.num_hidden_layers)) - set(layers)
        setattr(config, name, getattr(teacher, name) - sum(layer < getattr(teacher, name) for layer in dropped))
    config.num_hidden_layers = len(layers)
    if widths != widths_of(teacher):
        config.head_dim = head_dim(teacher)
        for name, value in widths._asdict().items():
            setattr(config, name, value)
    try:
        config.validate()  # by the family's own code
    except Exception as error:
        raise MismatchError(
            f"the family {config.model_type} cannot have these widths",
            {**widths_of(config)._asdict(), "reason": " ".join(str(error).split())[:300]},
            why="`transformers` would not load the smaller model.",
            fix="Change width.",
        ) from error
    return config


# --- widths ----------------------------------------------------------------------------------------------------------
def _group(config: PretrainedConfig) -> int:
    """Query heads that share a key and value head."""
    return config.num_attention_heads // config.num_key_value_heads


def _widths(width: int | Width | None, teacher: PretrainedConfig, family: Family, who: str) -> Widths:
    there = widths_of(teacher)
    asked = {"hidden_size": width} if isinstance(width, int) else {n: getattr(width, n, None) for n in Widths._fields}
    asked = {name: value for name, value in asked.items() if value is not None}
    for name, value in asked.items():
        if value > getattr(there, name):
            setting = "width" if isinstance(width, int) else f"width.{name}"
            raise MismatchError(
                f"{setting} is more than the {who} has",
                {setting: value, f"the {who} has": getattr(there, name)},
                why="A cut takes channels away and adds none.",
                fix=f"Set it to at most {getattr(there, name)}.",
            )
    if isinstance(width, int):
        return _in_proportion(width, teacher, family, who)
    widths = _with_groups(there._replace(**asked), "num_key_value_heads" in asked, teacher, who)
    if width is not None and family.divides and widths.hidden_size % widths.num_attention_heads:
        raise ConfigError(
            "the hidden size does not divide by the heads",
            {"hidden_size": widths.hidden_size, "num_attention_heads": widths.num_attention_heads},
            why=f"`transformers` loads no {teacher.model_type} of such widths, although head_dim stays as it is.",
            fix="Use a hidden size that is a multiple of the number of heads, or keep another number of heads.",
        )
    return widths


def _with_groups(widths: Widths, named: bool, teacher: PretrainedConfig, who: str) -> Widths:
    """The widths with key and value heads that fit: as many as whole groups need, or those that were ``named``."""
    group, heads = _group(teacher), widths.num_attention_heads
    if not named:
        if heads % group:
            raise ConfigError(
                "width.num_attention_heads is not a whole number of head groups",
                {"width.num_attention_heads": heads, f"the {who}'s groups": _heads_text(teacher)},
                why="Heads that share a key and value head stay or go together.",
                fix=f"Use a multiple of {group}; or name width.num_key_value_heads too, each of which then keeps an "
                "equal share of the query heads.",
            )
        return widths._replace(num_key_value_heads=heads // group)
    groups = widths.num_key_value_heads
    share, rest = divmod(heads, groups)
    if rest or share > group:
        named_heads = {"width.num_attention_heads": heads, "width.num_key_value_heads": groups}
        raise ConfigError(
            "the heads cannot be shared out among the key and value heads",
            {**named_heads, f"the {who}'s groups": _heads_text(teacher)},
            why="Each key and value head keeps as many query heads as every other, and at most those that it has.",
            fix=f"Use a multiple of {groups}, up to {groups * group}.",
        )
    return widths


def _heads_text(config: PretrainedConfig) -> str:
    return f"{config.num_key_value_heads} groups of {_group(config)} heads"


def _in_proportion(hidden_size: int, teacher: PretrainedConfig, family: Family, who: str) -> Widths:
    """All widths cut as the hidden size is."""
    there, group = widths_of(teacher), _group(teacher)

    def fits(size: int) -> bool:
        heads, rest = divmod(there.num_attention_heads * size, there.hidden_size)
        whole = not rest and not heads % group and not there.intermediate_size * size % there.hidden_size
        return whole and heads > 0 and not (family.divides and size % heads)

    if fits(hidden_size):
        return Widths(*(number * hidden_size // there.hidden_size for number in there))
    near = sorted(filter(fits, range(1, there.hidden_size)), key=lambda size: abs(size - hidden_size))
    share = hidden_size / there.hidden_size
    heads, channels = there.num_attention_heads, there.intermediate_size
    hint = f"; or take one that fits, such as {' or '.join(map(str, sorted(near[:2])))}." if near else "."
    raise ConfigError(
        f"width={hidden_size} is not a whole share of heads and MLP channels",
        {
            "hidden size": f"{hidden_size} of {there.hidden_size}",
            "heads": f"{heads * share:g} of {heads}, the {who} having {_heads_text(teacher)}",
            "MLP channels": f"{channels * share:g} of {channels}",
        },
        why="A width by itself cuts all three in the same proportion, and heads of a group stay or go together.",
        fix="Give them by name: width={hidden_size: …, num_attention_heads: …, intermediate_size: …}" + hint,
    )


# --- layers ----------------------------------------------------------------------------------------------------------
def kept_layers(rule: Layers | None, num_layers: int, who: str) -> tuple[int, ...] | None:
    """The layers that a rule keeps of so many; None where they have to be measured.

    Args:
        who: what an error calls the model.

    Raises MismatchError where the model does not have them.
    """
    if rule is None:
        return tuple(range(num_layers))
    if isinstance(rule, EveryLayer):
        setting, needed, asked = "layers.step", rule.step, f"every {rule.step}th"
    elif isinstance(rule, tuple):
        setting, needed, asked = "layers", rule[-1] + 1, f"layer {rule[-1]}"
    else:
        setting, needed = ("layers.count", rule.count) if isinstance(rule, BestLayers) else ("layers", rule)
        asked = f"{needed} layers"
    if needed > num_layers:
        raise MismatchError(
            f"{setting} asks for layers that are not there",
            {setting: asked, f"the {who} has": f"{num_layers} layers, 0 to {num_layers - 1}"},
            why="A cut takes layers away and adds none.",
            fix=f"Ask for at most {num_layers} layers; they are counted from 0.",
        )
    if isinstance(rule, EveryLayer):
        return tuple(range(rule.step - 1, num_layers, rule.step))
    if isinstance(rule, tuple):
        return rule
    return None if isinstance(rule, BestLayers) and needed < num_layers else evenly(needed, num_layers)

"""The plan of a cut: which axis of each tensor of a family is which, and what the smaller model will be, as far as
configs tell. No weights are read."""

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from stillroom.errors import ConfigError, MismatchError
from stillroom.layers import evenly
from stillroom.pruning.config import BestLayers, EveryLayer, Layers, PruningConfig, Width

Axis = Literal["vocabulary", "hidden", "heads", "groups", "mlp", "head_dim"]
"""``heads`` is query heads × head_dim, ``groups`` key and value heads × head_dim."""


@dataclass(frozen=True)
class Family:
    """A model family's tensors and modules by name; ``*`` stands for the number of a block."""

    tensors: Mapping[str, tuple[Axis, ...]]
    """The axes of each parameter."""
    norms: tuple[str, ...]
    """The norms of the residual stream, whose outputs measure the hidden channels."""
    heads: str = "model.layers.*.self_attn.o_proj"
    """The modules that read the heads."""
    mlp: str = "model.layers.*.mlp.down_proj"
    """The modules that read the MLP's channels."""
    per_layer: tuple[str, ...] = ("layer_types",)
    """Lists in the config with one entry for each layer."""
    counts_layers: tuple[str, ...] = ()
    """Numbers in the config that say how many of the first layers are of one type."""
    divides: bool = True
    """Whether the hidden size has to be a multiple of the number of heads."""
    scaled_embeddings: bool = False
    """Whether embeddings are multiplied by the root of the hidden size."""
    final_norm: str = "model.norm.weight"
    norm_offset: float = 0.0
    """A norm multiplies by this and its weight."""

    def axes(self, name: str) -> tuple[Axis, ...]:
        """The axes of the parameter of that name. Raises MismatchError where it is not described."""
        if (pattern := re.sub(r"\.layers\.\d+\.", ".layers.*.", name)) not in self.tensors:
            raise MismatchError(
                f"the tensor {name} is not described",
                {"looked for": pattern, "described": f"{len(self.tensors)} patterns"},
                why="Nobody knows which of its numbers belong to what is dropped.",
                fix="Say which axis of it is which in the family's `tensors` in stillroom/pruning/plan.py.",
            )
        return self.tensors[pattern]


BLOCK = "model.layers.*."

ATTENTION, MLP = f"{BLOCK}self_attn.", f"{BLOCK}mlp."

_LINEAR: dict[str, tuple[Axis, ...]] = {
    f"{ATTENTION}q_proj": ("heads", "hidden"),
    f"{ATTENTION}k_proj": ("groups", "hidden"),
    f"{ATTENTION}v_proj": ("groups", "hidden"),
    f"{ATTENTION}o_proj": ("hidden", "heads"),
    f"{MLP}gate_proj": ("mlp", "hidden"),
    f"{MLP}up_proj": ("mlp", "hidden"),
    f"{MLP}down_proj": ("hidden", "mlp"),
}

_LLAMA = Family(
    tensors={
        **{f"{name}.weight": axes for name, axes in _LINEAR.items()},
        **{f"{name}.bias": axes[:1] for name, axes in _LINEAR.items()},
        "model.embed_tokens.weight": ("vocabulary", "hidden"),
        f"{BLOCK}input_layernorm.weight": ("hidden",),
        f"{BLOCK}post_attention_layernorm.weight": ("hidden",),
        "model.norm.weight": ("hidden",),
        "lm_head.weight": ("vocabulary", "hidden"),
    },
    norms=(f"{BLOCK}input_layernorm", f"{BLOCK}post_attention_layernorm", "model.norm"),
)

_QWEN2 = replace(_LLAMA, counts_layers=("max_window_layers",), divides=False)

_NORMED_HEADS: dict[str, tuple[Axis, ...]] = {
    f"{ATTENTION}q_norm.weight": ("head_dim",),
    f"{ATTENTION}k_norm.weight": ("head_dim",),
}

_GEMMA = replace(_LLAMA, divides=False, scaled_embeddings=True, norm_offset=1.0)

_GEMMA2 = replace(
    _GEMMA,
    tensors={
        **_LLAMA.tensors,
        f"{BLOCK}pre_feedforward_layernorm.weight": ("hidden",),
        f"{BLOCK}post_feedforward_layernorm.weight": ("hidden",),
    },
    norms=(f"{BLOCK}input_layernorm", f"{BLOCK}pre_feedforward_layernorm", "model.norm"),
    divides=True,
)

FAMILIES: Mapping[str, Family] = {
    "llama": _LLAMA,
    "mistral": replace(_LLAMA, divides=False),
    "qwen2": _QWEN2,
    "qwen3": replace(_QWEN2, tensors={**_LLAMA.tensors, **_NORMED_HEADS}),
    "gemma": _GEMMA,
    "gemma2": _GEMMA2,
    "gemma3_text": replace(_GEMMA2, tensors={**_GEMMA2.tensors, **_NORMED_HEADS}),
}
"""Each family by the ``model_type`` of its configs."""


def describe(config: PretrainedConfig, who: str = "teacher") -> Family:
    """The family of a model. Raises MismatchError where it is not described, or its layers are not all of one shape."""
    if config.model_type not in FAMILIES:
        raise MismatchError(
            f"no smaller model can be cut out of the family {config.model_type}",
            {f"the {who}'s family": config.model_type, "described": ", ".join(FAMILIES)},
            why="Nobody has said which axis of each of its tensors is hidden, heads, groups or MLP channels.",
            fix="Describe the axes of each of its tensors in FAMILIES, in stillroom/pruning/plan.py.",
        )
    if getattr(config, "is_heterogeneous", False):
        raise MismatchError(
            f"the {who}'s layers differ in shape",
            {f"the {who}'s family": config.model_type, "per_layer_config": "given"},
            why="A cut keeps as many heads and channels in each layer.",
            fix="Use a model whose layers are all alike.",
        )
    return FAMILIES[config.model_type]


def sizes(config: PretrainedConfig) -> dict[Axis, int]:
    """Returns how long each axis is in a model of that config."""
    return {
        "vocabulary": config.vocab_size,
        "hidden": config.hidden_size,
        "heads": config.num_attention_heads * head_dim(config),
        "groups": config.num_key_value_heads * head_dim(config),
        "mlp": config.intermediate_size,
        "head_dim": head_dim(config),
    }


def head_dim(config: PretrainedConfig) -> int:
    """Channels of one head: the config's own setting, or its hidden size divided among the heads."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def described(model: PreTrainedModel, family: Family) -> Iterator[tuple[str, Tensor, tuple[Axis, ...]]]:
    """Each parameter of a model once, with its name and its axes. Raises MismatchError where one is not described,
    or is not of the shape that its axes have."""
    long = sizes(model.config)
    for name, parameter in model.named_parameters():
        axes = family.axes(name)
        expected = tuple(long[axis] for axis in axes)
        if tuple(parameter.shape) != expected:
            raise MismatchError(
                f"the tensor {name} is not as its family is described",
                {"described": f"{', '.join(axes)}: {expected}", "found": tuple(parameter.shape)},
                why="Other numbers than are meant would be dropped.",
                fix="Mend the family's `tensors` in stillroom/pruning/plan.py, or the model's config.json.",
            )
        yield name, parameter, axes


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

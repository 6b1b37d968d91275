"""Families: which axis of each tensor is which, so that a smaller model can be cut out of a bigger one."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from stillroom.errors import MismatchError

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
                fix="Say which axis of it is which in the family's `tensors` in stillroom/pruning/families.py.",
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
            fix="Describe the axes of each of its tensors in FAMILIES, in stillroom/pruning/families.py.",
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
                fix="Mend the family's `tensors` in stillroom/pruning/families.py, or the model's config.json.",
            )
        yield name, parameter, axes

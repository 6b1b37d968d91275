"""The size of a model: its parameters by part and the shapes of its layers, from the model itself on the meta device.

The model is built by `transformers` without memory, so parameters are exact for every family that it knows. The
formulas of activations and FLOPs hold for layers of attention and an MLP (or experts), in which `Layer` finds the sizes
by the kind and the shape of each module. Where a layer is something else, parameters are all that is told.
"""

import json
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import prod
from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from stillroom.errors import ConfigError
from stillroom.recipe import parse_json

Part = Literal["embeddings", "attention", "mlp", "experts", "router", "norms", "other", "head"]

MOST_LAYERS = 2000
"""A model of more layers is refused; building each takes some milliseconds."""


@dataclass(frozen=True)
class Weight:
    """One parameter of a model. Tied ones are one parameter, and count as embeddings."""

    shape: tuple[int, ...]
    part: Part
    matmul: float = 0.0
    """Entries that a token is multiplied with. Looking up an embedding is no product; of experts these are the entries
    of as many as a token is sent to."""
    linear: bool = False
    """It is the matrix of a linear layer (not of the head) and can have a low-rank adapter."""
    layer: int | None = None

    @property
    def count(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class Layer:
    """The shape of a layer of attention and an MLP: all that its activations and FLOPs follow from."""

    hidden_size: int
    num_heads: int
    query_size: int
    """Channels of all query heads."""
    key_size: int
    """Channels of all key heads, or of all value heads."""
    norms: int
    """Norms over the hidden channels."""
    layer_norms: bool
    """These are LayerNorms and not RMSNorms."""
    head_norms: bool
    """Queries and keys are normalized."""
    fused_qkv: bool
    """Queries, keys and values are one product, which is kept as a whole."""
    rotary: bool
    """Positions are rotated in, not learned."""
    capped: bool
    """Attention scores are capped, so that matrices of length by length are kept."""
    attention_dropout: bool
    """Attention has dropout, so that matrices of length by length are kept."""
    dropouts: int
    """Masks over the hidden channels that are kept of dropout."""
    mlp_inputs: int
    """Matrices that read the MLP's input: 2 with a gate, 1 without one or where both are one product."""
    mlp_tensors: int
    """Tensors of the MLP's channels that are kept for the backward pass."""
    intermediate_size: int = 0
    """Channels of a dense MLP."""
    experts_per_token: int = 0
    expert_size: int = 0
    """Channels of an expert."""
    shared_size: int = 0
    """Channels of the expert that all tokens go through."""

    @property
    def squares(self) -> int:
        """Matrices of length by length that each head keeps for the backward pass."""
        return 3 if self.attention_dropout else 2 * self.capped


@dataclass(frozen=True)
class ModelSize:
    """What a run's memory and time follow from."""

    family: str
    vocab_size: int
    hidden_size: int
    weights: Mapping[str, Weight]
    """By the name of the parameter."""
    layers: tuple[Layer | None, ...]
    """None for a layer that is not attention and an MLP."""
    head: str
    """The name of the head's weight; the name of the embeddings where both are one matrix."""

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def tied(self) -> bool:
        return self.weights[self.head].part == "embeddings"

    @cached_property
    def parts(self) -> Counter[Part]:
        """Numbers of parameters by part."""
        found: Counter[Part] = Counter()
        for weight in self.weights.values():
            found[weight.part] += weight.count
        return found

    @property
    def total(self) -> int:
        return self.parts.total()

    @cached_property
    def active(self) -> int:
        """Parameters that a token meets: of the experts only as many as it is sent to."""
        idle = sum(w.count - w.matmul for w in self.weights.values() if w.part == "experts" and len(w.shape) == 3)
        return self.total - int(idle)

    @property
    def head_entries(self) -> int:
        return self.weights[self.head].count

    @cached_property
    def matmul_entries(self) -> float:
        """Entries of the matrices that a token is multiplied with, the head among them, tied or not."""
        return self.head_entries + sum(weight.matmul for weight in self.weights.values())

    @cached_property
    def layer_parameters(self) -> int:
        """Parameters of the largest layer."""
        found: Counter[int] = Counter()
        for weight in self.weights.values():
            if weight.layer is not None:
                found[weight.layer] += weight.count
        return max(found.values(), default=0)

    @cached_property
    def shapes(self) -> Counter[Layer]:
        """How many layers have each shape.

        Raises:
            ConfigError: a layer is not attention and an MLP, so that no formula of activations or FLOPs holds for it.
        """
        known = [layer for layer in self.layers if layer is not None]
        if len(known) < self.num_layers or not known:
            raise ConfigError(
                f"memory and time of a {self.family} are not known",
                {"layers": self.num_layers, "of attention and an MLP": len(known), "parameters": f"{self.total:,}"},
                why="Activations and FLOPs are counted by formulas of attention and MLPs; others would be guessed.",
                fix="Make a short run and read peak_memory_bytes and tokens a second in its run.json.",
            )
        return Counter(known)

    def frozen(self, patterns: Collection[str], *, adapters: bool) -> frozenset[str]:
        """The names of the parameters that are not trained: those that match a pattern; all beside adapters."""
        from fnmatch import fnmatchcase

        return frozenset(n for n in self.weights if adapters or any(fnmatchcase(n, pattern) for pattern in patterns))

    def adapter_parameters(self, rank: int, targets: Collection[str] | str = "all-linear") -> int:
        """Parameters of low-rank adapters: rank · (inputs + outputs) of each layer that has one.

        Raises:
            ConfigError: a target is no linear layer.
        """
        linear = {name.removesuffix(".weight"): sum(w.shape) for name, w in self.weights.items() if w.linear}
        if isinstance(targets, str):
            return rank * sum(linear.values())
        for target in targets:
            if not any(f".{name}".endswith(f".{target}") for name in linear):
                raise ConfigError(
                    f"adapters beside `{target}` are not counted",
                    {
                        "student.lora.targets": target,
                        f"linear layers of a {self.family}": ", ".join(sorted({n.rpartition(".")[2] for n in linear})),
                    },
                    why="Their size follows from the inputs and outputs of the layer.",
                    fix="Name linear layers of the blocks, or all-linear.",
                )
        return rank * sum(
            size for name, size in linear.items() if any(f".{name}".endswith(f".{target}") for target in targets)
        )


def model_size(config: PretrainedConfig | Mapping[str, Any], who: str = "the model") -> ModelSize:
    """The size of the model that `transformers` builds of a config, of which nothing is allocated.

    Args:
        who: what an error calls the model.

    Raises:
        ConfigError: `transformers` does not know the family or cannot build the model without code of its own.
    """
    values = dict(config) if isinstance(config, Mapping) else config.to_dict()
    values.pop("quantization_config", None)  # shapes are those of the weights before they were packed
    try:
        return _model_size(json.dumps(values, sort_keys=True, default=str))
    except Exception as error:
        raise ConfigError(
            f"the size of {who} is not known",
            {"model_type": values.get("model_type", "missing"), "reason": " ".join(str(error).split())[:300]},
            why="Its parameters are counted in the model that `transformers` builds; nothing is guessed instead. Code "
            "that a model brings itself is not run for a plan.",
            fix="Check its config.json; or plan with a model of the same sizes that `transformers` knows.",
        ) from error


@lru_cache(maxsize=64)
def _model_size(values: str) -> ModelSize:
    config = AutoConfig.for_model(**parse_json(values))
    text = config.get_text_config()
    if not 0 < text.num_hidden_layers <= MOST_LAYERS:
        raise ValueError(f"num_hidden_layers is {text.num_hidden_layers}")
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    output, embeddings = model.get_output_embeddings(), model.get_input_embeddings().weight
    list_name, blocks = next(
        ((name, module) for name, module in model.named_modules()
         if isinstance(module, torch.nn.ModuleList) and len(module) == text.num_hidden_layers), ("", [])
    )  # fmt: skip
    rotary = any("rotary" in name for name, _ in model.named_modules())
    weights = {}
    for name, module in model.named_modules():
        inside = name.removeprefix(f"{list_name}.") if blocks and name.startswith(f"{list_name}.") else None
        number, _, path = (inside or "").partition(".")
        for own, parameter in module.named_parameters(recurse=False):
            if module is output and parameter is not embeddings:
                weight = Weight(tuple(parameter.shape), "head")
            else:
                weight = _weight(module, path, parameter, text, int(number) if number else None)
            weights.setdefault(id(parameter), (f"{name}.{own}".lstrip("."), weight))
    return ModelSize(
        family=config.model_type,
        vocab_size=text.vocab_size,
        hidden_size=text.hidden_size,
        weights=dict(weights.values()),
        layers=tuple(_layer(block, text, rotary) for block in blocks),
        head=weights[id(output.weight)][0],
    )


# --- modules ---------------------------------------------------------------------------------------------------------
def _is_norm(module: Any) -> bool:
    return "norm" in type(module).__name__.lower()


def _linear_sizes(module: Any) -> tuple[int, int] | None:
    """Inputs and outputs of a linear layer; None for other modules."""
    if type(module).__name__ == "Conv1D":  # GPT-2's, whose matrix is transposed
        return module.weight.shape[0], module.weight.shape[1]
    return (module.in_features, module.out_features) if hasattr(module, "in_features") else None


def _setting(config: Any, *names: str) -> Any:
    """The first of these settings that a config has and that is not null or 0."""
    return next((value for name in names if (value := getattr(config, name, None))), None)


def _num_experts(config: Any) -> int:
    return _setting(config, "num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts") or 0


def _experts_per_token(config: Any) -> int | None:
    return _setting(config, "num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_topk", "moe_k")


def _in_attention(path: str) -> bool:
    return "attn" in path.partition(".")[0] or "attention" in path.partition(".")[0]


def _in_mlp(path: str) -> bool:
    return any(word in path.partition(".")[0].lower() for word in ("mlp", "feed_forward", "ffn", "moe", "fc1", "fc2"))


def _is_experts(parameter: Any, num_experts: int) -> bool:
    """Whether a parameter holds a matrix of each expert."""
    return num_experts > 0 and parameter.ndim == 3 and len(parameter) == num_experts


def _weight(module: Any, path: str, parameter: Any, config: Any, layer: int | None) -> Weight:
    """A parameter of a module at a path within its block."""
    shape, linear = tuple(parameter.shape), _linear_sizes(module) is not None and parameter.ndim == 2
    matmul = float(parameter.numel()) if linear else 0.0
    part: Part = "other"
    if "Embedding" in type(module).__name__:
        part = "embeddings"
    elif _is_norm(module):
        part = "norms"
    elif _in_attention(path):
        part = "attention"
    elif _in_mlp(path):
        part, experts = "mlp", _num_experts(config)
        if any(_is_experts(p, experts) for p in module.parameters(recurse=False)):
            part = "experts"
            share = (_experts_per_token(config) or experts) / experts
            matmul = parameter.numel() * share if parameter.ndim == 3 else 0.0
        elif experts and parameter.ndim == 2 and len(parameter) == experts:
            part, matmul = "router", float(parameter.numel())
    return Weight(shape, part, matmul, linear, layer)


def _layer(block: Any, config: Any, rotary: bool) -> Layer | None:
    """The shape of a block; None where it is not attention and an MLP, or has matrices besides."""
    heads, h, num_experts = _setting(config, "num_attention_heads") or 0, config.hidden_size, _num_experts(config)
    attention, mlp, experts, norms, dropouts, head_norms = [], [], [], [], 0, False
    for path, module in block.named_modules():
        own = list(module.parameters(recurse=False))
        if _is_norm(module):
            if "." in path and _in_attention(path):
                head_norms = True
            else:
                norms.append(type(module).__name__)
        elif type(module).__name__ == "Dropout":
            dropouts += module.p > 0 and not path.endswith(("attn_dropout", "attention_dropout"))
        elif (sizes := _linear_sizes(module)) is not None and _in_attention(path):
            attention.append(sizes)
        elif sizes is not None and _in_mlp(path):
            mlp += [sizes] if sizes[1] not in (1, num_experts) else []  # a gate of a shared expert, and a router
        elif found := [p.numel() // (num_experts * h) for p in own if _is_experts(p, num_experts) and _in_mlp(path)]:
            experts += found
        elif sizes is not None or any(p.numel() > max(heads, num_experts * h * _in_mlp(path)) for p in own):
            return None
    if len(attention) not in (2, 4) or (len(mlp) not in (2, 3) and not (experts and not mlp)):
        return None
    for matrices in (attention, mlp):  # what writes to the residual stream goes last
        matrices.sort(key=lambda sizes: (sizes[1] == h, sizes[0] != h))
    query = attention[-1][0]
    key, odd = divmod(sum(outputs for _, outputs in attention[:-1]) - query, 2)
    inner, wide = (mlp[-1][0], sum(outputs for _, outputs in mlp[:-1])) if mlp else (0, 0)
    gated = wide == 2 * inner
    if not heads or odd or query % heads or not 0 < key <= query or query % key or wide not in (inner, 2 * inner):
        return None
    found = {"intermediate_size": inner}
    if experts:
        per_token = _experts_per_token(config)
        if per_token is None or len(experts) != 2 or max(experts) != 2 * min(experts) or not gated:
            return None
        found = {"experts_per_token": per_token, "expert_size": min(experts), "shared_size": inner}
    composed = any(type(module).__name__ == "NewGELUActivation" for module in block.modules())
    return Layer(
        hidden_size=h,
        num_heads=heads,
        query_size=query,
        key_size=key,
        norms=len(norms),
        layer_norms="LayerNorm" in norms,
        head_norms=head_norms,
        fused_qkv=len(attention) == 2,
        rotary=rotary,
        capped=_setting(config, "attn_logit_softcapping") is not None,
        attention_dropout=bool(_setting(config, "attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")),
        dropouts=dropouts,
        mlp_inputs=2 if gated and len(mlp) != 2 else 1,
        mlp_tensors=4 if gated else 5 if composed else 2,
        **found,
    )

"""Architecture: the shape of a model as its config.json tells it, and its parameters by part."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from stillroom.errors import ConfigError
from stillroom.estimates.families import BIASED_BY_DEFAULT, FAMILIES, ArchitectureFamily, Biased

LARGEST = {"vocab_size": 10**8, "num_hidden_layers": 10**4}
"""Sizes beyond these are no model's; of all others 10⁷."""


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters by part. A head that is one matrix with the embeddings counts there alone."""

    embeddings: int = 0
    attention: int = 0
    mlp: int = 0
    """Dense ones, and the expert that all tokens go through."""
    experts: int = 0
    router: int = 0
    norms: int = 0
    head: int = 0

    @property
    def total(self) -> int:
        return sum(getattr(self, part.name) for part in fields(self))


@dataclass(frozen=True)
class Architecture:
    """The sizes of a model, all of which its config.json or its family tells."""

    family: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    """Channels of a dense MLP."""
    tied: bool
    """Head and embeddings are one matrix."""
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    num_positions: int = 0
    """Learned positions; 0 where they are rotated in."""
    num_sparse_layers: int = 0
    """Layers that have experts in the place of a dense MLP."""
    num_experts: int = 0
    experts_per_token: int = 0
    expert_size: int = 0
    """Channels of an expert."""
    shared_size: int = 0
    """Channels of the expert that all tokens go through."""

    @property
    def kind(self) -> ArchitectureFamily:
        """What its family has in common."""
        return FAMILIES[self.family]

    @property
    def query_size(self) -> int:
        """Channels of all query heads."""
        return self.num_heads * self.head_dim

    @property
    def key_size(self) -> int:
        """Channels of all key heads, or of all value heads."""
        return self.num_kv_heads * self.head_dim

    @property
    def mlp_matrices(self) -> int:
        return 3 if self.kind.gated else 2

    @property
    def attention_matmul(self) -> int:
        """Entries of the attention's matrices in one layer."""
        return self.hidden_size * (2 * self.query_size + 2 * self.key_size)

    @property
    def parameters(self) -> Parameters:
        return self._parameters(self.num_experts)

    @property
    def active(self) -> Parameters:
        """Those that one token meets: of the experts only as many as it is sent to."""
        return self._parameters(self.experts_per_token)

    @property
    def matmul_parameters(self) -> int:
        """Entries of the matrices that one token is multiplied with. The head is one, tied or not; looking up an
        embedding is not a product."""
        return self.num_layers * self.layer_matmul_parameters + self.head_matmul_parameters

    @property
    def layer_matmul_parameters(self) -> int:
        """The same of a layer, the mean where some have experts; rounded down."""
        h, matrices = self.hidden_size, self.mlp_matrices
        dense = (self.num_layers - self.num_sparse_layers) * matrices * h * self.intermediate_size
        shared = matrices * h * self.shared_size + (h if self.shared_size else 0)
        sparse = matrices * h * self.expert_size * self.experts_per_token + h * self.num_experts + shared
        return self.attention_matmul + (dense + self.num_sparse_layers * sparse) // self.num_layers

    @property
    def head_matmul_parameters(self) -> int:
        return self.vocab_size * self.hidden_size

    @property
    def layer_parameters(self) -> int:
        """Parameters of the largest layer."""
        h = self.hidden_size
        shared = self._mlp(self.shared_size) + h if self.shared_size else 0
        sparse = self.num_experts * (self._mlp(self.expert_size) + h) + shared if self.num_sparse_layers else 0
        dense = self._mlp(self.intermediate_size) if self.num_sparse_layers < self.num_layers else 0
        return self.attention_matmul + max(sparse, dense) + self.kind.norms * h

    def _parameters(self, experts: int) -> Parameters:
        h, n, family = self.hidden_size, self.num_layers, self.kind
        attention = self.attention_matmul
        attention += self.qkv_bias * (self.query_size + 2 * self.key_size) + self.output_bias * h
        norm = h * (2 if family.layer_norms else 1)
        norms = n * (family.norms * norm + 2 * self.head_dim * family.head_norms) + norm
        sparse = self.num_sparse_layers
        shared = self._mlp(self.shared_size) + h if self.shared_size else 0
        return Parameters(
            embeddings=(self.vocab_size + self.num_positions) * h,
            attention=n * attention,
            mlp=(n - sparse) * self._mlp(self.intermediate_size) + sparse * shared,
            experts=sparse * experts * self._mlp(self.expert_size),
            router=sparse * self.num_experts * h,
            norms=norms,
            head=0 if self.tied else self.head_matmul_parameters,
        )

    def _mlp(self, size: int) -> int:
        """Parameters of one MLP of so many channels."""
        matrices = self.mlp_matrices
        return matrices * self.hidden_size * size + self.mlp_bias * ((matrices - 1) * size + self.hidden_size)


def read_architecture(config: Mapping[str, Any], whose: str = "the model") -> Architecture:
    """The architecture that the values of a config.json describe.

    Args:
        whose: what an error calls the model.

    Raises:
        ConfigError: the family is not known, keys are missing, or a size is none.
    """
    name, family = _family_of(config, whose)
    sizes = _Sizes(config, family, whose)
    heads = sizes.required("num_attention_heads")
    hidden, layers = sizes.required("hidden_size"), sizes.required("num_hidden_layers")
    kv_heads = sizes.optional("num_key_value_heads", heads if family.every_head_has_keys else None)
    head_dim = sizes.optional("head_dim", family.head_dim or hidden // max(1, heads))
    vocab_size = sizes.required("vocab_size")
    inner = _inner_sizes(sizes, name, hidden, layers)
    sizes.check()
    found = Architecture(
        family=name,
        vocab_size=vocab_size,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        tied=_flag(config, "tie_word_embeddings", family.tied),
        qkv_bias=_biased(config, family.qkv_bias),
        output_bias=_biased(config, family.output_bias),
        mlp_bias=_biased(config, family.mlp_bias),
        **inner,
    )
    _check_shares(found, whose)
    return found


def _family_of(config: Mapping[str, Any], whose: str) -> tuple[str, ArchitectureFamily]:
    name = config.get("model_type")
    if isinstance(name, str) and name in FAMILIES:
        return name, FAMILIES[name]
    near = difflib.get_close_matches(str(name), FAMILIES, n=1)
    raise ConfigError(
        f"the architecture of {whose} is not known"
        if name is not None
        else f"the config of {whose} does not name its architecture",
        {
            "model_type": name if name is not None else "missing",
            **({"did you mean": near[0]} if near else {}),
            "known": ", ".join(FAMILIES),
        },
        why="Which matrices a model has follows from its family; for others nothing is counted rather than guessed.",
        fix="Plan with a model of a known family and the same sizes, and take its figures as those of a neighbour.",
    )


def _inner_sizes(sizes: "_Sizes", name: str, hidden: int, layers: int) -> dict[str, int]:
    """Sizes of MLPs, experts and learned positions, of those that the family has."""
    family = sizes.family
    sparse = _sparse_layers(sizes.config, layers) if family.experts else 0
    found = {
        "intermediate_size": _intermediate(sizes, name, hidden) if sparse < layers else 0,
        "num_positions": sizes.required("max_position_embeddings") if family.learned_positions else 0,
    }
    if not sparse:
        return found
    return {
        **found,
        "num_sparse_layers": sparse,
        "num_experts": sizes.either("num_experts", "num_local_experts"),
        "experts_per_token": sizes.required("num_experts_per_tok"),
        "expert_size": sizes.required("intermediate_size" if name == "mixtral" else "moe_intermediate_size"),
        "shared_size": sizes.required("shared_expert_intermediate_size") if family.shared_expert else 0,
    }


def _intermediate(sizes: "_Sizes", name: str, hidden: int) -> int:
    if name == "gpt2":
        return sizes.optional("intermediate_size", 4 * hidden)
    return sizes.required("intermediate_size")


def _sparse_layers(config: Mapping[str, Any], layers: int) -> int:
    """How many layers have experts: all, but for those that qwen's mixtures make dense."""
    dense, step = config.get("mlp_only_layers") or (), config.get("decoder_sparse_step", 1)
    if not isinstance(step, int) or step < 1:
        return 0
    return sum((i + 1) % step == 0 and i not in dense for i in range(layers))


def _flag(config: Mapping[str, Any], key: str, default: bool) -> bool:
    value = config.get(key)
    return default if value is None else bool(value)


def _biased(config: Mapping[str, Any], key: Biased) -> bool:
    return key if isinstance(key, bool) else _flag(config, key, key in BIASED_BY_DEFAULT)


def _check_shares(found: Architecture, whose: str) -> None:
    for what, (many, few) in {
        "num_attention_heads and num_key_value_heads": (found.num_heads, found.num_kv_heads),
        "num_experts and num_experts_per_tok": (found.num_experts, found.experts_per_token),
    }.items():
        wrong = many % few if "heads" in what else few > many
        if wrong:
            raise ConfigError(
                f"the config of {whose} contradicts itself",
                {what: f"{many} and {few}"},
                why="No such model can be built, so nothing can be said of it.",
                fix="Check the config.json.",
            )


class _Sizes:
    """Reads sizes by their usual names, and remembers those that are missing or that no model has."""

    def __init__(self, config: Mapping[str, Any], family: ArchitectureFamily, whose: str) -> None:
        self.config, self.family, self.whose = config, family, whose
        self.missing: list[str] = []
        self.wrong: dict[str, object] = {}

    def required(self, key: str) -> int:
        return self.optional(key, None)

    def either(self, key: str, other: str) -> int:
        return self.required(key if self.config.get(key) is not None else other)

    def optional(self, key: str, default: int | None) -> int:
        """The size; 1 where it is missing or wrong, until ``check`` says so."""
        own = self.family.names.get(key, key)
        value = self.config.get(own)
        if value is None and own != key:
            own, value = (key, self.config[key]) if self.config.get(key) is not None else (own, None)
        if value is None:
            if default is None:
                self.missing.append(own)
            return 1 if default is None else default
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= LARGEST.get(key, 10**7):
            self.wrong[own] = value
            return 1
        return value

    def check(self) -> None:
        if self.missing:
            raise ConfigError(
                f"the config of {self.whose} lacks sizes",
                {"model_type": self.config["model_type"], "missing": ", ".join(dict.fromkeys(self.missing))},
                why="Without them its parameters cannot be counted, and a default would be another model's.",
                fix="Use the model's whole config.json.",
            )
        if self.wrong:
            raise ConfigError(
                f"the config of {self.whose} holds sizes that no model has",
                {key: repr(value) for key, value in self.wrong.items()},
                why="Each size is a whole number above 0, and below what any model has reached.",
                fix="Check the config.json.",
            )

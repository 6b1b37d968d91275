"""What of each family of models its config.json leaves unsaid, and the names under which it says the rest."""

from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

Biased = bool | Literal["attention_bias", "mlp_bias", "qkv_bias"]
"""Whether a matrix has a bias; or the key of config.json that says so."""


@dataclass(frozen=True)
class ArchitectureFamily:
    """A decoder of blocks: attention and an MLP (or experts), with norms. What a key means and what it is where it is
    left out is as `transformers` has it."""

    norms: int = 2
    """Norms over the hidden channels in a block."""
    head_norms: bool = False
    """A norm over the channels of each query head and one over those of each key head, shared by the heads."""
    gated: bool = True
    """The MLP has a gate: three matrices and not two."""
    layer_norms: bool = False
    """Norms have a bias besides their weight."""
    learned_positions: bool = False
    qkv_bias: Biased = False
    output_bias: Biased = False
    mlp_bias: Biased = False
    tied: bool = False
    """Head and embeddings are one matrix, where `tie_word_embeddings` is left out."""
    head_dim: int | None = None
    """Channels of a head where `head_dim` is left out; None is hidden_size / num_attention_heads."""
    experts: bool = False
    shared_expert: bool = False
    """Besides its experts a block has one that all tokens go through, with a gate of its own."""
    every_head_has_keys: bool = False
    """As many key and value heads as query heads, where their number is left out."""
    squares: int = 0
    """Matrices of length by length that each head keeps for the backward pass: 0 with fused attention; 2 where it is
    capped; 3 with dropout."""
    dropouts: int = 0
    """Masks over the hidden channels that a layer keeps of its dropout."""
    fused_matrices: bool = False
    """Queries, keys and values are one product, which is kept as a whole; so are the MLP's first two."""
    mlp_tensors: int = 4
    """Tensors of the MLP's channels that are kept for the backward pass."""
    names: MappingProxyType[str, str] = field(default_factory=lambda: MappingProxyType({}))
    """Its own names for keys that others call otherwise."""


FAMILIES = {
    "llama": ArchitectureFamily(
        qkv_bias="attention_bias", output_bias="attention_bias", mlp_bias="mlp_bias", every_head_has_keys=True
    ),
    "mistral": ArchitectureFamily(),
    "qwen2": ArchitectureFamily(qkv_bias=True),
    "qwen3": ArchitectureFamily(qkv_bias="attention_bias", output_bias="attention_bias", head_norms=True, head_dim=128),
    "gemma": ArchitectureFamily(qkv_bias="attention_bias", output_bias="attention_bias", tied=True, head_dim=256),
    "gemma2": ArchitectureFamily(
        qkv_bias="attention_bias", output_bias="attention_bias", tied=True, head_dim=256, norms=4, squares=2
    ),
    "gemma3_text": ArchitectureFamily(
        qkv_bias="attention_bias", output_bias="attention_bias", tied=True, head_dim=256, norms=4, head_norms=True
    ),
    "phi3": ArchitectureFamily(every_head_has_keys=True, fused_matrices=True),
    "mixtral": ArchitectureFamily(experts=True, names=MappingProxyType({"num_experts": "num_local_experts"})),
    "qwen2_moe": ArchitectureFamily(experts=True, shared_expert=True, qkv_bias="qkv_bias"),
    "qwen3_moe": ArchitectureFamily(
        experts=True, qkv_bias="attention_bias", output_bias="attention_bias", head_norms=True, head_dim=128
    ),
    "gpt2": ArchitectureFamily(
        gated=False,
        layer_norms=True,
        learned_positions=True,
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        tied=True,
        every_head_has_keys=True,
        squares=3,
        dropouts=2,
        fused_matrices=True,
        mlp_tensors=5,
        names=MappingProxyType(
            {
                "hidden_size": "n_embd",
                "num_hidden_layers": "n_layer",
                "num_attention_heads": "n_head",
                "intermediate_size": "n_inner",
                "max_position_embeddings": "n_positions",
            }
        ),
    ),
}
"""By `model_type`."""

BIASED_BY_DEFAULT = ("qkv_bias",)
"""Keys of biases that are true where they are left out."""

"""Architectures: exact numbers of parameters, of published models and of every family that `transformers` builds."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from published import LLAMA, PUBLISHED, sizes
from stillroom.errors import ConfigError
from stillroom.estimates.architecture import read_architecture
from stillroom.estimates.families import FAMILIES

TINY = {"vocab_size": 96, **sizes(24, 40, 3, 4, 2)}
OWN = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "qwen3": {"head_dim": 8},
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8},
    "gemma3_text": {"head_dim": 8, "attention_bias": True},
    "phi3": {"pad_token_id": 0},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "shared_expert_intermediate_size": 20,
        "decoder_sparse_step": 2,
    },
    "qwen3_moe": {
        "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "head_dim": 8, "mlp_only_layers": [1],
    },
    "gpt2": {"n_embd": 24, "n_layer": 3, "n_head": 4, "n_positions": 32},
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_totals(name):
    config, total = PUBLISHED[name]
    assert read_architecture(config).parameters.total == total


def test_a_mixture_counts_the_experts_that_a_token_meets():
    mixtral = read_architecture(PUBLISHED["Mixtral 8x7B"][0])
    assert mixtral.active.total == 12_879_925_248  # "12.9B active", arXiv 2401.04088
    assert mixtral.matmul_parameters == mixtral.active.total - mixtral.active.norms - mixtral.active.embeddings


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_counts_what_transformers_builds(family):
    sizes = {"vocab_size": 96} if family == "gpt2" else TINY
    config = AutoConfig.for_model(family, **sizes, **OWN.get(family, {}))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    found = read_architecture(config.to_dict())
    assert found.parameters.total == sum(p.numel() for p in model.parameters())
    assert found.tied == config.tie_word_embeddings


def test_a_tied_head_is_counted_once_and_multiplied_all_the_same():
    config, _ = PUBLISHED["Llama 3.1 8B"]
    tied, untied = (read_architecture({**config, "tie_word_embeddings": tied}) for tied in (True, False))
    assert untied.parameters.total - tied.parameters.total == untied.parameters.head == 128256 * 4096
    assert tied.matmul_parameters == untied.matmul_parameters


WRONG = {
    "unknown": ({"model_type": "lama"}, "did you mean: llama"),
    "unnamed": ({"hidden_size": 8}, "model_type: missing"),
    "missing": ({**LLAMA, "hidden_size": 8}, "num_attention_heads, num_hidden_layers, intermediate_size"),
    "zero": ({**LLAMA, **sizes(0, 8, 2, 8)}, "hidden_size: 0"),
    "absurd": ({**LLAMA, **sizes(8, 8, 10**6, 8)}, "num_hidden_layers: 1000000"),
    "text": ({**LLAMA, **sizes(8, 8, 2, 8), "vocab_size": "many"}, "vocab_size: 'many'"),
    "heads": ({**LLAMA, **sizes(8, 8, 2, 12)}, "num_attention_heads and num_key_value_heads: 12 and 8"),
    "no kv heads": ({"model_type": "mistral", "vocab_size": 9, **sizes(8, 8, 2, 2)}, "missing: num_key_value_heads"),
    "gpt2's own names": ({"model_type": "gpt2"}, "n_head, n_embd, n_layer, vocab_size, n_positions"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_architecture_is_told_and_never_guessed(name):
    config, message = WRONG[name]
    with pytest.raises(ConfigError) as caught:
        read_architecture(config, "the student")
    assert message in str(caught.value)

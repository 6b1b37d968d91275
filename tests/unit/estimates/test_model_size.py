"""Sizes of models: exact numbers of parameters, of published models and of families that `transformers` builds."""

import peft
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from published import LLAMA, PUBLISHED, sizes
from stillroom.errors import ConfigError
from stillroom.estimates.model_size import model_size

TINY = {"vocab_size": 96, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0, **sizes(24, 40, 3, 4, 2)}
EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
OWN = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8},
    "gemma3_text": {"head_dim": 8, "attention_bias": True},
    "phi3": {},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 20, "decoder_sparse_step": 2},
    "qwen3_moe": {**EXPERTS, "head_dim": 8, "mlp_only_layers": [1]},
    "gpt2": {"n_embd": 24, "n_layer": 3, "n_head": 4, "n_positions": 32},
    "olmo2": {},
    "granite": {},
    "gpt_neox": {},
    "starcoder2": {},
    "opt": {"word_embed_proj_dim": 24, "ffn_dim": 40},
    "phi": {},
    "cohere": {},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
}
UNLIKE = {
    "mamba": {}, "recurrent_gemma": {}, "rwkv": {"attention_hidden_size": 24}, "deepseek_v3": {"n_routed_experts": 8},
}  # fmt: skip
"""Families with layers that are not attention and an MLP, or attention of another kind."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_totals(name):
    config, total = PUBLISHED[name]
    assert model_size(config).total == total


def test_a_mixture_counts_the_experts_that_a_token_meets():
    mixtral = model_size(PUBLISHED["Mixtral 8x7B"][0])
    assert mixtral.active == 12_879_925_248  # "12.9B active", arXiv 2401.04088
    assert mixtral.matmul_entries == mixtral.active - mixtral.parts["norms"] - mixtral.parts["embeddings"]


def built(family):
    config = AutoConfig.for_model(family, **({} if family == "gpt2" else TINY), **{**OWN, **UNLIKE}[family])
    with torch.device("meta"):
        return config, AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("family", [*OWN, *UNLIKE])
def test_every_family_counts_what_transformers_builds(family):
    config, model = built(family)
    found = model_size(config)
    assert found.total == sum(p.numel() for p in model.parameters())
    assert {name: weight.count for name, weight in found.weights.items()} == {
        name: p.numel() for name, p in model.named_parameters()
    }
    assert found.tied == config.tie_word_embeddings
    if family in UNLIKE:
        with pytest.raises(ConfigError, match=f"memory and time of a {family} are not known"):
            assert found.shapes
    else:
        assert not found.parts["other"]
        assert sum(found.shapes.values()) == config.num_hidden_layers


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:fan_in_fan_out")
@pytest.mark.parametrize("family", ["qwen2", "phi3", "gpt2", "gpt_neox", "qwen2_moe"])
def test_adapters_are_those_of_peft(family):
    config, model = built(family)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=3, target_modules="all-linear", task_type="CAUSAL_LM"))
    wanted = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert model_size(config).adapter_parameters(3) == wanted


def test_what_matches_a_pattern_is_frozen():
    size = model_size(PUBLISHED["Qwen2 7B"][0])
    names = size.frozen(["*embed_tokens*", "model.layers.0.*"], adapters=False)
    assert len(names) == 1 + 12
    assert size.head not in names
    assert size.frozen([], adapters=True) == frozenset(size.weights)


def test_a_tied_head_is_counted_once_and_multiplied_all_the_same():
    config, _ = PUBLISHED["Llama 3.1 8B"]
    tied, untied = (model_size({**config, "tie_word_embeddings": tied}) for tied in (True, False))
    assert untied.total - tied.total == untied.parts["head"] == 128256 * 4096
    assert tied.matmul_entries == untied.matmul_entries


WRONG = {
    "unknown": ({"model_type": "lama"}, "model_type: lama"),
    "unnamed": ({"hidden_size": 8}, "model_type: missing"),
    "code of its own": ({"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}, "is not run for a plan"),
    "zero": ({**LLAMA, **sizes(0, 8, 2, 8)}, "reason"),
    "absurd": ({**LLAMA, **sizes(8, 8, 10**6, 8)}, "num_hidden_layers is 1000000"),
    "text": ({**LLAMA, **sizes(8, 8, 2, 8), "vocab_size": "many"}, "vocab_size"),
    "heads": ({**LLAMA, **sizes(8, 8, 2, 12)}, "hidden size (8)"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_built_is_told_and_never_guessed(name):
    config, message = WRONG[name]
    with pytest.raises(ConfigError, match="the size of the student is not known") as caught:
        model_size(config, "the student")
    assert message in str(caught.value)

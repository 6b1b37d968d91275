"""Models read and written part by part are those that `transformers` reads and writes."""

from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DeepseekV3Config, LlamaConfig

from stillroom.models import loading, safetensors_io
from stillroom.models.safetensors_io import materialize

SIZES: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2}
LLAMA = LlamaConfig(**SIZES, num_hidden_layers=2, vocab_size=40, pad_token_id=0)
MIXTURE = DeepseekV3Config(
    **SIZES, num_hidden_layers=2, vocab_size=40, moe_intermediate_size=8, n_routed_experts=4, n_group=2, topk_group=1,
    num_experts_per_tok=2, first_k_dense_replace=1, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, v_head_dim=8,
    qk_nope_head_dim=4, pad_token_id=0,
)  # fmt: skip


def empty(config) -> Any:
    """A model of which no parameter has its value yet."""
    model = loading.build_meta_model(config, dtype=torch.float32)
    materialize(model, "cpu")
    for parameter in model.parameters():
        parameter.data.fill_(torch.nan)
    return model


def test_saved_buffers_are_written_and_read(tmp_path):
    model: Any = loading.build_model(MIXTURE, seed=0)
    bias = model.model.layers[1].mlp.gate.e_score_correction_bias
    bias.copy_(torch.arange(4.0))
    safetensors_io.save_weights(model, tmp_path / "ours", writes=True)
    model.save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)

    again = empty(MIXTURE)
    safetensors_io.load_weights(again, tmp_path / "ours")
    assert torch.equal(again.model.layers[1].mlp.gate.e_score_correction_bias, bias)


def test_what_a_family_keeps_in_float32_is_not_rounded(tmp_path):
    """The bias by which a mixture routes, which transformers reads in float32 whatever the model's type."""
    model: Any = loading.build_model(MIXTURE, seed=0)
    bias = model.model.layers[1].mlp.gate.e_score_correction_bias.copy_(torch.full((4,), 1 / 3))
    safetensors_io.save_weights(model, tmp_path / "ours", writes=True, dtype=torch.bfloat16)
    safetensors_io.round_weights(model, torch.bfloat16)
    model.save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert {name: tensor.dtype for name, tensor in ours.items()} == {name: t.dtype for name, t in theirs.items()}
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert torch.equal(ours[name], bias)
    assert {tensor.dtype for key, tensor in ours.items() if key != name} == {torch.bfloat16}


def test_what_a_family_leaves_out_of_its_files_is_not_missed(tmp_path):
    """The frequencies of positions, which old files have."""
    loading.build_model(LLAMA, seed=0).save_pretrained(tmp_path)
    place = tmp_path / "model.safetensors"
    tensors = load_file(place)
    save_file({**tensors, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, place, {"format": "pt"})
    model = empty(LLAMA)
    safetensors_io.load_weights(model, tmp_path)
    assert all(torch.equal(tensors[name], parameter) for name, parameter in model.named_parameters())


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.* is deprecated:FutureWarning")  # peft's own
def test_first_values_leave_adapters_as_they_are():
    import peft

    model = empty(LLAMA)
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    adapters = {name: parameter.data.fill_(0.5) for name, parameter in model.named_parameters() if ".lora_" in name}
    assert adapters
    loading.initialize(model, seed=0)
    assert all(parameter.eq(0.5).all() for parameter in adapters.values())
    assert torch.equal(model.model.norm.weight, torch.ones(16))
    assert not model.lm_head.weight.isnan().any()

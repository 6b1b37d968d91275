"""Weights part by part: skeletons, their first values, reading and writing; in one process, which holds all parts."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from conftest import FAMILIES, build_config, build_model
from stillroom.errors import DataError
from stillroom.models import loading, safetensors_io
from stillroom.models.hidden_states import lm_head
from stillroom.models.safetensors_io import materialize, own_rows

MIXTURE: dict[str, Any] = {"num_experts": 4, "moe_intermediate_size": 8, "num_experts_per_tok": 2, "head_dim": 8}


def mixture() -> PreTrainedModel:
    """A mixture of experts, whose parameters are made of several tensors of its files."""
    shape = build_config("llama").to_dict()
    sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    config = AutoConfig.for_model("qwen3_moe", **{name: shape[name] for name in sizes}, **MIXTURE)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def hollow(model: PreTrainedModel) -> PreTrainedModel:
    """The skeleton of a model, with memory in which anything lies."""
    made = loading.build_meta_model(model.config, dtype=torch.float32)
    assert all(parameter.is_meta for parameter in made.parameters())
    materialize(made, "cpu")
    made.tie_weights()
    return made


def assert_equal(found: PreTrainedModel, wanted: PreTrainedModel) -> None:
    ours, theirs = found.state_dict(), wanted.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


@pytest.mark.parametrize("family", [*FAMILIES, "mixture"])
def test_what_is_read_and_written_part_by_part_is_what_the_library_reads_and_writes(family, tmp_path):
    model = mixture() if family == "mixture" else build_model(family, seed=3)
    model.save_pretrained(tmp_path / "whole")
    found = hollow(model)
    safetensors_io.load_weights(found, tmp_path / "whole")
    assert_equal(found, model)
    safetensors_io.save_weights(found, tmp_path / "parts", writes=True, file_bytes=2000)
    assert len(list((tmp_path / "parts").glob("model-*-of-*.safetensors"))) > 1
    assert_equal(AutoModelForCausalLM.from_pretrained(tmp_path / "parts"), model)
    for name in ("config.json", "generation_config.json"):
        ours, theirs = (json.loads((tmp_path / place / name).read_text()) for place in ("parts", "whole"))
        assert ours == theirs
    safetensors_io.save_weights(found, tmp_path / "one", writes=True)
    assert (
        load_file(tmp_path / "one" / "model.safetensors").keys()
        == load_file(tmp_path / "whole" / "model.safetensors").keys()
    )


@pytest.mark.parametrize("family", ["qwen2", "mixture"])
def test_weights_can_be_rounded_as_they_are_written(family, tmp_path):
    model = mixture() if family == "mixture" else build_model(family, seed=3)
    safetensors_io.save_weights(model, tmp_path / "parts", writes=True, dtype=torch.bfloat16, file_bytes=2000)
    assert model.dtype == torch.float32
    model.bfloat16().save_pretrained(tmp_path / "whole")
    assert_equal(AutoModelForCausalLM.from_pretrained(tmp_path / "parts", dtype="auto"), model)
    ours, theirs = (json.loads((tmp_path / place / "config.json").read_text()) for place in ("parts", "whole"))
    assert ours == theirs


def test_one_that_does_not_write_leaves_nothing(tmp_path):
    safetensors_io.save_weights(build_model(), tmp_path / "none", writes=False)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("family", list(FAMILIES))
def test_new_values_follow_from_the_seed_and_leave_none_out(family):
    config = build_config(family)
    first, again, other = (loading.build_model(config, seed=seed) for seed in (5, 5, 6))
    assert_equal(first, again)
    assert any(not torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))
    made = loading.build_meta_model(config, dtype=torch.float32)
    materialize(made, "cpu")
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.fill_(torch.nan)
    made.tie_weights()
    loading.initialize(made, 5)
    assert_equal(made, first)
    spread = first.get_input_embeddings().weight.std().item()
    assert spread == pytest.approx(getattr(config, "initializer_range", 0.02), rel=0.1)


def damaged(folder: Path, change: Any) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("model.norm.weight"), "not complete"),
        (lambda t: t.update({"model.layers.7.mlp.up_proj.weight": torch.ones(2)}), "holds more than its config.json"),
        (lambda t: t.update({"model.norm.weight": torch.ones(5)}), "another shape"),
    ],
)
def test_files_that_are_not_the_models_are_refused(change, said, tmp_path):
    model = build_model()
    model.save_pretrained(tmp_path)
    damaged(tmp_path, change)
    with pytest.raises(DataError, match=said):
        safetensors_io.load_weights(hollow(model), tmp_path)


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi", "gemma2"])
def test_a_head_is_read_without_its_model(family, tmp_path):
    model = build_model(family, seed=3)
    model.save_pretrained(tmp_path)
    made = loading.build_meta_model(model.config, dtype=torch.float32)
    found, wanted = loading.load_head(made, tmp_path, "cpu"), lm_head(model)
    assert torch.equal(found.weight, wanted.weight)
    assert (found.bias is None) == (wanted.bias is None)
    assert found.bias is None or (wanted.bias is not None and torch.equal(found.bias, wanted.bias))
    assert (found.scale, found.softcap) == (wanted.scale, wanted.softcap)
    assert sum(not parameter.is_meta for parameter in made.parameters()) <= 2


def test_a_tensor_that_is_not_sharded_is_all_here():
    assert own_rows(torch.ones(5, 2)) == slice(0, 5)

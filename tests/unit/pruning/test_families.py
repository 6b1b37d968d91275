"""Every family that is described: a cut of nothing is the model itself, bitwise, and smaller ones are what they say."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from conftest import build_batch, build_config, build_model
from stillroom.errors import MismatchError
from stillroom.models import loading
from stillroom.models.hidden_states import verify
from stillroom.pruning.config import PruningConfig, Width
from stillroom.pruning.importance import only
from stillroom.pruning.plan import FAMILIES, describe, described, plan_pruning
from stillroom.pruning.prune import PruneMask, choose_mask, prune_model

BATCH = build_batch(20, 9, 30, 14, 6)
SETTINGS: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": 8},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
    "qwen3": {"attention_bias": True, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "gemma": {"head_dim": 8},
    "gemma2": {"query_pre_attn_scalar": 16},
    "gemma3_text": {"head_dim": 8, "sliding_window": 8, "sliding_window_pattern": 3, "query_pre_attn_scalar": 16},
}


def build(family: str, **settings: Any):
    """Four layers of four heads in two groups."""
    shape = {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    return build_model(family, **{**shape, **SETTINGS[family], **settings})


def cut(model, **settings: Any):
    plan = plan_pruning(PruningConfig(**settings), model.config)
    chosen = choose_mask(plan, model, [BATCH], teacher="it")
    return plan, chosen, prune_model(model, chosen, plan)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=BATCH.tokens, position_ids=BATCH.positions, use_cache=False).logits


def test_all_are_tried():
    assert set(SETTINGS) == set(FAMILIES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_with_nothing_removed_it_is_the_same_model_bit_for_bit(family, dtype, tmp_path):
    build(family).to(dtype).save_pretrained(tmp_path)
    model = loading.load_model(str(tmp_path), dtype="auto")
    state = torch.get_rng_state()
    plan, _, same = cut(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert not plan.measured
    assert same.dtype == dtype
    before, after = model.state_dict(), same.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert same.config.to_dict() == model.config.to_dict()
    assert torch.equal(logits(same), logits(model))


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_heads_of_a_group_may_go_in_part_where_the_groups_are_named(family):
    """Of each of two groups of two query heads, one that writes nothing."""
    model = build(family)
    size = model.config.head_dim
    dead = [(0, 3), (1, 2), (0, 2), (1, 3)]
    with torch.no_grad():
        for layer, heads in zip(model.model.layers, dead, strict=True):
            for head in heads:
                layer.self_attn.o_proj.weight[:, head * size : (head + 1) * size] = 0
                layer.self_attn.q_proj.weight[head * size : (head + 1) * size] *= 0.1
    plan = plan_pruning(PruningConfig(width=Width(num_attention_heads=2, num_key_value_heads=2)), model.config)
    kept = tuple(tuple(n for n in range(4) if n not in heads) for heads in dead)
    chosen = PruneMask(tuple(range(4)), None, ((0, 1),) * 4, kept, None, {}, "it")
    smaller = prune_model(model, chosen, plan)
    assert smaller.config.num_key_value_heads == 2
    torch.testing.assert_close(logits(smaller), logits(model), rtol=1e-4, atol=1e-4)


def test_of_a_group_the_heads_that_are_used_most_are_kept():
    from stillroom.pruning.prune import _kept_heads

    used = torch.tensor([5.0, 1.0, 2.0, 3.0, 0.5, 4.0])
    plan = plan_pruning(
        PruningConfig(width=Width(num_attention_heads=4, num_key_value_heads=2)),
        build_config("llama", num_attention_heads=6, num_key_value_heads=2, hidden_size=24),
    )
    assert _kept_heads(used, plan) == ((0, 1), (0, 2, 3, 5))
    whole = plan_pruning(PruningConfig(width=Width(num_attention_heads=3)), plan.teacher)
    assert _kept_heads(used, whole) == ((0,), (0, 1, 2))  # 8 against 7.5, all of a group together


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_smaller_model_is_loaded_again_as_it_is(family, tied, tmp_path):
    model = build(family, tie_word_embeddings=tied)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    width = {"hidden_size": 12, "num_attention_heads": 2, "intermediate_size": 10}
    plan, chosen, smaller = cut(model, layers=(0, 1, 3), width=Width(**width))
    assert plan.measured
    assert {name: getattr(smaller.config, name) for name in width} == width
    assert (smaller.config.num_key_value_heads, smaller.config.num_hidden_layers) == (1, 3)
    assert all(p.shape == q.shape for (_, p, _), q in zip(
        described(smaller, plan.family), smaller.parameters(), strict=True))  # fmt: skip
    verify(smaller, "it", pack=True)
    smaller.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert torch.equal(logits(loaded), logits(smaller))
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert PruneMask.from_json(chosen.to_json()) == chosen


@pytest.mark.parametrize("layers", [(0, 1, 3), (2,), (1, 2, 3)])
@pytest.mark.parametrize("family", FAMILIES)
def test_fewer_layers_are_the_model_with_the_others_skipped(family, layers):
    model = build(family)
    whole = logits(model)
    _, _, smaller = cut(model, layers=layers)

    class Skipped(torch.nn.Module):
        def forward(self, hidden_states, *_, **__):
            return hidden_states

    with only(model, layers):
        assert torch.equal(logits(smaller), logits(model))
    assert torch.equal(logits(model), whole)
    for layer in set(range(4)) - set(layers):
        model.model.layers[layer] = Skipped()
    assert torch.equal(logits(smaller), logits(model))
    kinds = getattr(model.config, "layer_types", None)
    assert kinds is None or smaller.config.layer_types == [kinds[layer] for layer in layers]


def test_after_an_error_the_model_has_its_layers_again():
    model = build("qwen2")
    before, config = logits(model), model.config.to_dict()
    with pytest.raises(ZeroDivisionError), only(model, (1, 2)):
        raise ZeroDivisionError
    assert torch.equal(logits(model), before)
    assert model.config.to_dict() == config


@pytest.mark.parametrize(("layers", "first"), [((0, 1, 3), 2), ((0, 3), 1), ((2, 3), 0)])
def test_the_number_of_layers_before_the_first_window_goes_with_them(layers, first):
    """`layer_types` decides in `transformers`; others read `max_window_layers`."""
    config = build("qwen2").config
    assert config.layer_types == ["full_attention"] * 2 + ["sliding_attention"] * 2
    smaller = plan_pruning(PruningConfig(layers=layers), config).config
    assert smaller.max_window_layers == first
    assert smaller.layer_types == ["full_attention"] * first + ["sliding_attention"] * (len(layers) - first)


# --- what nothing reads can go --------------------------------------------------------------------------------------


@torch.no_grad()
def kill(model, channels=(), groups=(), mlp=()) -> None:
    """Makes parts of the model write nothing: hidden channels that are always 0, heads and MLP channels too."""
    size = model.config.head_dim if hasattr(model.config, "head_dim") else 4
    for name, parameter, axes in described(model, describe(model.config)):
        for dim, axis in enumerate(axes):
            places = {"hidden": channels, "mlp": mlp, "groups": [g * size + i for g in groups for i in range(size)]}
            if axis == "hidden" and "norm" in name:
                continue  # it multiplies 0
            for place in places.get(axis, ()):
                if axis != "groups" or ".v_proj." in name:
                    parameter.select(dim, place).zero_()


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_and_mlp_channels_that_are_dead_are_not_missed(family):
    model = build(family)
    kill(model, groups=(0,), mlp=(1, 4, 5, 23))
    _, chosen, smaller = cut(model, width=Width(num_attention_heads=2, intermediate_size=20))
    assert chosen.groups == ((1,),) * 4
    assert chosen.mlp == (tuple(n for n in range(24) if n not in (1, 4, 5, 23)),) * 4
    torch.testing.assert_close(logits(smaller), logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_channels_that_are_dead_are_missed_by_the_norms_alone(family, tied):
    """They divide by the root of the mean over all channels: with 12 of 16 left that is √(16/12) as large. A model
    whose norms undo just that is the teacher."""
    model = build(family, tie_word_embeddings=tied)
    dead = (0, 3, 7, 12)
    kill(model, channels=dead)
    plan, chosen, smaller = cut(model, width=Width(hidden_size=12))
    assert chosen.channels == tuple(n for n in range(16) if n not in dead)
    ours, theirs = (m.get_input_embeddings()(BATCH.tokens) for m in (smaller, model))
    torch.testing.assert_close(ours, theirs[..., list(chosen.channels)])
    with torch.no_grad():
        for name, module in smaller.named_modules():
            if "norm" in name and "q_norm" not in name and "k_norm" not in name:
                offset = plan.family.norm_offset
                module.weight.copy_((module.weight + offset) * (16 / 12) ** 0.5 - offset)
                for epsilon in ("eps", "variance_epsilon"):
                    if hasattr(module, epsilon):
                        setattr(module, epsilon, getattr(module, epsilon) * 16 / 12)
    torch.testing.assert_close(logits(smaller), logits(model), rtol=1e-3, atol=1e-3)


# --- what is not described ------------------------------------------------------------------------------------------


def test_a_family_that_is_not_described_says_what_to_describe():
    with pytest.raises(MismatchError, match="no smaller model can be cut out of the family gpt2") as caught:
        describe(build_config("gpt2"))
    assert "axes of each of its tensors" in str(caught.value)
    assert "pruning/plan.py" in str(caught.value)


def test_a_model_whose_layers_differ_in_shape_is_refused(monkeypatch):
    config = build_config("llama")
    monkeypatch.setattr(type(config), "is_heterogeneous", True)
    with pytest.raises(MismatchError, match="the teacher's layers differ in shape"):
        describe(config)


def test_a_tensor_that_is_not_described_is_named():
    model = build("llama")
    model.model.layers[1].mlp.gate = torch.nn.Linear(16, 3)
    with pytest.raises(MismatchError, match=r"the tensor model\.layers\.1\.mlp\.gate\.weight is not described"):
        cut(model, layers=2)


def test_a_tensor_of_another_shape_is_named():
    model = build("llama")
    model.model.norm.weight = torch.nn.Parameter(torch.ones(5))
    with pytest.raises(MismatchError, match=r"the tensor model\.norm\.weight is not as its family is described"):
        cut(model, layers=2)

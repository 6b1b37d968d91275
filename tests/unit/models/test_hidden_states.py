"""Inner states are those that `transformers` gives out, at the kept positions; hooks leave nothing behind."""

from dataclasses import replace

import pytest
import torch

from conftest import FAMILIES, build_batch, build_model
from stillroom.errors import MismatchError
from stillroom.layers import check_layers, in_order
from stillroom.models import hidden_states, loading
from stillroom.signals import Attention, HiddenStates, TeacherOutput

BATCH = build_batch(20, 9, 30, 14, 6)
LAYERS = ("embeddings", 0, 2, "final_norm")


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_they_are_those_that_the_model_itself_gives_out(family, checkpointed):
    model = build_model(family, num_hidden_layers=3)
    own = model(
        input_ids=BATCH.tokens, position_ids=BATCH.positions, use_cache=False, output_hidden_states=True
    ).hidden_states
    if checkpointed:
        loading.checkpoint_activations(model.train())
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    last, hidden = hidden_states.all_hidden_states(model, BATCH, LAYERS)
    assert torch.equal(last, own[-1][BATCH.loss_mask])
    assert list(hidden.states) == list(LAYERS)
    found = [hidden.states[layer] for layer in LAYERS[:2]]
    for state, expected in zip([*found, hidden.states["final_norm"]], (own[0], own[1], own[-1]), strict=True):
        assert torch.equal(state, expected[BATCH.loss_mask])
    assert not torch.equal(hidden.states[2], hidden.states["final_norm"])  # before the norm, not after it


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2"])
def test_queries_keys_and_values_come_from_the_projections(family):
    model = build_model(family)
    _, hidden = hidden_states.all_hidden_states(model, BATCH, ("embeddings",), (0,))
    block = hidden_states.blocks(model)[0]
    read = block.input_layernorm(hidden.states["embeddings"])
    attention = block.self_attn
    for found, projection in zip(
        hidden.attention[0], (attention.q_proj, attention.k_proj, attention.v_proj), strict=True
    ):
        torch.testing.assert_close(found, projection(read), rtol=1e-5, atol=1e-5)


def hooks(model):
    return [list(module._forward_hooks) for module in model.modules()]


def test_gradients_flow_and_hooks_are_taken_away_also_after_an_error():
    model = build_model().train()
    loading.checkpoint_activations(model)
    before = hooks(model)
    _, hidden = hidden_states.all_hidden_states(model, BATCH, (0,), (1,))
    (hidden.states[0].square().sum() + hidden.attention[1].queries.square().sum()).backward()
    assert hidden_states.blocks(model)[0].mlp.down_proj.weight.grad.abs().sum() > 0
    assert hidden_states.blocks(model)[1].self_attn.q_proj.weight.grad.abs().sum() > 0
    assert hooks(model) == before
    with pytest.raises(IndexError):
        hidden_states.all_hidden_states(model, replace(BATCH, tokens=BATCH.tokens + 10**6), (0,))
    assert hooks(model) == before


def test_what_cannot_be_found_is_an_error():
    with pytest.raises(MismatchError, match="the attention of layer 0 is not understood"):
        hidden_states.all_hidden_states(build_model("gpt2"), BATCH, attention=(0,))
    model = build_model()
    model.config.num_hidden_layers = 5
    with pytest.raises(MismatchError, match="the layers of LlamaForCausalLM are not found"):
        hidden_states.blocks(model)


def test_layers_have_an_order_and_a_last_one():
    assert in_order(["final_norm", 3, "embeddings", 0, 3]) == ("embeddings", 0, 3, "final_norm")
    check_layers(["embeddings", 0, 3, "final_norm"], 4, "teacher", "layers")
    with pytest.raises(MismatchError, match="layers names a layer that is not there") as error:
        check_layers([0, 4], 4, "teacher", "layers")
    assert "layer 4" in str(error.value)
    assert "4 layers, 0 to 3" in str(error.value)


def test_what_a_teacher_told_moves_whole():
    state = torch.ones(2, 3)
    told = TeacherOutput(None, HiddenStates({0: state}, {1: Attention(state, state, state)})).to("meta")
    assert told.signal is None
    assert {t.device.type for t in (told.hidden.states[0], *told.hidden.attention[1])} == {"meta"}

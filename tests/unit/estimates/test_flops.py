"""FLOPs of a token: against sums by hand, and against what PyTorch's own counter sees."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from published import PUBLISHED, sizes
from stillroom.estimates.flops import attention_flops, forward_flops, layers_flops, training_flops
from stillroom.estimates.model_size import model_size

LENGTH = 64


@pytest.fixture(scope="module")
def counted():
    """A tiny model, and the FLOPs that PyTorch counts in its forward and its whole training step."""
    values = {"vocab_size": 96, **sizes(24, 40, 3, 4, 2)}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **values), attn_implementation="eager")
    ids = torch.zeros(1, LENGTH, dtype=torch.long)
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        model(ids, use_cache=False)
    with FlopCounterMode(display=False) as whole:
        model(ids, use_cache=False).logits.sum().backward()
    return model_size({"model_type": "llama", **values}), forward.get_total_flops(), whole.get_total_flops()


def test_forward_and_backward_are_what_pytorch_counts(counted):
    model, forward, whole = counted
    unmasked = attention_flops(model, LENGTH)  # eager attention also multiplies what the causal mask then hides
    assert forward == LENGTH * (forward_flops(model, LENGTH) + unmasked)
    assert whole == 3 * forward


def test_the_head_is_multiplied_once_more_only_without_checkpointing():
    model = model_size(PUBLISHED["Qwen2 7B"][0])
    plain, recomputing = (training_flops(model, 4096, checkpointing=on) for on in (False, True))
    assert plain.total == 3 * forward_flops(model, 4096)
    assert recomputing.total - plain.total == forward_flops(model, 4096) - 2 * 152064 * 3584


def test_adapters_halve_the_backward_pass_of_the_products():
    model = model_size(PUBLISHED["Qwen2 7B"][0])
    attention = attention_flops(model, 4096)
    frozen = training_flops(model, 4096, frozen=model.frozen((), adapters=True))
    assert frozen.backward == 2.0 * model.matmul_entries + 2 * attention


def test_a_frozen_layer_has_no_products_by_its_weights():
    model = model_size(PUBLISHED["Qwen2 7B"][0])
    names = model.frozen(["*layers.3.*"], adapters=False)
    plain, frozen = training_flops(model, 4096), training_flops(model, 4096, frozen=names)
    layer = layers_flops(model, 4096, 1) - attention_flops(model, 4096) / 28
    assert plain.backward - frozen.backward == pytest.approx(layer)
    assert plain.forward == frozen.forward

"""Skeletons: models whose parameters have shapes and no memory yet, and how new ones get their random values."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from stillroom.models.dtensor import fill_local, is_adapter, own_rows


def meta_model(config: PretrainedConfig, *, dtype: torch.dtype, attention: str | None, trust_remote_code: bool) -> Any:
    """A model of which only the buffers (a few numbers, such as the frequencies of positions) are there."""
    with parameters_on_meta():
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attention, trust_remote_code=trust_remote_code
        )
    model.tie_weights()
    return model.eval()


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Inside, modules are built with parameters that take no memory, and draw no random numbers for them."""
    register = nn.Module.register_parameter

    def without_memory(self: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        register(self, name, parameter)

    nn.Module.register_parameter = without_memory  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        nn.Module.register_parameter = register


@torch.no_grad()
def initialize(model: PreTrainedModel, seed: int) -> None:
    """Gives a new model its random values, as its family draws them, one module after the other.

    Of each module the whole is drawn on the CPU and this process's part kept, so the model is the same for the same
    seed, however many processes hold it. It must have memory already (`parts.realise`). Parameters beside those of the
    family (adapters) stay as they are.
    """
    families = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    for name, module in model.named_modules():
        module.__dict__.pop("_is_hf_initialized", None)
        if is_adapter(f".{name}"):
            module._is_hf_initialized = True  # pyright: ignore[reportAttributeAccessIssue]
    for family in families:
        family._init_weights = _drawing(family)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model.initialize_weights()
    finally:
        for family in families:
            del family.__dict__["_init_weights"]


def _drawing(family: PreTrainedModel) -> Any:
    """The family's own way to draw a module, over stand-ins for its parameters that are whole and on the CPU."""
    own = type(family)._init_weights

    def draw(module: nn.Module) -> None:
        held = {name: p for name, p in module._parameters.items() if p is not None}
        for name, parameter in held.items():
            whole = torch.empty(parameter.shape, dtype=parameter.dtype)
            module._parameters[name] = nn.Parameter(whole, requires_grad=parameter.requires_grad)
        try:
            own(family, module)
            for name, parameter in held.items():
                drawn = module._parameters[name]
                assert drawn is not None
                fill_local(parameter, drawn.detach()[own_rows(parameter)] if drawn.ndim else drawn.detach())
        finally:
            module._parameters.update(held)

    return draw

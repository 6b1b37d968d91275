"""The parts of a model: its backbone, layers and head; and what its layers give out, taken by hooks."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from stillroom.batch import Batch
from stillroom.errors import MismatchError, NonFiniteError
from stillroom.layers import Layer
from stillroom.lm_head import LMHead
from stillroom.signals import Attention, HiddenStates


# --- which part is which ---------------------------------------------------------------------------------------------
def backbone(model: PreTrainedModel) -> nn.Module:
    """All of the model below its head: tokens to the last hidden state."""
    body = getattr(model, model.base_model_prefix, None)
    if body is None:
        body = model.get_decoder()
    if body is model:  # as of Llama4, whose class names a prefix that it does not have
        body = getattr(model, "model", model)
    if body is model:
        raise MismatchError(
            f"the backbone of {type(model).__name__} is not found",
            {"family": model.config.model_type, "looked for": f"`{model.base_model_prefix}`"},
            why="Backbone and head have to be run apart, so that no logits tensor is ever held.",
            fix="Use a model whose class is a causal language model around a backbone, as almost all are.",
        )
    return body


def last_hidden_states(model: PreTrainedModel, batch: Batch) -> Float[Tensor, "b t d"]:
    """The last hidden states, from which the head makes logits. Documents in one row do not see each other."""
    body = backbone(model)
    return body(**_inputs(body, batch))[0]


def _inputs(module: nn.Module, batch: Batch) -> dict[str, Any]:
    """No attention mask is given: `transformers` builds it from positions that restart, unless it fills a cache."""
    takes_positions = "position_ids" in inspect.signature(module.forward).parameters
    positions = {"position_ids": batch.positions} if takes_positions else {}
    return {"input_ids": batch.tokens, "use_cache": False, **positions}


def lm_head(model: PreTrainedModel) -> LMHead:
    """The model's head, with what its family does to logits. An adapter on the head is part of its weight."""
    layer = model.get_output_embeddings()
    if layer is None:
        raise MismatchError(
            f"{type(model).__name__} has no output head",
            {"expected": "a causal language model", "found": type(model).__name__},
            why="Distillation compares next-token distributions, which the head makes.",
            fix="Use a model with a language-modeling head.",
        )
    config = model.config.get_text_config()
    factor, divisor = getattr(config, "logit_scale", None), getattr(config, "logits_scaling", None)
    scale = (factor if isinstance(factor, int | float) else 1.0) / (divisor or 1.0)
    deltas: list[Tensor] = []
    while hasattr(layer, "lora_A"):  # peft's wrapper around a linear layer
        deltas += [layer.get_delta_weight(name) for name in layer.active_adapters]  # pyright: ignore
        layer = layer.base_layer  # pyright: ignore[reportAssignmentType]
    weight = sum(deltas, layer.weight)  # pyright: ignore[reportCallIssue, reportArgumentType]
    softcap = getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_soft_cap", None)
    return LMHead(weight, getattr(layer, "bias", None), scale, softcap)


@torch.no_grad()
def verify(model: PreTrainedModel, name: str, *, pack: bool, device: torch.device | None = None) -> None:
    """Tries the model on a few tokens, so that no wrong assumption about its architecture goes unnoticed.

    Args:
        device: where it works; None is where its parameters are, which may be elsewhere where they are offloaded.

    Raises:
        NonFiniteError: it says something that is not a number.
        MismatchError: backbone and head do not give the model's own logits; or a position sees what comes after it; or,
            with ``pack``, a document that shares a row with another is read differently for it.
    """
    generator = torch.Generator().manual_seed(0)
    device = device or next(model.parameters()).device
    tokens = torch.randint(0, lm_head(model).vocab_size, (3, 16), generator=generator)
    tokens[1, 8:] = tokens[0, 8:]
    tokens[2, :15] = tokens[0, :15]
    positions = torch.arange(8).repeat(3, 2)
    ones = torch.ones_like(tokens)
    batch = Batch(tokens, tokens, ones.bool(), positions, ones).to(device)
    was_training = model.training
    model.eval()
    try:
        hidden = last_hidden_states(model, batch)
        own = model(**_inputs(model, batch)).logits
    finally:
        model.train(was_training)
    if torch.isnan(own).any():
        raise NonFiniteError(
            f"what {name} says is not a number",
            {"logits": "not a number", "at": f"{int(torch.isnan(own).sum()):,} of {own.numel():,} places"},
            why="No loss and no score of it would mean anything.",
            fix="Check its weights; where they are good, another dtype or attention may mend it.",
        )
    tolerance = 1e-3 if next(model.parameters()).dtype in (torch.float32, torch.float64) else 1e-2

    def apart(a: Tensor, b: Tensor, of: Tensor) -> float:
        return ((a - b).abs().max() / of.abs().max().clamp_min(1e-6)).item()

    error = apart(lm_head(model).logits(hidden.flatten(0, 1)).view(own.shape), own, own)
    if not error <= tolerance:
        raise MismatchError(
            f"the head of {name} is not understood",
            {"family": model.config.model_type, "logits differ by": f"{error:.1%} of the largest"},
            why="Its family changes the logits in a way that would be left out of every loss.",
            fix="Please report the family; until it is described it cannot be distilled.",
        )
    if not apart(hidden[0, :15], hidden[2, :15], hidden) <= tolerance:
        raise MismatchError(
            f"{name} sees the tokens that it is to predict",
            {"family": model.config.model_type, "expected": "a causal language model"},
            why="Its hidden states depend on what comes later, so every loss would be meaningless.",
            fix="Use a decoder; for some families that is a setting, such as is_decoder.",
        )
    leak = apart(hidden[0, 8:], hidden[1, 8:], hidden)
    if pack and leak > tolerance / 10:  # the same arithmetic on the same numbers differs by nothing, or nearly so
        raise MismatchError(
            f"{name} lets documents that share a row see each other",
            {"family": model.config.model_type, "hidden states differ by": f"{leak:.1%} of the largest"},
            why="The model would be trained on contexts that never occur.",
            fix="Set data.pack=false.",
        )


PROJECTIONS = ("q_proj", "k_proj", "v_proj")
"""The modules that make a block's queries, keys and values, in every family that keeps them apart."""


def all_hidden_states(
    model: PreTrainedModel, batch: Batch, layers: Sequence[Layer] = (), attention: Sequence[int] = ()
) -> tuple[Float[Tensor, "kept d"], HiddenStates]:
    """The last hidden states, from which the head makes logits, and the inner ones, all at the batch's kept positions.

    Args:
        layers: those whose states are taken.
        attention: the blocks whose queries, keys and values are taken.
    """
    inside = blocks(model) if layers or attention else nn.ModuleList()
    taken: dict[Layer | tuple[int, str], Tensor] = {}

    def kept(state: Tensor) -> Tensor:
        return state.flatten(0, 1)[batch.kept]

    def take(name: Layer | tuple[int, str], state: Tensor) -> None:
        # With gradients nothing may be computed here: a checkpointed block would not find it in its second run.
        taken[name] = state if torch.is_grad_enabled() else kept(state)

    def enters(args: tuple[Any, ...], kwargs: dict[str, Any], _: Any) -> None:
        take("embeddings", args[0] if args else kwargs["hidden_states"])

    def leaves(layer: Layer, _: Any, __: Any, output: Any) -> None:
        take(layer, output if isinstance(output, Tensor) else output[0])

    with hooks() as hook:
        for layer in layers:
            if layer == "embeddings":
                hook(inside[0], enters)
            elif layer != "final_norm":
                hook(inside[layer], partial(leaves, layer))
        for layer in attention:
            for name, projection in projections(inside[layer], layer).items():
                hook(projection, lambda *given, name=(layer, name): take(name, given[-1]))
        last = kept(last_hidden_states(model, batch))
    if torch.is_grad_enabled():
        taken = {name: kept(state) for name, state in taken.items()}
    states: dict[Layer, Tensor] = {layer: last if layer == "final_norm" else taken[layer] for layer in layers}
    inner = {layer: Attention(*(taken[layer, name] for name in PROJECTIONS)) for layer in attention}
    return last, HiddenStates(states, inner)


Take = Callable[[tuple[Any, ...], dict[str, Any], Any], object]
"""Is called with a module's arguments and its output."""


@contextmanager
def hooks() -> Iterator[Callable[[nn.Module, Take], None]]:
    """Gives a function that has another called with a module's arguments and output; in the end all are taken away.

    They must be gone before backward, in which checkpointed blocks run a second time.
    """
    with ExitStack() as stack:

        def hook(module: nn.Module, take: Take) -> None:
            def after(_: nn.Module, *given: Any) -> None:
                take(*given)

            stack.callback(module.register_forward_hook(after, with_kwargs=True).remove)

        yield hook


def blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The model's blocks ("layers") in their order.

    Raises MismatchError where its backbone has none that can be told.
    """
    number = model.config.get_text_config().num_hidden_layers
    body = backbone(model)
    found = [module for module in body.modules() if isinstance(module, nn.ModuleList) and len(module) == number]
    if not found:
        raise MismatchError(
            f"the layers of {type(model).__name__} are not found",
            {"family": model.config.model_type, "looked for": f"one list of {number} blocks"},
            why="Without them its inner states cannot be taken.",
            fix="Use a model of a family whose backbone holds its blocks in one list, as almost all do.",
        )
    return found[0]


def projections(block: nn.Module, layer: int) -> dict[str, nn.Module]:
    """The modules that make a block's queries, keys and values. Raises MismatchError where they are not kept apart,
    or not named as is usual."""
    named = {name.rpartition(".")[2]: module for name, module in block.named_modules()}
    if any(name not in named for name in PROJECTIONS):
        raise MismatchError(
            f"the attention of layer {layer} is not understood",
            {"looked for": ", ".join(PROJECTIONS), "found": ", ".join(n for n, _ in block.named_children())},
            why="Its queries, keys and values cannot be told apart.",
            fix="Use another distance than attention_relation, or a family with separate projections.",
        )
    return {name: named[name] for name in PROJECTIONS}

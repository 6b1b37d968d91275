"""States: what a model's layers give out as it runs, taken by hooks; only what is asked for is held."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from stillroom import models
from stillroom.batch import Batch
from stillroom.errors import MismatchError
from stillroom.layers import Layer
from stillroom.signals import Attention, Hidden

PROJECTIONS = ("q_proj", "k_proj", "v_proj")
"""What a block's queries, keys and values are made by, in every family that keeps them apart."""


def hidden_and_inner(
    model: PreTrainedModel, batch: Batch, layers: Sequence[Layer] = (), attention: Sequence[int] = ()
) -> tuple[Float[Tensor, "kept d"], Hidden]:
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

    with hooks() as hook:
        for layer in layers:
            if layer == "embeddings":
                hook(
                    inside[0], lambda args, kwargs, _: take("embeddings", args[0] if args else kwargs["hidden_states"])
                )
            elif layer != "final_norm":
                hook(inside[layer], lambda *given, layer=layer: take(layer, _first(given[-1])))
        for layer in attention:
            for name, projection in projections(inside[layer], layer).items():
                hook(projection, lambda *given, name=(layer, name): take(name, given[-1]))
        last = kept(models.hidden_states(model, batch))
    if torch.is_grad_enabled():
        taken = {name: kept(state) for name, state in taken.items()}
    states: dict[Layer, Tensor] = {layer: last if layer == "final_norm" else taken[layer] for layer in layers}
    return last, Hidden(states, {layer: Attention(*(taken[layer, n] for n in PROJECTIONS)) for layer in attention})


@contextmanager
def hooks() -> Iterator[Callable[[nn.Module, Callable[[tuple[Any, ...], dict[str, Any], Any], object]], None]]:
    """Gives a function that has another called with a module's arguments and output; in the end all are taken away.

    They must be gone before backward, in which checkpointed blocks run a second time.
    """
    handles = []

    def hook(module: nn.Module, take: Callable[[tuple[Any, ...], dict[str, Any], Any], object]) -> None:
        def after(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            take(args, kwargs, output)

        handles.append(module.register_forward_hook(after, with_kwargs=True))

    try:
        yield hook
    finally:
        for handle in handles:
            handle.remove()


def _first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The model's blocks ("layers") in their order.

    Raises:
        MismatchError: its backbone has none that can be told.
    """
    number = model.config.get_text_config().num_hidden_layers
    body = models.backbone(model)
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
    """What makes a block's queries, keys and values.

    Raises:
        MismatchError: they are not kept apart, or not named as is usual.
    """
    named = {name.rpartition(".")[2]: module for name, module in block.named_modules()}
    if any(name not in named for name in PROJECTIONS):
        raise MismatchError(
            f"the attention of layer {layer} is not understood",
            {"looked for": ", ".join(PROJECTIONS), "found": ", ".join(n for n, _ in block.named_children())},
            why="Its queries, keys and values cannot be told apart.",
            fix="Use another distance than attention_relation, or a family with separate projections.",
        )
    return {name: named[name] for name in PROJECTIONS}

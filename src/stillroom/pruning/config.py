"""The settings of a cut: what of a bigger model is kept in a smaller one."""

import itertools
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag

from stillroom.config import Config, Positive


class EveryLayer(Config):
    """The last layer of each group of so many: with 3 the layers 2, 5, 8, …"""

    kind: Literal["every"]
    step: Annotated[int, Field(ge=2)]
    """Layers in a group, of which one is kept. Where it divides them, the last of all layers is kept; the layers of a
    group that is not full are dropped."""


class BestLayers(Config):
    """Those that matter most to the model, as measured on text."""

    kind: Literal["best"]
    count: Positive
    """The number of layers that are kept."""
    by: Literal["block_influence", "loss_increase"] = "block_influence"
    """The measure. Block influence: how far a layer turns its input, 1 - cos, in one pass over the text. Loss
    increase: what skipping a layer costs; the least harmful is dropped and all others are measured again, until `count`
    are left."""
    contiguous: bool = False
    """Drop one stretch of neighbouring layers instead: of all such stretches the one that matters least."""


def _rising(layers: tuple[int, ...]) -> tuple[int, ...]:  # kept: pydantic calls it
    if any(a >= b for a, b in itertools.pairwise(layers)):
        raise ValueError(f"layers are listed in rising order, each once, not {list(layers)}")
    return layers


LayerList = Annotated[
    tuple[Annotated[int, Field(ge=0)], ...], Field(strict=False, min_length=1), AfterValidator(_rising)
]


def _form(value: Any) -> str | None:  # kept: pydantic calls it
    """Returns the branch that a value belongs to, so that what is wrong with it is told of that branch alone."""
    if isinstance(value, int) and not isinstance(value, bool):
        return "int"
    if isinstance(value, list | tuple):
        return "list"
    return "settings" if isinstance(value, dict | Config) else None


def _one_of(message: str) -> Any:
    return Field(discriminator=Discriminator(_form, custom_error_type="form", custom_error_message=message))


class Width(Config):
    """Each of a model's widths by its name; what is not named stays as it is."""

    hidden_size: Positive | None = None
    """Hidden channels: those that the blocks hand on."""
    num_attention_heads: Positive | None = None
    """Query heads of each block. Heads that share a key and value head stay or go together, unless:"""
    num_key_value_heads: Positive | None = None
    """key and value heads of each block are named too; each then keeps an equal share of the query heads."""
    intermediate_size: Positive | None = None
    """Channels inside each block's MLP."""


Layers = Annotated[
    Annotated[Positive, Tag("int")]
    | Annotated[LayerList, Tag("list")]
    | Annotated[Annotated[EveryLayer | BestLayers, Field(discriminator="kind")], Tag("settings")],
    _one_of("should be a number of layers, a list of them, or settings with a kind (every, best)"),
]


class PruningConfig(Config):
    """The parts of a bigger model that are kept in a smaller one."""

    layers: Layers | None = None
    """The layers that are kept: so many of them, evenly spaced with the first and the last (1 is the first alone); a
    list of their numbers, from 0; or by a rule. null keeps all."""
    width: (
        Annotated[
            Annotated[Positive, Tag("int")] | Annotated[Width, Tag("settings")],
            _one_of("should be a hidden size, or settings (hidden_size, num_attention_heads, intermediate_size)"),
        ]
        | None
    ) = None
    """The hidden size, with attention heads and MLP channels in the same proportion; or each by its name. Those that
    matter most on text are kept. null keeps all."""
    documents: Positive = 64
    """Documents on which it is measured what matters, where that is needed: the first of the data."""

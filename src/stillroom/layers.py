"""Layers: the places inside a model whose states can be compared or kept, and what they are called."""

from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import Field

from stillroom.errors import MismatchError

Layer = Annotated[int, Field(ge=0)] | Literal["embeddings", "final_norm"]
"""A block by its number from 0, meaning what it adds up to (its output, before any final norm); or an end of the model:
what the first block reads, or what the head reads."""


def in_order(layers: Iterable[Layer]) -> tuple[Layer, ...]:
    """Each layer once, as they come in a model."""
    places = {"embeddings": -1.0, "final_norm": float("inf")}
    return tuple(sorted(set(layers), key=lambda layer: places.get(str(layer), layer)))  # pyright: ignore


def evenly(count: int, num_layers: int) -> tuple[int, ...]:
    """``count`` blocks of ``num_layers``, spread from the first to the last: round(i · (L − 1) / (count − 1)), halves
    to the even number as Python rounds. Where ``count`` is the greater, some come several times."""
    return tuple(round(i * (num_layers - 1) / (count - 1)) for i in range(count)) if count > 1 else (0,)


def check_layers(layers: Iterable[Layer], num_layers: int, who: str, setting: str) -> None:
    """Returns where a model of ``num_layers`` blocks has all of the layers.

    Raises:
        MismatchError: it lacks one.
    """
    for layer in layers:
        if isinstance(layer, int) and layer >= num_layers:
            raise MismatchError(
                f"{setting} names a layer that is not there",
                {setting: f"layer {layer}", f"the {who} has": f"{num_layers} layers, 0 to {num_layers - 1}"},
                why="There would be nothing to compare.",
                fix="Layers are counted from 0; besides them there are `embeddings` and `final_norm`.",
            )

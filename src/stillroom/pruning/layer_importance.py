"""Which layers matter most: by what is measured on text."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedModel

from stillroom.batch import Batch
from stillroom.pruning.config import BestLayers
from stillroom.pruning.importance import block_influence, finite, loss_nats, only

Say = Callable[[str], object]


class BestFound(NamedTuple):
    layers: tuple[int, ...]
    """Those that are kept."""
    scores: dict[str, Any]
    """The numbers by which they were chosen."""


def best_layers(rule: BestLayers, model: PreTrainedModel, batches: Sequence[Batch], say: Say) -> BestFound:
    """The layers that a rule keeps.

    Args:
        say: is told what was found, step by step.
    """
    by_loss = rule.by == "loss_increase"
    if rule.contiguous:
        found = _stretch(rule, model, batches, say)
    else:
        found = (_greedy if by_loss else _least_influence)(rule, model, batches, say)
    return BestFound(found.layers, {"by": rule.by, "contiguous": rule.contiguous, **found.scores})


def _least_influence(rule: BestLayers, model: PreTrainedModel, batches: Sequence[Batch], say: Say) -> BestFound:
    values = block_influence(model, batches)
    say("measured the block influence of each layer")
    order = sorted(range(len(values)), key=lambda layer: (values[layer], layer))
    dropped = order[: len(values) - rule.count]
    return BestFound(_all_but(dropped, len(values)), {"values": values, "dropped": dropped})


def _greedy(rule: BestLayers, model: PreTrainedModel, batches: Sequence[Batch], say: Say) -> BestFound:
    """Drops the layer that is missed least, and measures again, until so many are left.

    A layer's value is what the loss was above the whole model's when it was last tried without that layer.
    """
    whole, _ = loss_nats(model, batches)
    num_layers = model.config.num_hidden_layers
    values, dropped = [0.0] * num_layers, list[int]()
    while num_layers - len(dropped) > rule.count:
        left = _all_but(dropped, num_layers)
        for layer in left:
            values[layer] = _increase(model, batches, [n for n in left if n != layer], whole)
        dropped.append(min(left, key=lambda layer: (values[layer], layer)))
        say(f"without layer {', '.join(map(str, sorted(dropped)))} the loss rises by {values[dropped[-1]]:.4f} nats")
    return BestFound(_all_but(dropped, num_layers), {"loss_nats": whole, "values": values, "dropped": dropped})


def _stretch(rule: BestLayers, model: PreTrainedModel, batches: Sequence[Batch], say: Say) -> BestFound:
    """Drops the stretch of layers that matters least; the values are those of each stretch, by its first layer."""
    num_layers = model.config.num_hidden_layers
    span = num_layers - rule.count
    scores: dict[str, Any] = {}
    if rule.by == "block_influence":
        values = block_influence(model, batches, span)
        say(f"measured how far each stretch of {span} layers turns its input")
    else:
        values, (whole, _) = [], loss_nats(model, batches)
        scores["loss_nats"] = whole
        for first in range(rule.count + 1):
            kept = _all_but(range(first, first + span), num_layers)
            values.append(_increase(model, batches, kept, whole))
            say(f"without layers {first} to {first + span - 1} the loss rises by {values[-1]:.4f} nats")
    first = min(range(len(values)), key=lambda first: (values[first], first))
    dropped = list(range(first, first + span))
    return BestFound(_all_but(dropped, num_layers), {**scores, "values": values, "dropped": dropped})


def _increase(model: PreTrainedModel, batches: Sequence[Batch], layers: Sequence[int], whole: float) -> float:
    """How much the loss rises where the model has these layers alone."""
    with only(model, layers):
        loss, _ = loss_nats(model, batches)
    return finite("loss", [loss - whole])[0]


def _all_but(dropped: Sequence[int], num_layers: int) -> tuple[int, ...]:
    return tuple(layer for layer in range(num_layers) if layer not in dropped)

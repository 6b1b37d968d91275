"""Importance: how much each layer, head, MLP channel and hidden channel does for a model, measured on text.

States and activations are taken at every position but padding; losses at the kept positions alone.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from stillroom.batch import Batch
from stillroom.data.dataloader import DocumentSet, in_batches
from stillroom.errors import NonFiniteError
from stillroom.layers import Layer
from stillroom.lm_head import accumulator
from stillroom.losses.fused_linear import Buffers, linear_losses
from stillroom.losses.logits import cross_entropy
from stillroom.losses.objective import Objective
from stillroom.models import hidden_states
from stillroom.models.hidden_states import backbone, last_hidden_states, lm_head
from stillroom.pruning.config import BestLayers
from stillroom.pruning.plan import Family, describe, head_dim


@contextmanager
def only(model: PreTrainedModel, layers: Sequence[int]) -> Iterator[None]:
    """Inside, the model runs as if it had these of its layers and no other; afterwards it is as it was."""
    body, blocks, config = backbone(model), hidden_states.blocks(model), model.config
    (name,) = (name for name, child in body.named_children() if child is blocks)
    before = {key: getattr(config, key) for key in describe(config).per_layer if getattr(config, key, None) is not None}
    with ExitStack() as after:
        after.callback(setattr, body, name, blocks)
        setattr(body, name, nn.ModuleList(blocks[layer] for layer in layers))
        for key, values in before.items():
            after.callback(setattr, config, key, values)
            setattr(config, key, [values[layer] for layer in layers])
        after.callback(setattr, config, "num_hidden_layers", len(blocks))
        config.num_hidden_layers = len(layers)
        yield


@torch.no_grad()
def loss_nats(model: PreTrainedModel, batches: Iterable[Batch]) -> tuple[float, int]:
    """The mean cross-entropy with the data over the kept positions, in nats, and the number of these."""
    device, total, number = model.device, 0.0, 0
    objectives, buffers = [Objective("cross_entropy", cross_entropy, 1.0)], Buffers()
    for batch in batches:
        there = batch.to(device)
        hidden = last_hidden_states(model, there).flatten(0, 1)[there.kept]
        labels = there.labels.flatten()[there.kept]
        ones = torch.ones(len(hidden), device=device)
        found = linear_losses(hidden, lm_head(model), objectives, labels, ones, buffers=buffers)
        total, number = total + found.nats.double().sum().item(), number + len(hidden)
    return total / max(1, number), number


@torch.no_grad()
def block_influence(model: PreTrainedModel, batches: Iterable[Batch], span: int = 1) -> list[float]:
    """The mean of ``1 − cos(x_l, x_{l+span})`` for each layer l that ``span`` layers begin with, where ``x_l`` is what
    enters layer l (arXiv 2403.03853; over several layers as in arXiv 2403.17887)."""
    num_layers, number = len(hidden_states.blocks(model)), 0
    sums = torch.zeros(num_layers - span + 1, dtype=torch.float64)
    layers: list[Layer] = ["embeddings", *range(num_layers)]
    for batch in batches:
        there = _all_real(batch).to(model.device)
        found = hidden_states.all_hidden_states(model, there, layers)[1].states
        wide = [found[layer].to(accumulator(found[layer].dtype)) for layer in layers]
        for layer in range(len(sums)):
            turned = 1 - functional.cosine_similarity(wide[layer], wide[layer + span], dim=-1)
            sums[layer] += turned.double().sum().item()
        number += there.num_kept
    return finite("block influence", (sums / max(1, number)).tolist())


def _all_real(batch: Batch) -> Batch:
    """The same batch with every position kept but padding."""
    return replace(batch, loss_mask=batch.documents >= 0)


def finite(what: str, values: list[float]) -> list[float]:
    """The same values. Raises NonFiniteError where one is infinite or not a number."""
    for number, value in enumerate(values):
        if not math.isfinite(value):
            raise NonFiniteError(
                f"the {what} of the model is not finite",
                {"number": number, "value": value},
                why="Nothing can be chosen by it.",
                fix="Check the model's weights; in float32 it may be finite.",
            )
    return values


@dataclass(frozen=True)
class Activations:
    """The strength with which each part is used: the mean over the positions of a document, then the L2 norm over them
    (arXiv 2407.14679). float64, on the CPU."""

    hidden: Float[Tensor, " d"]
    """|outputs of the norms|, summed over all norms of the residual stream."""
    heads: Float[Tensor, "layers h"]
    """Norms of each head's part of what o_proj reads."""
    mlp: Float[Tensor, "layers m"]
    """|what down_proj reads|."""


@torch.no_grad()
def activations(model: PreTrainedModel, family: Family, batches: Iterable[Batch]) -> Activations:
    """Measures heads, MLP channels and hidden channels in one pass over the text."""
    numbers, size = range(model.config.num_hidden_layers), head_dim(model.config)
    squares: dict[str, Tensor] = {}
    """The values of each module, squared and summed over documents, each of which lies in one batch whole."""

    def watch(name: str, take: Callable[..., Tensor]) -> None:
        def see(args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            values = take(args[0] if args else kwargs.get("input"), output)
            real = values.flatten(0, 1)[there.kept]
            sums = real.new_zeros(len(lengths), real.shape[-1]).index_add_(0, index, real)
            squares[name] = squares.get(name, 0) + (sums / lengths.unsqueeze(-1)).cpu().double().square().sum(0)

        hook(model.get_submodule(name), see)

    def wide(values: Tensor) -> Tensor:
        return values.to(accumulator(values.dtype))

    with hidden_states.hooks() as hook:
        norms = [name.replace("*", str(n)) for name in family.norms for n in (numbers if "*" in name else [0])]
        heads, mlp = ([name.replace("*", str(n)) for n in numbers] for name in (family.heads, family.mlp))
        for name in norms:
            watch(name, lambda _, output: wide(output).abs())
        for name in heads:
            watch(name, lambda read, _: wide(read).unflatten(-1, (-1, size)).norm(dim=-1))
        for name in mlp:
            watch(name, lambda read, _: wide(read).abs())
        for batch in batches:
            there = _all_real(batch).to(model.device)
            documents = there.documents.flatten()[there.kept]
            _, index, lengths = documents.unique(return_inverse=True, return_counts=True)
            last_hidden_states(model, there)
    measured = [[squares[name].sqrt() for name in names] for names in (norms, heads, mlp)]
    found = Activations(torch.stack(measured[0]).sum(0), *map(torch.stack, measured[1:]))
    for name, values in vars(found).items():
        finite(f"importance of {name}", [values.sum().item()])
    return found


def text_batches(
    documents: DocumentSet,
    *,
    number: int | None = None,
    length: int,
    pack: bool,
    batch_tokens: int,
    pad_token: int | None = 0,
) -> Iterator[Batch]:
    """The first ``number`` documents (all by default) as they come, in batches of at most ``batch_tokens`` positions,
    padding counted, and at least one row."""
    order = np.arange(len(documents) if number is None else min(number, len(documents)))
    pad = pad_token if isinstance(pad_token, int) else 0
    return in_batches(documents, documents.lengths, order, length=length, pack=pack, most=batch_tokens, pad_token=pad)


Say = Callable[[str], object]


def best_layers(
    rule: BestLayers, model: PreTrainedModel, batches: Sequence[Batch], say: Say
) -> tuple[tuple[int, ...], dict[str, Any]]:
    """Returns the layers that a rule keeps, and the numbers by which they were chosen.

    Where single layers are dropped by loss, the one that is missed least goes first, and all others are measured again;
    a layer's value is then what the loss was above the whole model's when it was last tried without that layer. Of
    stretches of layers the values are those of each stretch, by its first layer.

    Args:
        say: is told what was found, step by step.
    """
    num_layers, dropped, values = model.config.num_hidden_layers, list[int](), list[float]()
    span = num_layers - rule.count if rule.contiguous else 1
    scores: dict[str, Any] = {"by": rule.by, "contiguous": rule.contiguous}

    def kept(dropped: Sequence[int]) -> tuple[int, ...]:
        return tuple(layer for layer in range(num_layers) if layer not in dropped)

    def increase(dropped: Sequence[int]) -> float:
        with only(model, kept(dropped)):
            loss, _ = loss_nats(model, batches)
        return finite("loss", [loss - scores["loss_nats"]])[0]

    if rule.by == "block_influence":
        values = block_influence(model, batches, span)
        stretch = f"how far each stretch of {span} layers turns its input"
        say(f"measured {stretch if rule.contiguous else 'the block influence of each layer'}")
    else:
        scores["loss_nats"], _ = loss_nats(model, batches)
    if rule.by == "loss_increase" and rule.contiguous:
        for first in range(rule.count + 1):
            values.append(increase(range(first, first + span)))
            say(f"without layers {first} to {first + span - 1} the loss rises by {values[-1]:.4f} nats")
    elif rule.by == "loss_increase":
        values = [0.0] * num_layers
        while len(left := kept(dropped)) > rule.count:
            for layer in left:
                values[layer] = increase([*dropped, layer])
            dropped.append(min(left, key=lambda layer: (values[layer], layer)))
            say(
                f"without layer {', '.join(map(str, sorted(dropped)))} the loss rises by {values[dropped[-1]]:.4f} nats"
            )
    order = sorted(range(len(values)), key=lambda number: (values[number], number))
    if rule.contiguous:
        dropped = list(range(order[0], order[0] + span))
    elif rule.by == "block_influence":
        dropped = order[: num_layers - rule.count]
    return kept(dropped), {**scores, "values": values, "dropped": dropped}

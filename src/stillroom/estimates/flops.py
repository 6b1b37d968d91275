"""FLOPs of one token, forward and backward, by the shape of a model.

Of a model with M entries in the matrices that a token is multiplied with (``Architecture.matmul_parameters``: the head
among them, the embeddings not) and L layers whose query heads have q channels, in rows of t tokens:

    products    2 M             a multiplication and an addition for each entry
    attention   2 L q t         scores and values: 4 q for each pair, and on average half of the t tokens come before
    forward     products + attention
    backward    2 · forward     by the inputs and by the weights
    recomputed  forward without the head, where activations are checkpointed

Sliding windows are counted as if they saw the whole row, and packed documents as if they saw each other: both are upper
bounds. Norms, activations, softmaxes and the optimizer are left out: they are bound by memory and not by arithmetic.
"""

from dataclasses import dataclass

from stillroom.estimates.architecture import Architecture


@dataclass(frozen=True)
class Flops:
    """Of one token."""

    forward: float
    backward: float = 0.0
    recomputed: float = 0.0
    """The second forward pass of the layers, where activations are checkpointed."""

    @property
    def total(self) -> float:
        return self.forward + self.backward + self.recomputed


def attention_flops(model: Architecture, length: int) -> float:
    """Scores and values of a token in rows of ``length``: the mean over the row, in which half comes before it."""
    return 2.0 * model.num_layers * model.query_size * length


def forward_flops(model: Architecture, length: int) -> float:
    """A forward pass with the head, per token."""
    return 2.0 * model.matmul_parameters + attention_flops(model, length)


def training_flops(
    model: Architecture, length: int, *, checkpointing: bool = False, adapter_parameters: int | None = None
) -> Flops:
    """A forward and a backward pass, per token.

    Args:
        checkpointing: activations are computed a second time in the backward pass.
        adapter_parameters: of low-rank adapters, where these alone are trained: then nothing is differentiated by the
            model's own weights, which halves the backward pass of its products.
    """
    products, attention = 2.0 * model.matmul_parameters, attention_flops(model, length)
    adapters = 2.0 * (adapter_parameters or 0)
    forward = products + attention + adapters
    backward = 2 * forward if adapter_parameters is None else products + 2 * (attention + adapters)
    recomputed = forward - 2.0 * model.head_matmul_parameters if checkpointing else 0.0
    return Flops(forward, backward, recomputed)

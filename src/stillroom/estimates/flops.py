"""FLOPs of one token, forward and backward; time and cost of an amount of them; a live teacher beside a stored one.

Of a model with M entries in the matrices that a token is multiplied with (``ModelSize.matmul_entries``: the head among
them, the embeddings not) and L layers whose query heads have q channels, in rows of t tokens:

    products    2 M             a multiplication and an addition for each entry
    attention   2 L q t         scores and values: 4 q for each pair, and on average half of the t tokens come before
    forward     products + attention
    backward    products by the inputs, products by the weights that are trained, twice the attention
    recomputed  forward without the head, where activations are checkpointed

Sliding windows are counted as if they saw the whole row, and packed documents as if they saw each other: both are upper
bounds. Norms, activations, softmaxes and the optimizer are left out: they are bound by memory and not by arithmetic.
"""

from collections.abc import Collection
from dataclasses import dataclass

from stillroom.estimates.hardware import UTILIZATION, Device
from stillroom.estimates.model_size import ModelSize

CAPTURE_SPEED = 0.81
"""A capture's speed beside a bare forward pass, measured with a tiny teacher (benchmarks/store.json); with a large one
it is nearer to 1."""

STORE_STEP = 1.063
"""Time of a step from a store beside one on hard labels, measured with a tiny student (benchmarks/store.json)."""


@dataclass(frozen=True)
class Flops:
    """FLOPs of one token."""

    forward: float
    backward: float = 0.0
    recomputed: float = 0.0
    """The second forward pass of the layers, where activations are checkpointed."""

    @property
    def total(self) -> float:
        return self.forward + self.backward + self.recomputed


def attention_flops(model: ModelSize, length: int) -> float:
    """Scores and values of a token in rows of ``length``: the mean over the row, in which half comes before it.

    Raises:
        ConfigError: the model's layers are not attention and an MLP.
    """
    return 2.0 * length * sum(number * layer.query_size for layer, number in model.shapes.items())


def forward_flops(model: ModelSize, length: int) -> float:
    """A forward pass with the head, per token."""
    return 2.0 * model.matmul_entries + attention_flops(model, length)


def layers_flops(model: ModelSize, length: int, num_layers: int) -> float:
    """A forward pass of so many of the layers, without the head, per token."""
    return (forward_flops(model, length) - 2.0 * model.head_entries) * num_layers / model.num_layers


def training_flops(
    model: ModelSize,
    length: int,
    *,
    checkpointing: bool = False,
    adapter_parameters: int = 0,
    frozen: Collection[str] = (),
) -> Flops:
    """A forward and a backward pass, per token.

    Args:
        checkpointing: activations are computed a second time in the backward pass.
        adapter_parameters: of low-rank adapters.
        frozen: names of the parameters that are not trained, by which nothing is differentiated.
    """
    products, attention, adapters = 2.0 * model.matmul_entries, attention_flops(model, length), 2.0 * adapter_parameters
    untrained = 2.0 * sum(model.weights[name].matmul for name in frozen)
    untrained += 2.0 * model.head_entries if model.head in frozen else 0.0
    forward = products + attention + adapters
    recomputed = forward - 2.0 * model.head_entries if checkpointing else 0.0
    return Flops(forward, 2 * forward - untrained, recomputed)


# --- time and cost ---------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Estimate:
    flops: float
    time_s: float
    device_hours: float
    cost: float | None
    """US dollars; None where the device has no price."""


def estimate(flops: float, device: Device, num_devices: int = 1, utilization: float = UTILIZATION) -> Estimate:
    """time = FLOPs / (devices · peak · utilization)"""
    time_s = flops / (num_devices * device.flops * utilization)
    hours = time_s * num_devices / 3600
    return Estimate(flops, time_s, hours, None if device.price is None else hours * device.price)


@dataclass(frozen=True)
class LiveOrOffline:
    """FLOPs of both ways, for the same tokens in the same epochs and students."""

    live: float
    offline: float
    break_even: float | None
    """Epochs times students from which on a capture takes less; None where it never does."""


def live_or_offline(
    teacher: float,
    student: float,
    num_tokens: float,
    epochs: float = 1,
    students: float = 1,
    *,
    capture_speed: float = CAPTURE_SPEED,
    store_step: float = STORE_STEP,
) -> LiveOrOffline:
    """With T and S the FLOPs a token of the teacher's forward pass and of the student's training, N tokens, and n =
    epochs · students:

        live       N · n · (T + S)
        offline    N · (T / capture_speed + n · store_step · S)
        break-even n = (T / capture_speed) / (T − (store_step − 1) · S)
    """
    n, captured, dearer = epochs * students, teacher / capture_speed, (store_step - 1) * student
    return LiveOrOffline(
        live=num_tokens * n * (teacher + student),
        offline=num_tokens * (captured + n * store_step * student),
        break_even=captured / (teacher - dearer) if teacher > dearer else None,
    )

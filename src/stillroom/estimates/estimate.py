"""Seconds, device-hours and dollars of an amount of arithmetic; and whether a teacher is asked live or once."""

from dataclasses import dataclass

from stillroom.estimates.devices import Device

UTILISATION = 0.35
"""Assumed share of a device's bfloat16 peak that training reaches."""

CAPTURE_SPEED = 0.81
"""A capture's speed beside a bare forward pass, measured with a tiny teacher (benchmarks/store.json); with a large one
it is nearer to 1."""

STORE_STEP = 1.063
"""Time of a step from a store beside one on hard labels, measured with a tiny student (benchmarks/store.json)."""


@dataclass(frozen=True)
class Estimate:
    flops: float
    time_s: float
    device_hours: float
    cost: float | None
    """US dollars; None where the device has no price."""


def estimate(flops: float, device: Device, num_devices: int = 1, utilisation: float = UTILISATION) -> Estimate:
    """time = FLOPs / (devices · peak · utilisation)"""
    time_s = flops / (num_devices * device.flops * utilisation)
    hours = time_s * num_devices / 3600
    return Estimate(flops, time_s, hours, None if device.price is None else hours * device.price)


@dataclass(frozen=True)
class LiveOrOffline:
    """FLOPs of both ways, for the same tokens in the same epochs and students."""

    live: float
    offline: float
    break_even: float | None
    """Epochs times students from which on asking once takes less; None where it never does."""


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
    n, asked, dearer = epochs * students, teacher / capture_speed, (store_step - 1) * student
    return LiveOrOffline(
        live=num_tokens * n * (teacher + student),
        offline=num_tokens * (asked + n * store_step * student),
        break_even=asked / (teacher - dearer) if teacher > dearer else None,
    )

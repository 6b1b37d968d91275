"""What a verb's own --dry-run says of costs: those on the device that the run would take."""

from collections.abc import Callable
from typing import Any

from stillroom.errors import StillroomError
from stillroom.estimates.hardware import Hardware
from stillroom.estimates.report import CostReport


def costs_here(device: str, memory_bytes: int | None, costs: Callable[[Hardware], CostReport]) -> dict[str, Any] | str:
    """Costs as texts, for a plan in YAML; or why they are not told.

    Args:
        device: what it calls itself: "NVIDIA H100 80GB HBM3", cpu.
        memory_bytes: what it has; None where it does not tell.
    """
    hardware = Hardware.called(device, memory_bytes)
    if hardware is None:
        return f"not told: {device} is not in the table of devices; `stillroom plan` takes any"
    try:
        return costs(hardware).texts()
    except StillroomError as error:
        return f"not told: {error.what}"

"""Sections that the plans of all verbs have in common: parameters, memory of a device, time."""

from collections.abc import Callable, Mapping
from typing import Any

from stillroom.errors import StillroomError
from stillroom.estimates.flops import Estimate, estimate
from stillroom.estimates.hardware import Hardware
from stillroom.estimates.model_size import ModelSize
from stillroom.estimates.report import CostReport, bytes_text

MEMORY = "memory of a device"

ARITHMETIC = "arithmetic of a token"


def costs_here(device: str, memory_bytes: int | None, costs: Callable[[Hardware], CostReport]) -> dict[str, Any] | str:
    """Costs on the device that a run would take as texts, for a --dry-run; or why they are not told.

    Args:
        device: the name that it gives itself: "NVIDIA H100 80GB HBM3", cpu.
        memory_bytes: its memory; None where it does not tell.
    """
    hardware = Hardware.called(device, memory_bytes)
    if hardware is None:
        return f"not told: {device} is not in the table of devices; `stillroom plan` takes any"
    try:
        return costs(hardware).texts()
    except StillroomError as error:
        return f"not told: {error.what}"


def add_parameters(report: CostReport, who: str, model: ModelSize) -> None:
    """All of a model's parameters, and of a mixture of experts those that a token meets."""
    parts = ("embeddings", "attention", "mlp", "experts", "router", "other", "head")
    text = ", ".join(f"{part} {model.parts[part] / 1e6:,.1f}M" for part in parts if model.parts[part])
    report.add("parameters", who, model.total, "count", f"{model.family}: {text}{', head tied' if model.tied else ''}")
    if model.active < model.total:
        report.add("parameters", f"{who}, active", model.active, "count", "those that a token meets")


def add_memory(
    report: CostReport, parts: Mapping[str, float], hardware: Hardware, notes: Mapping[str, str] | None = None
) -> float:
    """Adds what a device holds at once, by part and in all, and gives the sum."""
    total = sum(parts.values())
    for name, value in parts.items():
        if value:
            report.add(MEMORY, name, value, "bytes", (notes or {}).get(name, ""))
    report.add(MEMORY, "in all", total, "bytes", f"of {hardware.resolved().memory_bytes / 2**30:,.2f} GiB")
    return total


def fit(total: float, hardware: Hardware) -> tuple[bool, str]:
    """Whether so many bytes fit a device, and a sentence that says so."""
    device = hardware.resolved().memory_bytes
    if total <= device:
        return True, f"fits: {bytes_text(total)} of {bytes_text(device)} on each device"
    return False, f"does not fit: {bytes_text(total)} are needed and a device has {bytes_text(device)}"


def add_time(report: CostReport, hardware: Hardware, flops: float, tokens: float | None, why: str) -> None:
    """Tokens a second, and time and cost of all tokens where their number is known.

    Args:
        flops: FLOPs of a token.
        why: the reason for the number of tokens, or for its being unknown.
    """
    section = time_section(hardware)
    report.add(section, "tokens a second", 1 / amount(flops, hardware).time_s, "count")
    report.add(section, "tokens", tokens, "count", why)
    if tokens is not None:
        add_amount(report, hardware, flops * tokens)


def add_amount(report: CostReport, hardware: Hardware, flops: float, note: str = "") -> None:
    """Time and cost of an amount of arithmetic."""
    section, whole = time_section(hardware), amount(flops, hardware)
    report.add(section, "arithmetic", whole.flops, "FLOP", note)
    report.add(section, "time", whole.time_s, "s")
    report.add(section, "device-hours", whole.device_hours, "hours")
    if whole.cost is not None:
        report.add(section, "cost", whole.cost, "$")


def amount(flops: float, hardware: Hardware) -> Estimate:
    return estimate(flops, hardware.resolved(), hardware.num_devices, hardware.utilisation)


def time_section(hardware: Hardware) -> str:
    name, n = hardware.resolved().name, hardware.num_devices
    return f"time on {n} x {name}" if n > 1 else f"time on {name}"

"""Sections that the plans of all verbs have in common: parameters, memory of a device, time."""

from collections.abc import Mapping

from stillroom.estimates.architecture import Architecture
from stillroom.estimates.estimate import Estimate, estimate
from stillroom.estimates.hardware import Hardware
from stillroom.estimates.report import CostReport, bytes_text

MEMORY = "memory of a device"

ARITHMETIC = "arithmetic of a token"


def add_parameters(report: CostReport, who: str, model: Architecture) -> None:
    """All of a model's parameters, and of a mixture of experts those that a token meets."""
    own = model.parameters
    parts = {name: getattr(own, name) for name in ("embeddings", "attention", "mlp", "experts", "router", "head")}
    text = ", ".join(f"{name} {value / 1e6:,.1f}M" for name, value in parts.items() if value)
    report.add("parameters", who, own.total, "count", f"{model.family}: {text}{', head tied' if model.tied else ''}")
    if model.num_experts:
        report.add("parameters", f"{who}, active", model.active.total, "count", "those that a token meets")


def add_memory(
    report: CostReport, parts: Mapping[str, float], hardware: Hardware, notes: Mapping[str, str] | None = None
) -> float:
    """What is there at once, by part, and in all; the sum."""
    total = sum(parts.values())
    for name, value in parts.items():
        if value:
            report.add(MEMORY, name, value, "bytes", (notes or {}).get(name, ""))
    report.add(MEMORY, "in all", total, "bytes", f"of {hardware.found().memory_bytes / 2**30:,.2f} GiB")
    return total


def fit(total: float, hardware: Hardware) -> tuple[bool, str]:
    """Whether so many bytes fit a device, and a sentence that says so."""
    there = hardware.found().memory_bytes
    if total <= there:
        return True, f"fits: {bytes_text(total)} of {bytes_text(there)} on each device"
    return False, f"does not fit: {bytes_text(total)} are needed and a device has {bytes_text(there)}"


def add_time(report: CostReport, hardware: Hardware, flops: float, tokens: float | None, why: str) -> None:
    """Tokens a second, and time and cost of all tokens where their number is known.

    Args:
        flops: of a token.
        why: where the number of tokens comes from, or why it is not known.
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
    return estimate(flops, hardware.found(), hardware.num_devices, hardware.utilisation)


def time_section(hardware: Hardware) -> str:
    name, n = hardware.found().name, hardware.num_devices
    return f"time on {n} x {name}" if n > 1 else f"time on {name}"

"""Devices that can be rented, as their makers' data sheets have them; prices are assumptions."""

import difflib
import os
from dataclasses import dataclass

from stillroom.errors import ConfigError

GB = 10**9


@dataclass(frozen=True)
class Device:
    name: str
    flops: float
    """Floating-point operations a second in bfloat16, dense (float32 on a CPU)."""
    memory_bytes: int
    bandwidth: float
    """Bytes a second between the device and its memory."""
    price: float | None
    """US dollars an hour; None where nothing is assumed."""
    note: str = ""
    """What its figures rest on, where that is no data sheet."""


PRICES_NOTE = "prices are rough on-demand ones of 2025, assumed and not quoted: set price to yours"

DEVICES = {
    device.name: device
    for device in (
        Device("H100", 989.4e12, 80 * GB, 3.35e12, 2.50),
        Device("H200", 989.4e12, 141 * GB, 4.8e12, 3.50),
        Device("A100", 311.9e12, 80 * GB, 2.039e12, 1.60),
        Device("L40S", 362.05e12, 48 * GB, 0.864e12, 0.90),
        Device("RTX4090", 165.2e12, 24 * GB, 1.008e12, 0.45),
        Device("B200", 2250e12, 180 * GB, 7.7e12, 5.00),
        Device("MI300X", 1307.4e12, 192 * GB, 5.3e12, 2.50),
    )
}
"""SXM or OAM modules where there are several forms. A GB is 10⁹ bytes: what is there besides is left to the driver."""

CPU_FLOPS_A_CORE = 160e9
"""Assumed: 2.5 GHz and 64 operations a cycle (two units of 16 numbers that multiply and add), in float32."""

CPU_REACHED = "48 to 91"
"""GFLOP/s a core that runs of this project reached on two machines (LOG.md); the assumed utilisation makes it 56."""


def this_cpu() -> Device:
    """The processor of this machine, with its memory."""
    cores = os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    note = (
        f"CPU is this machine: {cores} cores of an assumed {CPU_FLOPS_A_CORE / 1e9:.0f} GFLOP/s, and its memory; "
        f"measured runs reached {CPU_REACHED} GFLOP/s a core (LOG.md), so set tflops or utilisation to yours"
    )
    return Device("CPU", cores * CPU_FLOPS_A_CORE, memory, 50e9, None, note)


def find_device(name: str) -> Device:
    """A device of the table by its name, in capitals or not.

    Raises:
        ConfigError: it is not in the table.
    """
    plain = name.upper().replace(" ", "").replace("-", "").replace("_", "")
    if plain == "CPU":
        return this_cpu()
    if plain in DEVICES:
        return DEVICES[plain]
    known = [*DEVICES, "CPU"]
    near = difflib.get_close_matches(plain, known, n=1)
    raise ConfigError(
        f"`{name}` is not in the table of devices",
        {**({"did you mean": near[0]} if near else {}), "devices": ", ".join(known)},
        why="Its speed and memory would be made up.",
        fix="Name a device of the table, or the one nearest to yours; `memory_gb` and `tflops` replace its figures.",
    )

"""The settings of a plan that no recipe has: on what a run is made and what is assumed of it.

The devices are those that can be rented, as their makers' data sheets have them; prices are assumptions.
"""

import difflib
import os
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Annotated, Literal

from pydantic import Field, model_validator

from stillroom.config import Config
from stillroom.errors import ConfigError

Parallel = Literal["none", "ddp", "fsdp"]

UTILIZATION = 0.35
"""Assumed share of a device's bfloat16 peak that training reaches."""

DRIVER_BYTES = 2**30
"""Assumed of a GPU: its context, the libraries' workspaces and what the allocator cannot use."""

HEAP_SHARE = 0.5
"""Assumed of a CPU: what glibc keeps of memory that came and went, as a share of the activations. It depends on how
pieces of all sizes come and go, and was 0.2 to 1.8 in the six runs of benchmarks/memory.py, to which this is
fitted; where glibc is told to give all back, it is nothing."""

GB = 10**9


@dataclass(frozen=True)
class Device:
    name: str
    flops: float
    """Floating-point operations a second in bfloat16, dense (float32 on a CPU)."""
    memory_bytes: int
    price: float | None
    """US dollars an hour; None where nothing is assumed."""
    note: str = ""
    """What its figures rest on, where that is no data sheet."""


PRICES_NOTE = "prices are rough on-demand ones of 2025, assumed and not quoted: set price to yours"

DEVICES = {
    device.name: device
    for device in (
        Device("H100", 989.4e12, 80 * GB, 2.50),
        Device("H200", 989.4e12, 141 * GB, 3.50),
        Device("A100", 311.9e12, 80 * GB, 1.60),
        Device("L40S", 362.05e12, 48 * GB, 0.90),
        Device("RTX4090", 165.2e12, 24 * GB, 0.45),
        Device("B200", 2250e12, 180 * GB, 5.00),
        Device("MI300X", 1307.4e12, 192 * GB, 2.50),
    )
}
"""SXM or OAM modules where there are several forms. A GB is 10⁹ bytes: what is there besides is left to the driver."""

CPU_FLOPS_A_CORE = 160e9
"""Assumed: 2.5 GHz and 64 operations a cycle (two units of 16 numbers that multiply and add), in float32."""

CPU_REACHED = "48 to 91"
"""GFLOP/s a core that runs of this project reached on two machines (LOG.md); the assumed utilization makes it 56."""


def this_cpu() -> Device:
    """The processor of this machine, with its memory."""
    cores = os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    note = (
        f"CPU is this machine: {cores} cores of an assumed {CPU_FLOPS_A_CORE / 1e9:.0f} GFLOP/s, and its memory; "
        f"measured runs reached {CPU_REACHED} GFLOP/s a core (LOG.md), so set tflops or utilisation to yours"
    )
    return Device("CPU", cores * CPU_FLOPS_A_CORE, memory, None, note)


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


Devices = Annotated[int, Field(gt=0, le=100_000)]


class Hardware(Config):
    """On what a run is made, and what is assumed of it. All other settings are the recipe's."""

    device: str = "H100"
    """H100, H200, A100, L40S, RTX4090, B200, MI300X, or CPU, which is this machine."""
    num_devices: Devices = 1
    """How many of them."""
    parallel: Literal["auto", "none", "ddp", "fsdp"] = "auto"
    """How these divide the work: DDP, each with all of the model; or FSDP2, each with a part. auto is fsdp where there
    are several."""
    utilisation: Annotated[float, Field(gt=0, le=1)] = UTILIZATION
    """Share of the device's peak that is reached; an assumption."""
    price: Annotated[float, Field(ge=0, le=10_000)] | None = None
    """US dollars for a device and hour; null takes an assumed one."""
    memory_gb: Annotated[float, Field(gt=0, le=100_000)] | None = None
    """Memory of a device in 10⁹ bytes; null is that of the table."""
    tflops: Annotated[float, Field(gt=0, le=1e6)] | None = None
    """Its peak in 10¹² operations a second; null is that of the table."""
    states: Literal["float32", "int8"] = "float32"
    """AdamW's moments; int8 tells what an 8-bit optimizer would take."""
    data_tokens: Annotated[float, Field(ge=1, le=1e18)] | None = None
    """Tokens in one pass over the data, where no header tells; such as 5e8."""
    students: Annotated[int, Field(gt=0, le=10_000)] = 1
    """Students that are to learn from the same teacher on the same data, for asking it live or once."""

    @model_validator(mode="after")
    def _fits_together(self) -> "Hardware":
        if self.num_devices > 1 and self.parallel == "none":
            raise ValueError("with parallel=none one device does all of the work: several need ddp or fsdp")
        return self

    def resolved(self) -> Device:
        """The device of the table, with what is set in the place of its figures.

        Raises:
            ConfigError: it is not in the table.
        """
        device = find_device(self.device)
        if self.memory_gb is not None:
            device = replace(device, memory_bytes=int(self.memory_gb * 1e9))
        if self.tflops is not None:
            device = replace(device, flops=self.tflops * 1e12)
        return device if self.price is None else replace(device, price=self.price)

    @classmethod
    def called(cls, name: str, memory_bytes: int | None = None) -> "Hardware | None":
        """The device of the table that calls itself so ("NVIDIA H100 80GB HBM3"), with the memory that it has; None
        where there is none."""
        plain = name.upper().replace(" ", "")
        found = next((known for known in (*DEVICES, "CPU") if known in plain), None)
        if found is None or "LAPTOP" in plain:
            return None
        return cls(device=found, memory_gb=None if memory_bytes is None else memory_bytes / 1e9)

    def refuse(self, verb: str, names: Collection[str]) -> None:
        """Raises ConfigError where a setting is not what it is by default and a verb has no use for it."""
        for name in names:
            if (value := getattr(self, name)) != type(self).model_fields[name].default:
                raise ConfigError(
                    f"a plan of `{verb}` has no use for {name}",
                    {name: value, "without use there": ", ".join(names)},
                    why="Its figures would look as if they followed from it.",
                    fix="Leave it out.",
                )

    @property
    def is_cpu(self) -> bool:
        return self.device.upper() == "CPU"

    @property
    def how_parallel(self) -> Parallel:
        if self.parallel != "auto":
            return self.parallel
        return "fsdp" if self.num_devices > 1 else "none"

    @property
    def driver_bytes(self) -> int:
        return 0 if self.is_cpu else DRIVER_BYTES

    @property
    def heap_share(self) -> float:
        return HEAP_SHARE if self.is_cpu else 0.0

    def assumptions(self, *, single: bool = False) -> list[str]:
        """What the figures rest on besides configs and headers.

        Args:
            single: something is computed in float32, also on a GPU.
        """
        device = self.resolved()
        found = [
            f"{device.name}: {device.flops / 1e12:,.4g} TFLOP/s in {'float32' if self.is_cpu else 'bfloat16, dense'}, "
            f"of which {self.utilisation:.0%} are reached (utilisation)"
        ]
        if single and not self.is_cpu:
            found.append("what is computed in float32 is slower than this peak: its time is a lower bound")
        if device.note and self.tflops is None:
            found.append(device.note)
        if device.price is not None and self.price is None:
            found.append(f"${device.price:.2f} for a device and hour: {PRICES_NOTE}")
        if not self.is_cpu:
            found.append(f"{DRIVER_BYTES / 2**30:.0f} GiB of a device for its driver, workspaces and fragments")
        if self.states == "int8":
            found.append("8-bit moments are arithmetic alone: runs have AdamW in float32")
        return found

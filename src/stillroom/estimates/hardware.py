"""The settings of a plan that no recipe has: on what a run is made, and what is assumed of it."""

from collections.abc import Collection
from dataclasses import replace
from typing import Annotated, Literal

from pydantic import Field, model_validator

from stillroom.config import Config
from stillroom.errors import ConfigError
from stillroom.estimates.devices import DEVICES, PRICES_NOTE, Device, find_device
from stillroom.estimates.estimate import UTILISATION
from stillroom.estimates.memory import DRIVER_BYTES, HEAP_SHARE, Parallel

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
    utilisation: Annotated[float, Field(gt=0, le=1)] = UTILISATION
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

    def found(self) -> Device:
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
        device = self.found()
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

"""How a run lies on its processes, where the settings leave it open; and whether it fits there."""

import os
from typing import Any

from stillroom.config import replace
from stillroom.distill.config import DistillConfig
from stillroom.distill.estimate import load_of
from stillroom.distributed.config import AutoParallelConfig, FsdpConfig, NoParallelConfig
from stillroom.distributed.init import DistContext
from stillroom.errors import ConfigError, OutOfMemoryError
from stillroom.estimates.hardware import Hardware
from stillroom.estimates.headers import Headers
from stillroom.estimates.memory import memory, nearest
from stillroom.estimates.report import bytes_text
from stillroom.teachers.config import LiveTeacherConfig

SPARE = 0.1
"""Share of a device's memory that a choice leaves free: plans are that far from what is measured."""


def resolve_parallel(
    config: DistillConfig, known: Headers | None, context: DistContext, memory_bytes: int
) -> DistillConfig:
    """The settings with every "auto" of ``parallel`` and ``teacher.placement`` resolved.

    Args:
        known: what headers tell of the models; None where a size is not known, and nothing is foreseen.
        memory_bytes: of one process.

    Raises:
        ConfigError: several processes were started for a run that is to have one.
        OutOfMemoryError: it will not fit.
    """
    size = context.num_trainers
    if isinstance(config.parallel, NoParallelConfig) and size > 1:
        raise ConfigError(
            f"{size} processes were started for a run of one",
            {"processes that train": size, "parallel.kind": "none"},
            why="Each would train the whole of it and write into the same folder.",
            fix="Set parallel.kind=auto, or start one process.",
        )
    if isinstance(config.parallel, AutoParallelConfig):
        kind = "none" if size == 1 else _kind(config, known, size, memory_bytes)
        kept = {} if size == 1 else {"timeout_s": config.parallel.timeout_s}
        config = replace(config, {"parallel": {"kind": kind, **kept}})
    config = _resolve_teacher(config, known, context, memory_bytes)
    if size > 1 and known is not None:
        _check_room(config, known, size, memory_bytes)
    if config.checkpoints.background == "auto":
        config = replace(config, {"checkpoints.background": config.device.startswith("cuda")})
    return config


def _kind(config: DistillConfig, known: Headers | None, size: int, memory_bytes: int) -> str:
    if known is None:
        return "fsdp"
    needed = memory(load_of(config, known, _hardware(config, size, "ddp"))).total
    return "ddp" if needed <= (1 - SPARE) * memory_bytes else "fsdp"


def _resolve_teacher(
    config: DistillConfig, known: Headers | None, context: DistContext, memory_bytes: int
) -> DistillConfig:
    teacher = config.teacher
    if not isinstance(teacher, LiveTeacherConfig) or teacher.placement != "auto":
        return config
    if teacher.quantization is not None:
        return replace(config, {"teacher.placement": "whole"})
    placement = "sharded" if isinstance(config.parallel, FsdpConfig) and context.num_trainers > 1 else "whole"
    if teacher.ranks is not None:
        weights = 0.0 if known is None else known.models["teacher"].total
        fits = weights * (2 if teacher.dtype == "bfloat16" else 4) <= (1 - 2 * SPARE) * memory_bytes
        placement = "whole" if fits or context.num_teachers <= 1 else "sharded"
    return replace(config, {"teacher.placement": placement})


def _check_room(config: DistillConfig, known: Headers, size: int, memory_bytes: int) -> None:
    load = load_of(config, known, _hardware(config, size, config.parallel.kind))
    needed = memory(load).total
    if needed > memory_bytes * (1 + SPARE) and not getattr(config.parallel, "offload", False):
        raise OutOfMemoryError(
            f"the run does not fit {size} processes",
            {"needed in each": bytes_text(needed), "there": bytes_text(memory_bytes)},
            why="It would end at its first long batch if not at its first step.",
            fix=f"By the plan: {nearest(load, memory_bytes)}. With parallel={{kind: fsdp, offload: true}} the CPU's "
            "memory holds the training state.",
        )


def _hardware(config: DistillConfig, size: int, kind: Any) -> Hardware:
    """So many of the run's devices; its speed does not matter here."""
    return Hardware(device="CPU" if config.device == "cpu" else "H100", num_devices=size, parallel=kind)


def memory_of_a_process(device: str) -> int:
    """Bytes that one of this host's processes has for itself."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.get_device_properties(device).total_memory
    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return pages // int(os.environ.get("LOCAL_WORLD_SIZE", "1") or 1)

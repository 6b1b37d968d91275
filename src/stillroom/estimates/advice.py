"""Advice: the nearest settings with which a load fits a device."""

from collections.abc import Callable, Iterator
from dataclasses import replace

from stillroom.estimates.memory import Load, halved, memory
from stillroom.estimates.report import bytes_text

MOST_DEVICES = 1024


def nearest(load: Load, memory_bytes: float) -> str:
    """What to change of a load that does not fit, so that it does; the fewest changes first."""
    for changes in _ways():
        changed, words = load, []
        for change in changes:
            step = change(changed, memory_bytes)
            if step is None:
                break
            changed, word = step
            words.append(word)
        else:
            total = memory(changed).total
            if total <= memory_bytes:
                return f"would fit with {' and '.join(words)}: {bytes_text(total)}"
    return f"no smaller micro-batch, checkpointing, store or FSDP over up to {MOST_DEVICES} devices is enough"


Change = Callable[[Load, float], tuple[Load, str] | None]
"""A load with one setting changed, and the setting in words; None where there is nothing to change."""


def _ways() -> Iterator[tuple[Change, ...]]:
    """One change, two, three, and all."""
    yield (_smaller,)
    yield (_checkpointing,)
    yield (_offline,)
    yield (_checkpointing, _smaller)
    yield (_offline, _smaller)
    yield (_offline, _checkpointing)
    yield (_offline, _checkpointing, _smaller)
    yield (_sharded,)
    yield (_checkpointing, _sharded)
    yield (_checkpointing, _one_row, _sharded)
    yield (_offline, _checkpointing, _one_row, _sharded)


def _smaller(load: Load, memory_bytes: float) -> tuple[Load, str] | None:
    """Halves the micro-batch until the rest fits, or one row is left."""
    if load.tokens <= load.length:
        return None
    while load.tokens > load.length and memory(load).total > memory_bytes:
        load = halved(load)
    return load, f"batch.micro_tokens={load.tokens}"


def _one_row(load: Load, memory_bytes: float) -> tuple[Load, str] | None:  # noqa: ARG001
    if load.tokens <= load.length:
        return load, "a row at a time"
    batches = load.micro_batches * (load.tokens // load.length)
    return replace(load, micro_tokens=load.length, micro_batches=batches), f"batch.micro_tokens={load.length}"


def _checkpointing(load: Load, memory_bytes: float) -> tuple[Load, str] | None:  # noqa: ARG001
    return None if load.checkpointing else (replace(load, checkpointing=True), "student.gradient_checkpointing=true")


def _offline(load: Load, memory_bytes: float) -> tuple[Load, str] | None:  # noqa: ARG001
    if load.teacher is None:
        return None
    stored = replace(load, teacher=None, stored_entries=20.0)
    return stored, "what `stillroom capture` stores of the teacher (teacher.kind=store)"


def _sharded(load: Load, memory_bytes: float) -> tuple[Load, str] | None:
    """The fewest devices, by doubling, over which FSDP makes it fit."""
    count = 2 * load.num_devices if load.parallel == "fsdp" else max(2, load.num_devices)
    while count <= MOST_DEVICES:
        spread = replace(load, parallel="fsdp", num_devices=count)
        if memory(spread).total <= memory_bytes:
            return spread, f"parallel=fsdp over num_devices={count}"
        count *= 2
    return None

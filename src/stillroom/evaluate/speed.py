"""Speed: how fast a model scores a text, and what memory that takes. Measured, so never twice the same."""

import ctypes
import time
from collections.abc import Iterable
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from stillroom.batch import Batch
from stillroom.evaluate.scoring import Limits
from stillroom.losses.fused_linear import Buffers, linear_losses
from stillroom.losses.logits import cross_entropy
from stillroom.losses.objective import Objective
from stillroom.models.hidden_states import last_hidden_states, lm_head

MOST_S = 5.0
"""Seconds after which no further batch is begun."""


class Speed(NamedTuple):
    tokens_per_s: float
    """Positions that were read, padding not counted."""
    peak_memory_bytes: int | None
    """The model's weights, and the most that was held besides while it scored; None where the system does not tell."""


@torch.no_grad()
def measure_speed(model: PreTrainedModel, some: Iterable[Batch], limits: Limits, *, columns: int) -> Speed:
    """Cross-entropy of a text by the model alone: of its first batch once to warm up, then of every batch until five
    seconds have passed. Weights are counted as they lie in memory."""

    def cross_entropies(batch: Batch, buffers: Buffers) -> None:
        moved = batch.to(limits.device)
        hidden = last_hidden_states(model, moved).flatten(0, 1)[moved.kept]
        linear_losses(
            hidden,
            lm_head(model),
            [Objective("cross_entropy", cross_entropy)],
            moved.labels.flatten()[moved.kept],
            hidden.new_zeros(len(hidden)),
            vocab_size=columns,
            chunk_bytes=limits.logits_bytes,
            buffers=buffers,
        )

    others = iter(some)
    first = next(others)
    cross_entropies(first, Buffers())
    memory = _CudaMemory(limits.device) if limits.device.startswith("cuda") else _ProcessMemory()
    num_tokens, start, buffers = 0, time.perf_counter(), Buffers()
    for batch in chain([first], others):
        cross_entropies(batch, buffers)
        memory.wait()
        num_tokens += int((batch.documents >= 0).sum())
        if time.perf_counter() - start > MOST_S:
            break
    seconds = time.perf_counter() - start
    weights = sum(t.nbytes for t in {t.data_ptr(): t for t in [*model.parameters(), *model.buffers()]}.values())
    grown = memory.grown()
    return Speed(num_tokens / seconds, None if grown is None else weights + grown)


class _CudaMemory:
    def __init__(self, device: str) -> None:
        self.device = device
        self.wait()
        torch.cuda.reset_peak_memory_stats(device)
        self.before = torch.cuda.memory_allocated(device)

    def wait(self) -> None:
        torch.cuda.synchronize(self.device)

    def grown(self) -> int:
        return torch.cuda.max_memory_allocated(self.device) - self.before


class _ProcessMemory:
    """What the process holds; only Linux lets its high-water mark be set back."""

    def __init__(self) -> None:
        self.before = None
        with suppress(OSError, AttributeError):  # memory that was freed and not given back would count as held
            ctypes.CDLL(None).malloc_trim(0)
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
            self.before = _of_status("VmRSS")

    def wait(self) -> None:
        """Nothing is under way on a CPU when a call returns."""

    def grown(self) -> int | None:
        return None if self.before is None else max(0, _of_status("VmHWM") - self.before)


def _of_status(key: str) -> int:
    """A size that /proc/self/status tells, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))

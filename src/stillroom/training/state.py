"""What is trained, as the loop sees it, and all the state that training changes."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from stillroom.batch import Batch
from stillroom.distributed.group import SINGLE_RANK, RankGroup
from stillroom.signals import TeacherOutput
from stillroom.training.prefetch import Prefetcher


class StepResult(NamedTuple):
    loss: Float[Tensor, ""]
    """This micro-batch's part of the step's loss: the parts of a step, over all ranks, add up to the whole."""
    sums: Float[Tensor, " terms"]
    """The sum of each term over what the module counts, without weights."""


class TrainedModule(nn.Module, ABC):
    """The one module that is trained. The loop knows nothing else of what a run trains."""

    counts: str = "num_kept"
    """What a step's loss is a mean over: a field of the step's totals, and its column in metrics.jsonl."""

    @property
    @abstractmethod
    def columns(self) -> list[str]:
        """The column in metrics.jsonl of each term, with its unit, in the order of ``StepResult.sums``."""

    @abstractmethod
    def scheduled_columns(self, *scheduled: Any) -> dict[str, float]:
        """Returns the columns of metrics.jsonl that tell what a schedule gave ``forward`` in a step."""

    @abstractmethod
    def forward(
        self, batch: Batch, teacher_output: TeacherOutput | None, num_counted_of_step: int, *scheduled: Any
    ) -> StepResult:
        """Computes one micro-batch of a step.

        Args:
            num_counted_of_step: what the module counts, in all micro-batches of the step on all ranks.
            scheduled: what the run's schedule gives for this step, where it has one.
        """


@dataclass
class TrainState:
    """All that training changes."""

    module: TrainedModule
    optimizer: torch.optim.Optimizer
    schedule: LRScheduler
    stream: Prefetcher
    step: int = 0
    """The number of optimizer steps done."""
    num_tokens: int = 0
    """The number of kept positions trained on so far."""
    time_s: float = 0.0
    """The time spent in steps so far."""
    held_out: dict[str, float] = field(default_factory=dict)
    """The last held-out measurement."""
    measured_at: int = 0
    """The step after which it was made."""
    best: dict[str, float] = field(default_factory=dict)
    """The held-out loss at the best step, with ``step``."""
    frozen_saved: bool = True
    """Whether frozen parameters belong into a checkpoint; a student with adapters gets them from its own folder."""
    ranks: RankGroup = SINGLE_RANK
    """The processes that train together."""
    parallel: nn.Module | None = None
    """The DDP module that is called in place of ``module`` in training, where there is one."""
    place: torch.device | None = None
    """Where batches go; None is where the parameters are."""
    late: bool = False
    """Whether a step's numbers are read when the next step has been launched, so that a device need not wait for the
    host, and not before the step's own update. The optimizer must then be a fused one."""
    read_at: float = 0.0
    """The time when a step was last read, on the clock of `time.perf_counter`."""
    stopped_by: int = 0
    """The operating system's signal that asked for an end, or 0."""

    @property
    def device(self) -> torch.device:
        return self.place or next(self.module.parameters()).device

    @property
    def forward(self) -> nn.Module:
        """The trained module as it is called in training."""
        return self.parallel or self.module

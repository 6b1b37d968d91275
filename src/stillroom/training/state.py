"""The module that is trained, as the loop sees it; all the state that training changes; the optimizer and the
learning-rate schedule."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

from stillroom.batch import Batch
from stillroom.distributed.group import SINGLE_RANK, RankGroup
from stillroom.signals import TeacherOutput
from stillroom.training.config import AdamWConfig
from stillroom.training.prefetch import Prefetcher


class StepResult(NamedTuple):
    loss: Float[Tensor, ""]
    """This micro-batch's part of the step's loss: the parts of a step, over all ranks, add up to the whole."""
    sums: Float[Tensor, " terms"]
    """The sum of each term over what the module counts, without weights."""


class TrainedModule(nn.Module, ABC):
    """The one module that is trained. The loop knows nothing else of what a run trains."""

    counts: str = "num_kept"
    """The things that a step's loss is a mean over: a field of the step's totals, and a column of metrics.jsonl."""

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
    metrics: dict[str, int] | None = None
    """The seal of what metrics.jsonl said when the state was saved that it was set to."""
    frozen_saved: bool = True
    """Whether frozen parameters belong into a checkpoint; a student with adapters gets them from its own folder."""
    ranks: RankGroup = SINGLE_RANK
    """The processes that train together."""
    parallel: nn.Module | None = None
    """The DDP module that is called in place of ``module`` in training, where there is one."""
    place: torch.device | None = None
    """The device where batches go; None is where the parameters are."""
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


def build_optimizer(module: nn.Module, config: AdamWConfig) -> torch.optim.Optimizer:
    """Builds AdamW over what is trained. Matrices decay; norms and biases (one dimension or none) do not."""
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        fused=True,
    )


def skip_updates(optimizer: torch.optim.Optimizer, wanted: Tensor | None) -> None:
    """Has the fused AdamW leave parameters, moments and its step counters as they are, from now on where ``wanted``, a
    boolean [], is true. It is read on its device by the update itself. None ends the skipping."""
    before, flag = getattr(optimizer, "found_inf", None), None  # the name that torch's optimizers look for
    if wanted is not None:
        flag = wanted.float() if before is None else torch.maximum(before, wanted.float())
    setattr(optimizer, "found_inf", flag)  # noqa: B010  # the class does not declare it


def build_schedule(optimizer: torch.optim.Optimizer, config: AdamWConfig, num_steps: int) -> LRScheduler:
    """Builds the schedule: a linear warm-up, then cosine or linear decay to 0 at ``num_steps``, or a constant."""
    name = "constant_with_warmup" if config.schedule == "constant" else config.schedule
    return get_scheduler(name, optimizer, round(config.warmup * num_steps), num_steps)

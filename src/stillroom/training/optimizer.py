"""The optimizer with its parameter groups, and the learning-rate schedule."""

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

from stillroom.training.config import AdamWConfig


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

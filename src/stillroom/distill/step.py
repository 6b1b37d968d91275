"""The student step: the one module that is trained. Backbone, head and losses all run inside its forward."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from stillroom import models
from stillroom.batch import Batch
from stillroom.losses.linear import Buffers, linear_losses
from stillroom.losses.objective import Measure, Objective
from stillroom.losses.reduce import position_weights
from stillroom.signals import Signal


class StepResult(NamedTuple):
    loss: Float[Tensor, ""]
    """This micro-batch's part of the step's loss in nats per kept token; the parts of a step add up to the whole."""
    sums: Float[Tensor, " terms"]
    """Σ over kept positions of each objective's nats, then of each measure, without weights."""


class StudentStep(nn.Module):
    """``forward(batch, signal, num_kept_of_step, objectives) -> StepResult``.

    Args:
        model: the student.
        objectives: what is minimised, unless forward is given others of the same names: those of a schedule.
        num_columns: how many columns of the heads are compared; all of them where None.
        logits_bytes: budget for the logits that are held at a time.
        precision: the type of the student's arithmetic; its weights keep theirs.
        measures: what is reported besides.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        objectives: Sequence[Objective],
        *,
        num_columns: int | None,
        logits_bytes: int,
        precision: torch.dtype = torch.float32,
        measures: Sequence[Measure] = (),
    ) -> None:
        super().__init__()
        self.model = model
        self.objectives, self.measures = tuple(objectives), tuple(measures)
        self.num_columns, self.logits_bytes, self.precision = num_columns, logits_bytes, precision
        self.logit_buffers = Buffers()

    def forward(
        self,
        batch: Batch,
        signal: Signal | None,
        num_kept_of_step: int,
        objectives: Sequence[Objective] | None = None,
    ) -> StepResult:
        mixed = self.precision != torch.float32
        with torch.autocast(batch.tokens.device.type, dtype=self.precision if mixed else None, enabled=mixed):
            hidden = models.hidden_states(self.model, batch).flatten(0, 1)[batch.kept]
            losses = linear_losses(
                hidden,
                models.head(self.model),
                self.objectives if objectives is None else objectives,
                batch.next_tokens.flatten()[batch.kept],
                position_weights(batch, num_kept_of_step),
                signal,
                num_columns=self.num_columns,
                measures=self.measures,
                chunk_bytes=self.logits_bytes,
                buffers=self.logit_buffers,
                data_weights=None if batch.weights is None else batch.weights.flatten()[batch.kept],
            )
        return StepResult(losses.total, torch.cat([losses.nats, losses.measures]).sum(-1))

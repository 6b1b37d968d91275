"""The student step: the one module that is trained. Backbone, head, projectors and losses run inside its forward."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from stillroom.batch import Batch
from stillroom.losses.fused_linear import Buffers, linear_losses
from stillroom.losses.objective import Measure, Objective, position_weights
from stillroom.models import hidden_states
from stillroom.models.hidden_states import lm_head
from stillroom.signals import TeacherOutput
from stillroom.training.hidden_objective import HiddenLoss, layers_of
from stillroom.training.state import StepResult, TrainedModule

T = TypeVar("T")


class StudentStep(TrainedModule):
    """Minimizes losses of the next token's distribution and of hidden states. It counts kept positions.

    Args:
        model: the student.
        objectives: the losses of the next token's distribution, unless forward is given others of the same names, those
            of a schedule.
        vocab_size: how many columns of the heads are compared; all of them where None.
        logits_bytes: budget for the logits that are held at a time.
        precision: the type of the student's arithmetic; its weights keep theirs.
        hidden: the losses of hidden states.
        hidden_weights: their weights, 1 by default.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        objectives: Sequence[Objective],
        *,
        vocab_size: int | None,
        logits_bytes: int,
        precision: torch.dtype = torch.float32,
        hidden: Sequence[HiddenLoss] = (),
        hidden_weights: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.objectives = tuple(objectives)
        self.vocab_size, self.logits_bytes, self.precision = vocab_size, logits_bytes, precision
        self.logit_buffers = Buffers()
        self.hidden = nn.ModuleDict({term.spec.name: term for term in hidden})
        self.hidden_weights = {term.spec.name: 1.0 for term in hidden} | dict(hidden_weights or {})
        self.layers, self.attention = layers_of([term.spec for term in hidden], 0)

    @property
    def columns(self) -> list[str]:
        """The columns of the objectives' values with their units; distances of hidden states have their own."""
        return [f"{objective.name}_{objective.unit}" for objective in self.objectives] + [
            f"{name}_distance" for name in self.hidden
        ]

    def scheduled_columns(self, *scheduled: Any) -> dict[str, float]:
        objectives, hidden_weights = scheduled
        columns = {f"{o.name}_weight": o.weight for o in objectives}
        columns |= {f"{name}_weight": weight for name, weight in hidden_weights.items()}
        return columns | {
            f"{o.name}_temperature": t for o in objectives if (t := o.arguments.get("temperature")) is not None
        }

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]  # what is scheduled has names here
        self,
        batch: Batch,
        teacher_output: TeacherOutput | None,
        num_counted_of_step: int,
        objectives: Sequence[Objective] | None = None,
        hidden_weights: Mapping[str, float] | None = None,
        measures: Sequence[Measure] = (),
    ) -> StepResult:
        """Computes one micro-batch.

        Args:
            objectives, hidden_weights: those of a schedule, in the place of its own.
            measures: what is computed besides of the next token's distribution; their sums come after the terms'.
        """
        signal, of_teacher = teacher_output or TeacherOutput()
        weights = position_weights(batch, num_counted_of_step)
        data_weights = None if batch.weights is None else batch.weights.flatten()[batch.kept]
        mixed = self.precision not in (torch.float32, torch.float64)
        with torch.autocast(batch.tokens.device.type, dtype=self.precision if mixed else None, enabled=mixed):
            last, inner = hidden_states.all_hidden_states(self.model, batch, self.layers, self.attention)
            losses = linear_losses(
                last,
                lm_head(self.model),
                self.objectives if objectives is None else objectives,
                batch.labels.flatten()[batch.kept],
                weights,
                signal,
                vocab_size=self.vocab_size,
                measures=measures,
                chunk_bytes=self.logits_bytes,
                buffers=self.logit_buffers,
                data_weights=data_weights,
            )
        if not self.hidden:
            return StepResult(losses.total, torch.cat([losses.nats, losses.measures]).sum(-1))
        assert of_teacher is not None  # a teacher gives what the objectives need
        total, distances = losses.total, []
        for name, term in self.hidden.items():
            assert isinstance(term, HiddenLoss)
            counts = weights * data_weights if data_weights is not None and term.spec.by_data else weights
            part, distance = term(inner, of_teacher, documents_of(batch), counts)
            total = total + (self.hidden_weights if hidden_weights is None else hidden_weights)[name] * part
            distances.append(distance)
        sums = [losses.nats.sum(-1), torch.stack(distances), losses.measures.sum(-1)]
        return StepResult(total, torch.cat(sums))

    def within(self, function: Callable[[], T]) -> T:
        """Returns what a function of the model gives, with all parameters in place: where they are sharded over
        processes, the model may be used here and in forward alone."""
        return function()


def documents_of(batch: Batch) -> Int[Tensor, " kept"]:
    """Returns a number for each kept position that is its document's alone in the batch."""
    return (batch.positions == 0).flatten().cumsum(0)[batch.kept]

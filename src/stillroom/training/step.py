"""The student step: the one module that is trained. Backbone, head, projectors and losses run inside its forward."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from stillroom.batch import Batch
from stillroom.losses.fused_linear import Buffers, linear_losses
from stillroom.losses.objective import Measure, Objective, position_weights
from stillroom.models import hidden_states
from stillroom.models.hidden_states import lm_head
from stillroom.signals import TeacherOutput
from stillroom.training.hidden_objective import HiddenLoss, layers_of

T = TypeVar("T")


class StepResult(NamedTuple):
    loss: Float[Tensor, ""]
    """This micro-batch's part of the step's loss in nats per kept token; the parts of a step add up to the whole."""
    sums: Float[Tensor, " terms"]
    """Σ over kept positions of each objective's nats, then of each distance of hidden states, then of each measure,
    without weights: of what ``StudentStep.terms`` names."""


class StudentStep(nn.Module):
    """``forward(batch, told, num_kept_of_step, objectives, hidden_weights, measures) -> StepResult``.

    Args:
        model: the student.
        objectives: what is minimised of the next token's distribution, unless forward is given others of the same
            names: those of a schedule.
        vocab_size: how many columns of the heads are compared; all of them where None.
        logits_bytes: budget for the logits that are held at a time.
        precision: the type of the student's arithmetic; its weights keep theirs.
        hidden: what is minimised of the inner states, with the weight of each.
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
    def terms(self) -> list[str]:
        """The names of the objectives in the order of the sums, without the measures."""
        return [objective.name for objective in self.objectives] + list(self.hidden)

    def forward(
        self,
        batch: Batch,
        teacher_output: TeacherOutput | None,
        num_kept_of_step: int,
        objectives: Sequence[Objective] | None = None,
        hidden_weights: Mapping[str, float] | None = None,
        measures: Sequence[Measure] = (),
    ) -> StepResult:
        """One micro-batch.

        Args:
            objectives, hidden_weights: others than its own.
            measures: what is told besides of the next token's distribution, after the terms.
        """
        signal, of_teacher = teacher_output or TeacherOutput()
        weights = position_weights(batch, num_kept_of_step)
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
        assert of_teacher is not None  # a teacher tells what the objectives need
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
        """What a function of the model makes, with all parameters in place: where they are sharded over processes, the
        model may be used here and in forward alone."""
        return function()


def documents_of(batch: Batch) -> Int[Tensor, " kept"]:
    """A number for each kept position that is its document's alone in the batch."""
    return (batch.positions == 0).flatten().cumsum(0)[batch.kept]

"""A teacher that runs in this process."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from stillroom.batch import Batch
from stillroom.layers import Layer
from stillroom.models import hidden_states
from stillroom.models.hidden_states import lm_head
from stillroom.signals import Dense, TeacherOutput


class LiveTeacher:
    """A model that never trains: in evaluation mode, without gradients, apart from the student's parameters.

    Args:
        layers: those whose states it tells besides.
        attention: the blocks whose queries, keys and values it tells besides.
    """

    def __init__(self, model: PreTrainedModel, layers: Sequence[Layer] = (), attention: Sequence[int] = ()) -> None:
        self.model = model.eval().requires_grad_(False)
        self.layers, self.attention = layers, attention

    def set_outputs(self, layers: Sequence[Layer], attention: Sequence[int]) -> None:
        """Has it tell other inner states from now on."""
        self.layers, self.attention = layers, attention

    def prefetch(self, batch: Batch) -> None:  # noqa: ARG002
        return None

    @torch.no_grad()
    def forward(self, batch: Batch, prefetch: TeacherOutput | None = None) -> TeacherOutput:  # noqa: ARG002
        """Its last hidden states with its head, and its inner states."""
        last, inner = hidden_states.all_hidden_states(self.model, batch, self.layers, self.attention)
        return TeacherOutput(Dense(last, lm_head(self.model)), inner)

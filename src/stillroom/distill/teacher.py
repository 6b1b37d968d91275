"""The live teacher: a frozen model that says what it thinks of each batch."""

import torch
from transformers import PreTrainedModel

from stillroom import models
from stillroom.batch import Batch
from stillroom.signals import Dense


class LiveTeacher:
    """A model that never trains: in evaluation mode, without gradients, apart from the student's parameters."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model.eval().requires_grad_(False)

    @torch.no_grad()
    def signal(self, batch: Batch) -> Dense:
        """Its last hidden states at the kept positions, and its head."""
        hidden = models.hidden_states(self.model, batch)
        return Dense(hidden.flatten(0, 1)[batch.kept], models.head(self.model))

"""Teachers: a live one, which says what it thinks of each batch, and a store of what one said once."""

from collections.abc import Iterator
from typing import Protocol

import torch
from transformers import PreTrainedModel

from stillroom import models
from stillroom.batch import Batch
from stillroom.signals import Dense, Logits, Signal, Sparse
from stillroom.store.config import Full
from stillroom.store.quantise import to_sparse
from stillroom.store.reader import Store


class Teacher(Protocol):
    """Gives a batch's signal in two steps, so that the first can be made ahead, by another thread."""

    def read(self, batch: Batch) -> Signal | None:
        """What can be had without the device: a stored signal, on the CPU."""

    def signal(self, batch: Batch, read: Signal | None) -> Signal:
        """The signal of the batch's kept positions, on the batch's device."""
        ...


class LiveTeacher:
    """A model that never trains: in evaluation mode, without gradients, apart from the student's parameters."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model.eval().requires_grad_(False)

    def read(self, batch: Batch) -> None:  # noqa: ARG002
        return None

    @torch.no_grad()
    def signal(self, batch: Batch, read: Signal | None = None) -> Dense:  # noqa: ARG002
        """Its last hidden states at the kept positions, and its head."""
        hidden = models.hidden_states(self.model, batch)
        return Dense(hidden.flatten(0, 1)[batch.kept], models.head(self.model))


class StoredTeacher:
    """The signals of a store whose documents the batches hold."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def read(self, batch: Batch) -> Logits | Sparse:
        """The stored signals of the batch's documents.

        Raises:
            DataError: a row is damaged.
        """
        documents = list(_documents(batch))
        if isinstance(self.store.signal_config, Full):
            return Logits(torch.from_numpy(self.store.logits(documents).copy()))
        return to_sparse(self.store.levels(documents), self.store.signal_config, self.store.manifest.num_columns)

    def signal(self, batch: Batch, read: Signal | None = None) -> Signal:
        read = self.read(batch) if read is None else read
        return read.to(batch.tokens.device)


def _documents(batch: Batch) -> Iterator[int]:
    """The documents of a batch in the order of its positions."""
    for row in batch.documents:
        yield from (d for d in row.unique_consecutive().tolist() if d >= 0)

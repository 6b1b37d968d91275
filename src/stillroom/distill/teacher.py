"""Teachers: a live one, which says what it thinks of each batch, and a store of what one said once."""

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from transformers import PreTrainedModel

from stillroom import models, states
from stillroom.batch import Batch
from stillroom.layers import Layer
from stillroom.signals import Dense, Hidden, Logits, Sparse, Told
from stillroom.store.config import Full
from stillroom.store.quantise import to_sparse
from stillroom.store.reader import Store


class Teacher(Protocol):
    """Tells of a batch in two steps, so that the first can be made ahead, by another thread."""

    def read(self, batch: Batch) -> Told | None:
        """What can be had without the device: what is stored, on the CPU."""

    def tell(self, batch: Batch, read: Told | None = None) -> Told:
        """Of the batch's kept positions, on the batch's device."""
        ...


class LiveTeacher:
    """A model that never trains: in evaluation mode, without gradients, apart from the student's parameters.

    Args:
        layers: those whose states it tells besides.
        attention: the blocks whose queries, keys and values it tells besides.
    """

    def __init__(self, model: PreTrainedModel, layers: Sequence[Layer] = (), attention: Sequence[int] = ()) -> None:
        self.model = model.eval().requires_grad_(False)
        self.layers, self.attention = layers, attention

    def ask_for(self, layers: Sequence[Layer], attention: Sequence[int]) -> None:
        """Has it tell other inner states from now on."""
        self.layers, self.attention = layers, attention

    def read(self, batch: Batch) -> None:  # noqa: ARG002
        return None

    @torch.no_grad()
    def tell(self, batch: Batch, read: Told | None = None) -> Told:  # noqa: ARG002
        """Its last hidden states with its head, and its inner states."""
        last, inner = states.hidden_and_inner(self.model, batch, self.layers, self.attention)
        return Told(Dense(last, models.head(self.model)), inner)


class StoredTeacher:
    """What is in a store whose documents the batches hold.

    Args:
        layers: those whose stored states it tells besides.
        signals: whether its signals are needed at all.
    """

    def __init__(self, store: Store, layers: Sequence[Layer] = (), *, signals: bool = True) -> None:
        self.store, self.layers, self.signals = store, layers, signals

    def ask_for(self, layers: Sequence[Layer], attention: Sequence[int]) -> None:
        """Has it tell other stored states from now on."""
        assert not attention  # no store holds queries, keys and values
        self.layers = layers

    def read(self, batch: Batch) -> Told:
        """What is stored of the batch's documents.

        Raises:
            DataError: a row is damaged.
        """
        documents = list(_documents(batch))
        if not documents:  # of a process that has nothing to read while others have
            return _nothing_of(self._told([0]))
        return self._told(documents)

    def _told(self, documents: Sequence[int]) -> Told:
        return Told(self._signal(documents) if self.signals else None, self._hidden(documents))

    def _signal(self, documents: Sequence[int]) -> Logits | Sparse:
        if isinstance(self.store.signal_config, Full):
            return Logits(torch.from_numpy(self.store.logits(documents).copy()))
        return to_sparse(self.store.levels(documents), self.store.signal_config, self.store.manifest.num_columns)

    def _hidden(self, documents: Sequence[int]) -> Hidden | None:
        if not self.layers:
            return None
        found = self.store.hidden(documents, self.layers)
        return Hidden({layer: torch.from_numpy(found[layer]) for layer in self.layers})

    def tell(self, batch: Batch, read: Told | None = None) -> Told:
        read = self.read(batch) if read is None else read
        return read.to(batch.tokens.device)


def _nothing_of(told: Told) -> Told:
    """The same of no position."""
    none = torch.empty(0, dtype=torch.long)
    hidden = None
    if told.hidden is not None:
        hidden = Hidden({layer: state[:0] for layer, state in told.hidden.states.items()})
    return Told(None if told.signal is None else told.signal.at(none), hidden)


def _documents(batch: Batch) -> Iterator[int]:
    """The documents of a batch in the order of its positions."""
    for row in batch.documents:
        yield from (d for d in row.unique_consecutive().tolist() if d >= 0)

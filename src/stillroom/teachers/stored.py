"""A teacher whose signals were stored earlier."""

from collections.abc import Iterator, Sequence

import torch

from stillroom.batch import Batch
from stillroom.layers import Layer
from stillroom.signals import HiddenStates, Logits, Sparse, TeacherOutput
from stillroom.store.config import Full
from stillroom.store.quantize import to_sparse
from stillroom.store.reader import Store


class StoredTeacher:
    """What is in a store whose documents the batches hold.

    Args:
        layers: those whose stored states it tells besides.
        signals: whether its signals are needed at all.
    """

    def __init__(self, store: Store, layers: Sequence[Layer] = (), *, signals: bool = True) -> None:
        self.store, self.layers, self.signals = store, layers, signals

    def set_outputs(self, layers: Sequence[Layer], attention: Sequence[int]) -> None:
        """Has it tell other stored states from now on."""
        assert not attention  # no store holds queries, keys and values
        self.layers = layers

    def prefetch(self, batch: Batch) -> TeacherOutput:
        """What is stored of the batch's documents.

        Raises:
            DataError: a row is damaged.
        """
        documents = list(_documents(batch))
        if not documents:  # of a process that has nothing to read while others have
            return _nothing_of(self._told([0]))
        return self._told(documents)

    def _told(self, documents: Sequence[int]) -> TeacherOutput:
        return TeacherOutput(self._signal(documents) if self.signals else None, self._hidden(documents))

    def _signal(self, documents: Sequence[int]) -> Logits | Sparse:
        if isinstance(self.store.signal_config, Full):
            return Logits(torch.from_numpy(self.store.logits(documents).copy()))
        return to_sparse(self.store.levels(documents), self.store.signal_config, self.store.manifest.num_columns)

    def _hidden(self, documents: Sequence[int]) -> HiddenStates | None:
        if not self.layers:
            return None
        found = self.store.hidden(documents, self.layers)
        return HiddenStates({layer: torch.from_numpy(found[layer]) for layer in self.layers})

    def forward(self, batch: Batch, prefetch: TeacherOutput | None = None) -> TeacherOutput:
        prefetch = self.prefetch(batch) if prefetch is None else prefetch
        return prefetch.to(batch.tokens.device)


def _nothing_of(teacher_output: TeacherOutput) -> TeacherOutput:
    """The same of no position."""
    none = torch.empty(0, dtype=torch.long)
    hidden = None
    if teacher_output.hidden is not None:
        hidden = HiddenStates({layer: state[:0] for layer, state in teacher_output.hidden.states.items()})
    return TeacherOutput(None if teacher_output.signal is None else teacher_output.signal.at(none), hidden)


def _documents(batch: Batch) -> Iterator[int]:
    """The documents of a batch in the order of its positions."""
    for row in batch.documents:
        yield from (d for d in row.unique_consecutive().tolist() if d >= 0)

"""A teacher whose signals were stored earlier."""

from collections.abc import Sequence

import torch

from stillroom.batch import Batch
from stillroom.layers import Layer
from stillroom.signals import HiddenStates, Logits, TeacherOutput
from stillroom.store.config import Full
from stillroom.store.quantize import to_sparse
from stillroom.store.reader import Store
from stillroom.teachers.base import PrefetchedTeacher, documents_in


class StoredTeacher(PrefetchedTeacher):
    """Reads from a store whose documents the batches hold.

    Args:
        layers: those whose stored states it gives too.
        signals: whether its signals are needed at all.
    """

    def __init__(self, store: Store, layers: Sequence[Layer] = (), *, signals: bool = True) -> None:
        self.store, self.layers, self.signals = store, layers, signals

    def set_outputs(self, layers: Sequence[Layer], attention: Sequence[int]) -> None:
        """Sets the layers whose stored states it gives from now on."""
        assert not attention  # no store holds queries, keys and values
        self.layers = layers

    def prefetch(self, batch: Batch) -> TeacherOutput:
        """Returns what is stored for the batch's documents.

        Raises:
            DataError: a row is damaged.
        """
        documents = documents_in(batch)
        if documents:
            return self._read(documents)
        # This process has nothing to read while others have: the types and widths are those of any document.
        signal, hidden = self._read([0])
        none = torch.empty(0, dtype=torch.long)
        if hidden is not None:
            hidden = HiddenStates({layer: state[:0] for layer, state in hidden.states.items()})
        return TeacherOutput(None if signal is None else signal.at(none), hidden)

    def _read(self, documents: Sequence[int]) -> TeacherOutput:
        store, signal, hidden = self.store, None, None
        config = store.signal_config
        if self.signals and isinstance(config, Full):
            signal = Logits(torch.from_numpy(store.logits(documents).copy()))
        elif self.signals and not isinstance(config, Full):
            signal = to_sparse(store.levels(documents), config, store.manifest.num_columns)
        if self.layers:
            states = store.hidden(documents, self.layers)
            hidden = HiddenStates({layer: torch.from_numpy(states[layer]) for layer in self.layers})
        return TeacherOutput(signal, hidden)

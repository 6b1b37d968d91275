"""The interface of every teacher, and what several of them share."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from stillroom.batch import Batch
from stillroom.layers import Layer
from stillroom.signals import TeacherOutput


class Teacher(Protocol):
    """Gives its output for a batch in two steps, so that another thread can make the first one ahead of need."""

    def set_outputs(self, layers: Sequence[Layer], attention: Sequence[int]) -> None:
        """Sets the layers whose states, and the blocks whose queries, keys and values, are given from now on."""

    def prefetch(self, batch: Batch) -> TeacherOutput | None:
        """Returns what can be had without the device, on the CPU."""

    def forward(self, batch: Batch, prefetch: TeacherOutput | None = None) -> TeacherOutput:
        """Returns the output at the batch's kept positions, on the batch's device."""
        ...


class PrefetchedTeacher(ABC):
    """A teacher whose output is read or received into the CPU's memory whole."""

    @abstractmethod
    def prefetch(self, batch: Batch) -> TeacherOutput:
        """Returns the output at the batch's kept positions, on the CPU."""

    def forward(self, batch: Batch, prefetch: TeacherOutput | None = None) -> TeacherOutput:
        prefetch = self.prefetch(batch) if prefetch is None else prefetch
        return prefetch.to(batch.tokens.device)


def documents_in(batch: Batch) -> list[int]:
    """Returns the documents of a batch in the order of its positions."""
    return [number for row in batch.documents for number in row.unique_consecutive().tolist() if number >= 0]


def prompt_length(target_mask: np.ndarray) -> int:
    """Returns how many tokens stand before the last span of targets; 0 where no span comes after other tokens.

    Args:
        target_mask: bool [n], whether each token is a target.
    """
    starts = np.flatnonzero(np.diff(target_mask.astype(np.int8)) == 1)
    return int(starts[-1]) + 1 if len(starts) else 0

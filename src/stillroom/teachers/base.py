"""What every teacher offers to training."""

from typing import Protocol

from stillroom.batch import Batch
from stillroom.signals import TeacherOutput


class Teacher(Protocol):
    """Tells of a batch in two steps, so that the first can be made ahead, by another thread."""

    def prefetch(self, batch: Batch) -> TeacherOutput | None:
        """What can be had without the device: what is stored, on the CPU."""

    def forward(self, batch: Batch, prefetch: TeacherOutput | None = None) -> TeacherOutput:
        """Of the batch's kept positions, on the batch's device."""
        ...

"""The batches of the next steps and their stored signals, made by a thread while the student trains."""

import threading
from collections.abc import Iterable, Iterator
from queue import Queue
from typing import Any

from stillroom.batch import Batch
from stillroom.data.dataloader import BatchStream, DocumentSet, Step, Totals
from stillroom.signals import TeacherOutput
from stillroom.teachers.base import Teacher

STEPS_AHEAD = 2

MicroBatch = tuple[Batch, TeacherOutput | None]
"""A micro-batch, with what the teacher could give of it without the device."""


class MicroBatches(list[MicroBatch]):
    """The micro-batches of a step in this process, and the totals of all processes."""

    def __init__(self, micro_batches: Iterable[MicroBatch], totals: Totals) -> None:
        super().__init__(micro_batches)
        self.totals = totals

    @classmethod
    def of(cls, step: Step, teacher: Teacher | None) -> "MicroBatches":
        return cls([(batch, None if teacher is None else teacher.prefetch(batch)) for batch in step], step.totals)


class Prefetcher(Iterator[MicroBatches]):
    """Gives each step's micro-batches of a stream with what the teacher can prefetch of them.

    Its state is that of the steps given, not of those made ahead. An error made ahead is raised when its turn comes.
    """

    def __init__(self, stream: BatchStream, teacher: Teacher | None) -> None:
        self.stream, self.teacher = stream, teacher
        self._state = stream.state()
        self._thread: threading.Thread | None = None

    @property
    def epoch(self) -> int:
        """The epoch of the last step given."""
        return self._state["epoch"]

    @property
    def documents(self) -> DocumentSet:
        return self.stream.documents

    def state(self) -> dict[str, Any]:
        """Returns its position, as JSON values: after the last step that it gave."""
        return self._state

    def restore(self, state: dict[str, Any]) -> None:
        """Goes to the position where ``state`` was taken; see :meth:`BatchStream.restore`."""
        self.close()
        self.stream.restore(state)
        self._state = self.stream.state()

    def __next__(self) -> MicroBatches:
        if self._thread is None:
            self._made: Queue[tuple[MicroBatches, dict[str, Any]] | BaseException] = Queue()
            self._room, self._closed = threading.Semaphore(STEPS_AHEAD), False
            self._thread = threading.Thread(target=self._work, name="prefetch", daemon=True)
            self._thread.start()
        made = self._made.get()
        if isinstance(made, BaseException):
            self._made.put(made)  # for the next call
            raise made
        self._room.release()
        micro_batches, self._state = made
        return micro_batches

    def close(self) -> None:
        """Stops the thread. The next step is then made from the stream as it stands, so restore it before."""
        if self._thread is not None:
            self._closed = True
            self._room.release()
            self._thread.join()
            self._thread = None

    def _work(self) -> None:  # kept: the thread's
        try:
            while True:
                self._room.acquire()
                if self._closed:
                    return
                step = next(self.stream)
                self._made.put((MicroBatches.of(step, self.teacher), self.stream.state()))
        except BaseException as error:
            self._made.put(error)

"""ReadAhead: the batches of the next steps and their stored signals, made by a thread while the student trains."""

import threading
from collections.abc import Iterable, Iterator
from queue import Queue
from typing import Any

from stillroom.batch import Batch
from stillroom.data.dataloader import BatchStream, DocumentSet, Totals
from stillroom.signals import TeacherOutput
from stillroom.teachers.base import Teacher

STEPS_AHEAD = 2

MicroBatch = tuple[Batch, TeacherOutput | None]
"""A micro-batch, with what of it could be read without the device."""


class MicroBatches(list[MicroBatch]):
    """The micro-batches of a step with what was read of them, and the totals of all processes."""

    def __init__(self, micro_batches: Iterable[MicroBatch], totals: Totals) -> None:
        super().__init__(micro_batches)
        self.totals = totals


class Prefetcher(Iterator[MicroBatches]):
    """Gives each step's micro-batches of a stream with what the teacher can read of them.

    Its state is that of the steps given, not of those made ahead. What goes wrong ahead is raised when its turn comes.
    """

    def __init__(self, stream: BatchStream, teacher: Teacher | None) -> None:
        self.stream, self.teacher = stream, teacher
        self._state, self._worker = stream.state(), None

    @property
    def epoch(self) -> int:
        """The epoch of the last step given."""
        return self._state["epoch"]

    @property
    def documents(self) -> DocumentSet:
        return self.stream.documents

    def state(self) -> dict[str, Any]:
        """Where it stands, as JSON values: after the last step that it gave."""
        return self._state

    def restore(self, state: dict[str, Any]) -> None:
        """Goes to where ``state`` was taken; see :meth:`BatchStream.restore`."""
        self.close()
        self.stream.restore(state)
        self._state = self.stream.state()

    def __next__(self) -> MicroBatches:
        if self._worker is None:
            self._worker = _Worker(self.stream, self.teacher)
        micro_batches, self._state = self._worker.take()
        return micro_batches

    def close(self) -> None:
        """Stops the thread. The next step is then made from the stream as it stands, so restore it before."""
        if self._worker is not None:
            self._worker.close()
            self._worker = None


class _Worker:
    def __init__(self, stream: BatchStream, teacher: Teacher | None) -> None:
        self.stream, self.teacher = stream, teacher
        self.made: Queue[tuple[MicroBatches, dict[str, Any]] | BaseException] = Queue()
        self.room = threading.Semaphore(STEPS_AHEAD)
        self.closed = False
        self.thread = threading.Thread(target=self._work, name="read ahead", daemon=True)
        self.thread.start()

    def take(self) -> tuple[MicroBatches, dict[str, Any]]:
        made = self.made.get()
        if isinstance(made, BaseException):
            self.made.put(made)  # whoever asks again is told again
            raise made
        self.room.release()
        return made

    def close(self) -> None:
        self.closed = True
        self.room.release()
        self.thread.join()

    def _work(self) -> None:
        try:
            while True:
                self.room.acquire()
                if self.closed:
                    return
                step = next(self.stream)
                prefetched = [(b, None if self.teacher is None else self.teacher.prefetch(b)) for b in step]
                self.made.put((MicroBatches(prefetched, step.totals), self.stream.state()))
        except BaseException as error:
            self.made.put(error)

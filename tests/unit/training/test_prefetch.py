"""ReadAhead: the stream's own batches, in its order, with a state that is of the steps given."""

import threading
from typing import Any

import pytest
import torch

from conftest import build_documents, build_stream
from stillroom.batch import Batch
from stillroom.errors import DataError
from stillroom.signals import Logits, TeacherOutput
from stillroom.training.prefetch import STEPS_AHEAD, Prefetcher

LENGTHS = [6, 33, 12, 7, 29, 31, 18, 33, 5, 24, 9, 33, 16, 28, 33, 11]


class Reader:
    """A teacher whose signals tell which batch they are of."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.read_so_far, self.fails_at = 0, fails_at

    def prefetch(self, batch: Batch) -> TeacherOutput:
        self.read_so_far += 1
        if self.read_so_far == self.fails_at:
            raise DataError("a row is damaged", why="It is a test.", fix="Nothing.")
        return TeacherOutput(Logits(batch.labels.flatten()[batch.kept].unsqueeze(-1).float()))

    def forward(self, batch: Batch, prefetch: Any) -> Any:  # noqa: ARG002
        return prefetch


def stream(**settings: Any):
    return build_stream(build_documents(LENGTHS), **{"tokens": 96, "epochs": 2, **settings})


def test_it_gives_the_streams_batches_with_their_signals():
    given, wanted = list(Prefetcher(stream(), Reader())), list(stream())
    assert len(given) == len(wanted) > 3
    for micro_batches, batches in zip(given, wanted, strict=True):
        for (batch, read), other in zip(micro_batches, batches, strict=True):
            assert torch.equal(batch.tokens, other.tokens)
            assert read is not None
            assert torch.equal(read.signal.logits[:, 0].long(), other.labels.flatten()[other.kept])


def test_without_a_teacher_there_is_no_signal():
    assert all(read is None for micro_batches in Prefetcher(stream(), None) for _, read in micro_batches)


@pytest.mark.parametrize("after", [0, 1, 3])
def test_its_state_is_that_of_the_steps_given(after):
    ahead, plain = Prefetcher(stream(), Reader()), stream()
    for _ in range(after):
        next(ahead), next(plain)
    assert ahead.state() == plain.state()
    other = Prefetcher(stream(), Reader())
    next(other)
    other.restore(ahead.state())
    assert torch.equal(next(other)[0][0].tokens, next(plain)[0].tokens)
    ahead.close()
    other.close()


def test_what_goes_wrong_ahead_is_raised_at_its_turn_and_again():
    counts = [len(step) for step in stream()]
    ahead = Prefetcher(stream(), Reader(fails_at=counts[0] + 1))
    next(ahead)
    for _ in range(2):
        with pytest.raises(DataError, match="a row is damaged"):
            next(ahead)


def test_it_ends_and_ends_again():
    ahead = Prefetcher(stream(), Reader())
    assert len(list(ahead)) == stream().num_steps()
    with pytest.raises(StopIteration):
        next(ahead)


def test_it_reads_only_a_few_steps_ahead_and_closing_ends_its_thread():
    reader = Reader()
    ahead = Prefetcher(stream(epochs=None), reader)
    next(ahead)
    thread = ahead._thread
    assert thread is not None
    ahead.close()
    assert not thread.is_alive()
    assert reader.read_so_far <= sum(len(next(s)) for s in [stream(epochs=None)] for _ in range(STEPS_AHEAD + 2))
    assert not [t for t in threading.enumerate() if t is thread]


def test_after_an_error_it_stands_where_the_last_step_left_it():
    counts, plain = [len(step) for step in stream()], stream()
    ahead = Prefetcher(stream(), Reader(fails_at=counts[0] + counts[1] + 1))
    for _ in range(2):
        next(ahead), next(plain)
    with pytest.raises(DataError, match="a row is damaged"):
        next(ahead)
    assert ahead.state() == plain.state()
    ahead.teacher = Reader()
    ahead.restore(ahead.state())
    assert all(torch.equal(a.tokens, b.tokens) for (a, _), b in zip(next(ahead), next(plain), strict=True))
    ahead.close()


def test_going_back_while_it_reads_gives_the_same_steps_again():
    ahead, plain = Prefetcher(stream(), Reader()), list(stream())
    start = ahead.state()
    for steps in (3, 1, 2):
        for wanted in plain[:steps]:
            given = next(ahead)
            assert all(torch.equal(a.tokens, b.tokens) for (a, _), b in zip(given, wanted, strict=True))
            assert all(read is not None and len(read.signal) == batch.num_kept for batch, read in given)
        ahead.restore(start)
        assert ahead.state() == start
    ahead.close()


def test_at_the_end_and_after_an_error_no_thread_is_left():
    for reader in (Reader(), Reader(fails_at=2)):
        ahead = Prefetcher(stream(), reader)
        with pytest.raises((StopIteration, DataError)):
            exhaust(ahead)
        thread = ahead._thread
        assert thread is not None
        ahead.close()
        assert not thread.is_alive()
        ahead.close()  # which may be said twice


def exhaust(ahead: Prefetcher) -> None:
    while True:
        next(ahead)

"""Ctrl-C, SIGTERM and SIGHUP: remembered the first time, obeyed at once the second time, and as before afterwards."""

import signal
import threading

import pytest

from stillroom.errors import Interrupted, Stopped
from stillroom.runs import deferred_interrupts, ended

NUMBERS = {"ctrl-c": signal.SIGINT, "sigterm": signal.SIGTERM, "sighup": signal.SIGHUP}
EACH = pytest.mark.parametrize("number", NUMBERS.values(), ids=NUMBERS)


@EACH
def test_the_first_is_remembered_and_told(number):
    before, told = signal.getsignal(number), []
    with deferred_interrupts(lambda: told.append("asked")) as interrupted:
        assert not interrupted()
        signal.raise_signal(number)
        assert interrupted()
    assert told == ["asked"]
    assert signal.getsignal(number) is before


@EACH
def test_the_second_is_obeyed_at_once(number):
    with deferred_interrupts() as interrupted:
        signal.raise_signal(number)
        assert interrupted()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_none_is_none():
    with deferred_interrupts() as interrupted:
        pass
    assert not interrupted()


@EACH
def test_what_was_there_before_comes_back_after_an_error(number):
    before = signal.getsignal(number)
    with pytest.raises(ZeroDivisionError), deferred_interrupts():
        raise ZeroDivisionError
    assert signal.getsignal(number) is before


def test_another_thread_leaves_ctrl_c_alone():
    before = signal.getsignal(signal.SIGINT)
    found = []

    def work() -> None:
        with deferred_interrupts() as interrupted:
            found.append((interrupted(), signal.getsignal(signal.SIGINT) is before))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [(False, True)]


def test_a_signal_that_is_ignored_stays_so():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with deferred_interrupts() as interrupted:
            signal.raise_signal(signal.SIGHUP)
            assert not interrupted()
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(("number", "kind"), [(signal.SIGINT, Interrupted), (signal.SIGTERM, Stopped),
                                              (signal.SIGHUP, Stopped)])  # fmt: skip
def test_what_a_run_ends_with(number, kind):
    assert type(ended(number, "saved")) is kind

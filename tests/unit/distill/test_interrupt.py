"""Ctrl-C: remembered the first time, obeyed at once the second time, and as before afterwards."""

import signal
import threading

import pytest

from stillroom.distill.interrupt import deferred_interrupts


def press() -> None:
    signal.raise_signal(signal.SIGINT)


def test_the_first_is_remembered():
    before = signal.getsignal(signal.SIGINT)
    with deferred_interrupts() as interrupted:
        assert not interrupted()
        press()
        assert interrupted()
    assert signal.getsignal(signal.SIGINT) is before


def test_the_second_is_obeyed_at_once():
    with deferred_interrupts() as interrupted:
        press()
        assert interrupted()
        with pytest.raises(KeyboardInterrupt):
            press()


def test_none_is_none():
    with deferred_interrupts() as interrupted:
        pass
    assert not interrupted()


def test_what_was_there_before_comes_back_after_an_error():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ZeroDivisionError), deferred_interrupts():
        raise ZeroDivisionError
    assert signal.getsignal(signal.SIGINT) is before
    with pytest.raises(KeyboardInterrupt):
        press()


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

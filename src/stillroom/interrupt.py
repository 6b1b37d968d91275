"""Ctrl-C (or SIGTERM) while a verb works: finish what is under way, save, then stop."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def deferred_interrupts(on_request: Callable[[], None] = lambda: None) -> Iterator[Callable[[], bool]]:
    """Inside, the first Ctrl-C or SIGTERM is only remembered, and a second one acts at once.

    Gives a function that tells whether there was one. Outside the main thread, where signals cannot be caught, they are
    left alone.

    Args:
        on_request: is called when the first one comes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    requested = False
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def remember(*_: object) -> None:
        nonlocal requested
        requested = True
        restore()
        on_request()

    for number in SIGNALS:
        signal.signal(number, remember)
    try:
        yield lambda: requested
    finally:
        restore()

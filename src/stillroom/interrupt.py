"""Ctrl-C (or SIGTERM) while a verb works: finish what is under way, save, then stop."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from stillroom.errors import Interrupted, Stopped

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Requests:
    """Tells, when it is called, whether there was a signal; ``number`` is which, or 0."""

    def __init__(self) -> None:
        self.number = 0

    def __call__(self) -> bool:
        return self.number != 0


def ended(number: int, text: str) -> Interrupted:
    """What a verb raises that a signal ended, and whose work is saved. SIGTERM asks for an end in good order, as a
    cluster does that wants its machine back; Ctrl-C is a user's."""
    return Stopped(text) if number == signal.SIGTERM else Interrupted(text)


@contextmanager
def deferred_interrupts(on_request: Callable[[], None] = lambda: None) -> Iterator[Requests]:
    """Inside, the first Ctrl-C or SIGTERM is only remembered, and a second Ctrl-C acts at once. A second SIGTERM does
    nothing: clusters send several, and end what does not heed them in another way.

    Gives what tells whether there was one. Outside the main thread, where signals cannot be caught, they are
    left alone.

    Args:
        on_request: is called when the first one comes.
    """
    requests = Requests()
    if threading.current_thread() is not threading.main_thread():
        yield requests
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def remember(number: int, _: object) -> None:
        requests.number = number
        restore()
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        on_request()

    for number in SIGNALS:
        signal.signal(number, remember)
    try:
        yield requests
    finally:
        restore()

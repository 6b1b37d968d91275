"""Everything that can be the user's fault, in four parts: what, the values, why it matters, what to do."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any


class StillroomError(Exception):
    """An error that the user can mend. The command line prints it without a traceback and exits with 2.

    Args:
        what: one line, no full stop: what is wrong.
        values: the things that disagree, by name (usually two).
        why: why it matters, as sentences.
        fix: what to do about it, as sentences.
    """

    def __init__(self, what: str, values: Mapping[str, object] | None = None, *, why: str, fix: str) -> None:
        super().__init__(what)
        self.what, self.values, self.why, self.fix = what, dict(values or {}), why, fix

    def __reduce__(self) -> tuple[Any, ...]:
        """How it goes to another process: its values as text."""
        values = {name: str(value) for name, value in self.values.items()}
        return _remade, (type(self), self.what, values, self.why, self.fix)

    def __str__(self) -> str:
        pairs = [f"{name}: {value}" for name, value in self.values.items()]
        fits_one_line = sum(map(len, pairs)) + 5 * len(pairs) <= 110
        lines = ["     ".join(pairs)] if fits_one_line else pairs
        return "\n  ".join([self.what, *filter(None, lines), self.why, self.fix])


def _remade(  # kept: pickle calls it by its name
    kind: type[StillroomError], what: str, values: dict[str, str], why: str, fix: str
) -> StillroomError:
    error = kind.__new__(kind)
    StillroomError.__init__(error, what, values, why=why, fix=fix)
    return error


class ConfigError(StillroomError, ValueError):
    """A recipe or a ``key=value`` that cannot be meant."""


class DataError(StillroomError, ValueError):
    """Data, weights or a checkpoint that cannot be read as what they claim to be."""


class MismatchError(StillroomError, ValueError):
    """Two things that do not fit together."""


class MissingError(StillroomError, FileNotFoundError):
    """A file, a package or a device that is not there."""


class StorageError(StillroomError, OSError):
    """A file that could not be written: no room, no permission, or in use by another run."""


class NonFiniteError(StillroomError, ArithmeticError):
    """A loss or a gradient that is infinite or not a number."""


class OutOfMemoryError(StillroomError, MemoryError):
    """A device that has too little memory for what was asked."""


class LostError(StillroomError, ConnectionError):
    """A process that the others wait for, and that does not come."""


class ReportedElsewhere(StillroomError):
    """An error that another process of the run tells the user."""

    @classmethod
    def of(cls, error: StillroomError) -> "ReportedElsewhere":
        return cls(error.what, error.values, why=error.why, fix=error.fix)


class Interrupted(KeyboardInterrupt):
    """The user stopped a run, and what it had done is saved; the message says how to go on."""


class Stopped(Interrupted):
    """The system asked a run to end (SIGTERM), and what it had done is saved; it ends in good order."""


def require(package: str, extra: str, purpose: str) -> None:
    """Raises MissingError unless the optional ``package`` can be imported; ``extra`` is the extra that brings it."""
    import importlib.util

    if importlib.util.find_spec(package) is None:
        raise MissingError(
            f"the package `{package}` is not installed",
            {"needed for": purpose},
            why="It is optional, so that those who do not use it need not install it.",
            fix=f'Install it with `pip install "stillroom[{extra}]"`.',
        )


def did_you_mean(name: str, known: Iterable[object]) -> dict[str, object]:
    """Returns the known name that is nearest to one that is not, as a value of an error; none where none is near."""
    near = difflib.get_close_matches(name, [str(one) for one in known], n=1)
    return {"did you mean": near[0]} if near else {}


def first_line(error: Exception) -> str:
    """Returns the first line of what a library says of a fault, or else the fault's kind."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)

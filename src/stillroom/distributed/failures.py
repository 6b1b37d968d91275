"""The roll: what each process of a run last did, so that when one is lost the others can say which."""

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch.distributed import PrefixStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.distributed_c10d import _get_default_store

from stillroom.distributed.group import RankGroup
from stillroom.errors import Interrupted, LostError, ReportedElsewhere, StillroomError, Stopped

T = TypeVar("T")

PATIENCE_S = 5.0
"""How long the others are waited for, to say what befell them, once one has failed."""

SIGNS = ("connection", "timed out", "timeout", "nccl", "gloo", "broken pipe", "socket", "process group")
"""Words in what `torch.distributed` says when another process does not answer."""

LOST, FAILED = "lost", "failed"


class FailureReport:
    """A few words of each process, in the place where all have met."""

    def __init__(self, ranks: RankGroup) -> None:
        self.ranks = ranks
        self._store = None
        if ranks.world_size > 1:
            self._store = PrefixStore("stillroom roll", _get_default_store())
            self.at("start")

    def at(self, step: int | str) -> None:
        """Says how far this process is."""
        self._say("at", f"{step} on {socket.gethostname()} (process {os.getpid()})")

    def end(self, how: str, text: str) -> None:
        """Says how this process ends: it lost another, or failed by itself."""
        self._say("end", f"{how} {text}")

    def ends(self) -> dict[int, tuple[str, str]]:
        """How processes ended, of those that said so."""
        found = {rank: self._said("end", rank) for rank in range(self.ranks.world_size)}
        parts = {rank: text.partition(" ") for rank, text in found.items() if text}
        return {rank: (how, text) for rank, (how, _, text) in parts.items()}

    def last(self, rank: int) -> str:
        """How far a process was."""
        return self._said("at", rank) or "never heard of"

    def _say(self, key: str, text: str) -> None:
        if self._store is not None:
            self._store.set(f"{key} {self.ranks.rank}", text)

    def _said(self, key: str, rank: int) -> str:
        assert self._store is not None
        name = f"{key} {rank}"
        return self._store.get(name).decode() if self._store.check([name]) else ""


@contextmanager
def reported_once(failures: FailureReport) -> Iterator[None]:
    """Has what goes wrong inside told by one process, and that a process is lost by name.

    Raises:
        LostError: another process does not answer.
        ToldElsewhere: another process says what is wrong.
    """
    ranks = failures.ranks
    if ranks.world_size == 1:
        yield
        return
    try:
        yield
    except (ReportedElsewhere, SystemExit):
        raise
    except Interrupted as error:
        if ranks.is_rank0:
            raise
        raise SystemExit(0 if isinstance(error, Stopped) else 130) from None
    except StillroomError as error:
        with _while_the_store_is_there():
            _tell_unless_told(failures, error)
        raise
    except torch.OutOfMemoryError as error:
        with _while_the_store_is_there():
            failures.end(FAILED, str(error))
        raise
    except RuntimeError as error:
        if not any(sign in str(error).lower() for sign in SIGNS):
            with _while_the_store_is_there():
                failures.end(FAILED, f"{type(error).__name__}: {error}")
            raise
        raise _who_is_lost(failures, error) from error
    except Exception as error:
        with _while_the_store_is_there():
            failures.end(FAILED, f"{type(error).__name__}: {error}")
        raise


def _tell_unless_told(failures: FailureReport, error: StillroomError) -> None:
    """Raises ToldElsewhere in all but the first process that fail in the same way, with values of their own perhaps."""
    ranks, text = failures.ranks, error.what
    failures.end(FAILED, text)
    if ranks.is_rank0:
        return
    until = time.monotonic() + PATIENCE_S
    while time.monotonic() < until and 0 not in failures.ends():
        time.sleep(0.05)
    if failures.ends().get(0) == (FAILED, text):
        raise ReportedElsewhere.of(error)
    error.values["in"] = f"rank {ranks.rank} on {socket.gethostname()}"


def _who_is_lost(failures: FailureReport, error: RuntimeError) -> StillroomError:
    """The error of a process that another does not answer, once it is known why not."""
    ranks = failures.ranks
    found = _in_time(lambda: _ends(failures, error))
    if found is None:
        return _lost(["rank 0, or the host where all have met"], error)
    ends, last = found
    names = [f"rank {rank}, last heard at {last[rank]}" for rank in range(ranks.world_size) if rank not in ends]
    lost = _lost(names or ["nobody: all are there, and cannot reach each other"], error)
    return ReportedElsewhere.of(lost) if _another_tells(ends, ranks.rank) else lost


def _another_tells(ends: Mapping[int, tuple[str, str]], rank: int) -> bool:
    """Whether a process need not say what befell it: one failed by itself, or one before it has lost another too. It
    then ends at once, so that those that wait for it learn of it, and are not taken for lost."""
    return any(how == FAILED or other < rank for other, (how, _) in ends.items())


def _ends(failures: FailureReport, error: RuntimeError) -> tuple[dict[int, tuple[str, str]], list[str]]:
    """How the others end too, once all have said so or that is waited for no longer; and how far each was."""
    failures.end(LOST, " ".join(str(error).split())[:160])
    until, ends = time.monotonic() + PATIENCE_S, {}
    while time.monotonic() < until and len(ends) < failures.ranks.world_size:
        if _another_tells(ends, failures.ranks.rank):
            break
        time.sleep(0.05)
        ends = failures.ends()
    return ends, [failures.last(rank) for rank in range(failures.ranks.world_size)]


def _in_time(ask: Callable[[], T]) -> T | None:
    """What the store tells; None where it does not answer, which may take it for ever."""
    found: list[T] = []

    def work() -> None:
        with _while_the_store_is_there():
            found.append(ask())

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(3 * PATIENCE_S)
    return found[0] if found else None


def _lost(names: list[str], error: RuntimeError) -> LostError:
    return LostError(
        "a process of this run is lost",
        {
            "lost" if len(names) == 1 else "lost, or waiting for one that is": "; ".join(names[:4]),
            "reason": " ".join(str(error).split())[:160],
        },
        why="Every process is needed for every step, so the run ended here. Its checkpoints are whole.",
        fix="Look at that process's host, then run the same command with --resume; torchrun --max-restarts does so by "
        "itself.",
    )


@contextmanager
def _while_the_store_is_there() -> Iterator[None]:
    try:
        yield
    except RuntimeError:  # it went with its host, so nobody can be told anything there
        return

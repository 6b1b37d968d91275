"""Failure reports: each process writes how far it is, so that when one is lost the others can name it."""

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch
from torch.distributed import PrefixStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.distributed_c10d import _get_default_store

from stillroom.distributed.group import RankGroup
from stillroom.errors import Interrupted, LostError, ReportedElsewhere, StillroomError, Stopped

PATIENCE_S = 5.0
"""The time that the others are given to say how they ended, once one process has failed."""

SIGNS = ("connection", "timed out", "timeout", "nccl", "gloo", "broken pipe", "socket", "process group")
"""Words in what `torch.distributed` says when another process does not answer."""

LOST, FAILED = "lost", "failed"


class FailureReport:
    """A few words of each process, in the store where all have met."""

    def __init__(self, ranks: RankGroup) -> None:
        self.ranks = ranks
        self._store = None
        if ranks.world_size > 1:
            self._store = PrefixStore("stillroom failures", _get_default_store())
            self.at("start")

    def at(self, step: int | str) -> None:
        """Writes how far this process is."""
        self._write("at", f"{step} on {socket.gethostname()} (process {os.getpid()})")

    def end(self, how: str, text: str) -> None:
        """Writes how this process ends: it lost another, or failed by itself."""
        self._write("end", f"{how} {text}")

    def ends(self) -> dict[int, tuple[str, str]]:
        """Returns how processes ended, of those that wrote so."""
        texts = {rank: self.read("end", rank) for rank in range(self.ranks.world_size)}
        parts = {rank: text.partition(" ") for rank, text in texts.items() if text}
        return {rank: (how, text) for rank, (how, _, text) in parts.items()}

    def another_reports(self) -> bool:
        """Returns whether this process need not report its end: one failed by itself, or one before it has lost another
        too. It then ends at once, so that those that wait for it learn of it, and are not taken for lost."""
        return any(how == FAILED or rank < self.ranks.rank for rank, (how, _) in self.ends().items())

    def _write(self, key: str, text: str) -> None:
        if self._store is not None:
            self._store.set(f"{key} {self.ranks.rank}", text)

    def read(self, key: str, rank: int) -> str:
        """Returns what a process wrote last: how far it is, or how it ended."""
        assert self._store is not None
        name = f"{key} {rank}"
        return self._store.get(name).decode() if self._store.check([name]) else ""


@contextmanager
def reported_once(failures: FailureReport) -> Iterator[None]:
    """Has one process report what goes wrong inside, and name a process that is lost.

    Raises:
        LostError: another process does not answer.
        ReportedElsewhere: another process reports the error.
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
        with suppress(RuntimeError):  # the store may have gone with its host
            failures.end(FAILED, error.what)
            _wait_until(lambda: ranks.is_rank0 or 0 in failures.ends())
            if not ranks.is_rank0:
                if failures.ends().get(0) == (FAILED, error.what):  # with values of its own perhaps
                    raise ReportedElsewhere.of(error) from None
                error.values["in"] = f"rank {ranks.rank} on {socket.gethostname()}"
        raise
    except Exception as error:
        is_oom = isinstance(error, torch.OutOfMemoryError)
        if isinstance(error, RuntimeError) and not is_oom and any(sign in str(error).lower() for sign in SIGNS):
            raise _lost(failures, error) from error
        with suppress(RuntimeError):
            failures.end(FAILED, str(error) if is_oom else f"{type(error).__name__}: {error}")
        raise


def _wait_until(true: Callable[[], bool]) -> None:
    until = time.monotonic() + PATIENCE_S
    while time.monotonic() < until and not true():
        time.sleep(0.05)


def _lost(failures: FailureReport, error: RuntimeError) -> StillroomError:
    """Returns the error of a process that another does not answer, once it is known why not."""
    ranks, reason = failures.ranks, " ".join(str(error).split())[:160]
    answers: list[tuple[bool, list[str]]] = []

    def ask() -> None:
        with suppress(RuntimeError):
            failures.end(LOST, reason)
            _wait_until(lambda: failures.another_reports() or len(failures.ends()) == ranks.world_size)
            silent = [rank for rank in range(ranks.world_size) if rank not in failures.ends()]
            names = [f"rank {rank}, last heard at {failures.read('at', rank) or 'never heard of'}" for rank in silent]
            answers.append((failures.another_reports(), names))

    thread = threading.Thread(target=ask, daemon=True)  # since a store that is lost may never answer
    thread.start()
    thread.join(3 * PATIENCE_S)
    elsewhere, names = answers[0] if answers else (False, ["rank 0, or the host where all have met"])
    names = names or ["nobody: all are there, and cannot reach each other"]
    lost = LostError(
        "a process of this run is lost",
        {"lost" if len(names) == 1 else "lost, or waiting for one that is": "; ".join(names[:4]), "reason": reason},
        why="Every process is needed for every step, so the run ended here. Its checkpoints are whole.",
        fix="Look at that process's host, then run the same command with --resume; torchrun --max-restarts does so by "
        "itself.",
    )
    return ReportedElsewhere.of(lost) if elsewhere else lost

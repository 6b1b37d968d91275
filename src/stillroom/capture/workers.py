"""Parts: the share of each of several workers, who need not know of each other."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import PretrainedConfig

from stillroom.capture.config import CaptureConfig, Part
from stillroom.capture.hidden import window_documents
from stillroom.data.dataset import Documents
from stillroom.errors import ConfigError, MissingError, StillroomError, StorageError


def part_of(config: CaptureConfig) -> Part | None:
    """The part that a config means; None where it is all of the data. A part of one is all.

    Raises:
        ConfigError: it is auto, and what the environment says is no part.
    """
    part = _of_environment() if config.part == "auto" else config.part
    return None if part is None or part.of == 1 else part


def _of_environment() -> Part | None:
    rank, world = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
    if rank in (None, "0") and world in (None, "1"):
        return None
    if not ((rank or "").isdecimal() and (world or "").isdecimal() and int(rank or 0) < int(world or 0)):
        raise ConfigError(
            "the environment does not tell which part of the data this worker captures",
            {"RANK": rank or "not set", "WORLD_SIZE": world or "not set"},
            why="A worker that took all of it would do what the others do too.",
            fix="Set both, RANK from 0 and less than WORLD_SIZE, as torchrun does; or set part={index: 0, of: 8}, say, "
            "or part=null for all of the data.",
        )
    return Part(index=int(rank or 0), of=int(world or 0))


def own_device(device: str) -> str:
    """What auto means for a worker that shares its machine with others: the CUDA device of its LOCAL_RANK.

    Where a worker sees one device alone, that is its own.

    Raises:
        MissingError: the machine has fewer devices than workers.
    """
    rank, count = os.environ.get("LOCAL_RANK"), torch.cuda.device_count()
    if device != "auto" or rank is None or count < 2:
        return device
    if not rank.isdecimal() or int(rank) >= count:
        raise MissingError(
            "there is no CUDA device for this worker",
            {"LOCAL_RANK": rank, "CUDA devices": f"{count}, from 0"},
            why="Each worker on a machine takes a device of its own.",
            fix="Start as many workers on a machine as it has devices, or set teacher.engine.device.",
        )
    return f"cuda:{rank}"


@contextmanager
def named(part: Part | None) -> Iterator[None]:
    """Errors inside say whose they are."""
    try:
        yield
    except StillroomError as error:
        error.what = error.what if part is None else f"{part}: {error.what}"
        raise


def check_shared(out: str | Path, part: Part | None) -> None:
    """Returns where ``out`` has no run of the other kind: all of the data in it, or parts of them.

    Raises:
        StorageError: it has.
    """
    others = [Path(out, "run.json")] if part is not None else sorted(Path(out).glob("part-*-of-*/run.json"))
    there = [path for path in others if path.exists()]
    if there:
        raise StorageError(
            f"{out} is the folder of a run that is {'not ' if part is not None else ''}divided",
            {"out": out, "there": ", ".join(map(str, there[:2])) + (" …" if len(there) > 2 else "")},
            why="A capture of all of the data and one of its parts hold the same documents.",
            fix="Choose another `out`, delete what is there, or set `part` as it was.",
        )


# --- who takes what --------------------------------------------------------------------------------------------------
def part_range(config: CaptureConfig, documents: Documents, teacher: PretrainedConfig | None) -> tuple[int, int]:
    """The documents of this part of the data: the first, and the end.

    A part is a stretch of whole windows, so the teacher reads each document among the same others however many workers
    there are, and says the same of it to the last bit. A window is of the part in whose share of all tokens (of all
    documents, where the teacher writes them) its middle lies.
    """
    part, count = part_of(config), len(documents)
    if part is None:
        return 0, count
    size = window_documents(config, teacher)
    weights = documents.lengths if config.generate is None else np.ones(count, np.int64)
    each = np.add.reduceat(weights, np.arange(0, count, size))
    ends = np.cumsum(each)
    middles, total = 2 * ends - each, int(2 * ends[-1])
    first, stop = (int(np.searchsorted(middles, total * i // part.of)) for i in (part.index, part.index + 1))
    return min(first * size, count), min(stop * size, count)


@dataclass(frozen=True)
class WorkerShare:
    """What a capture reads and stores of its data."""

    first: int
    """The first document of the data."""
    stop: int
    """Their end."""
    documents: int
    """Documents that will be stored."""
    tokens: int
    """Tokens of the data that are read."""
    positions: int
    """Positions that will be stored; where the teacher writes them, at most."""


def worker_share(config: CaptureConfig, documents: Documents, teacher: PretrainedConfig | None) -> WorkerShare:
    first, stop = part_range(config, documents, teacher)
    tokens = int(documents.lengths[first:stop].sum())
    if config.generate is not None:
        count = (stop - first) * config.generate.answers
        return WorkerShare(first, stop, count, tokens, count * config.generate.max_tokens)
    if stop - first == len(documents):
        return WorkerShare(first, stop, stop, tokens, documents.counts["tokens_learnt"])
    return WorkerShare(
        first, stop, stop - first, tokens, sum(int(documents.target_mask(i)[1:].sum()) for i in range(first, stop))
    )

"""Parts: the share of each of several workers, who need not know of each other, and the size of what they store."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from transformers import PretrainedConfig

from stillroom.capture.config import Generate, Part
from stillroom.data.dataset import Documents
from stillroom.errors import ConfigError, MissingError, StillroomError, StorageError
from stillroom.store.config import HiddenStatesConfig
from stillroom.store.quantize import hidden_bytes_per_position


def part_of(part: Part | Literal["auto"] | None) -> Part | None:
    """Returns the part that a setting means; None for all of the data. A part of one is all.

    Raises:
        ConfigError: it is auto, and RANK and WORLD_SIZE in the environment are no part.
    """
    if part == "auto":
        rank, world = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
        if rank in (None, "0") and world in (None, "1"):
            return None
        if not ((rank or "").isdecimal() and (world or "").isdecimal() and int(rank or 0) < int(world or 0)):
            raise ConfigError(
                "the environment does not tell which part of the data this worker captures",
                {"RANK": rank or "not set", "WORLD_SIZE": world or "not set"},
                why="A worker that took all of it would do what the others do too.",
                fix="Set both, RANK from 0 and less than WORLD_SIZE, as torchrun does; or set part={index: 0, of: 8}, "
                "say, or part=null for all of the data.",
            )
        part = Part(index=int(rank or 0), of=int(world or 0))
    return None if part is None or part.of == 1 else part


def own_device(device: str) -> str:
    """Returns what auto means for a worker that shares its machine with others: the CUDA device of its LOCAL_RANK.

    A worker that sees one device alone takes that.

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
    """Puts the part's name before the errors that are raised inside."""
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
    if there := [path for path in others if path.exists()]:
        raise StorageError(
            f"{out} is the folder of a run that is {'not ' if part is not None else ''}divided",
            {"out": out, "there": ", ".join(map(str, there[:2])) + (" …" if len(there) > 2 else "")},
            why="A capture of all of the data and one of its parts hold the same documents.",
            fix="Choose another `out`, delete what is there, or set `part` as it was.",
        )


# --- who takes what --------------------------------------------------------------------------------------------------


def part_range(part: Part | None, documents: Documents, window: int, generate: Generate | None) -> tuple[int, int]:
    """Returns the documents of a part of the data: the first, and the end.

    A part is a run of whole windows of ``window`` documents, so the teacher reads each document among the same others
    however many workers there are, and its output is the same to the last bit. A window is of the part in whose share
    of all tokens (of all documents, where the teacher writes them) its middle lies.
    """
    count = len(documents)
    if part is None:
        return 0, count
    weights = documents.lengths if generate is None else np.ones(count, np.int64)
    each = np.add.reduceat(weights, np.arange(0, count, window))
    ends = np.cumsum(each)
    middles, total = 2 * ends - each, int(2 * ends[-1])
    first, stop = (int(np.searchsorted(middles, total * i // part.of)) for i in (part.index, part.index + 1))
    return min(first * window, count), min(stop * window, count)


@dataclass(frozen=True)
class WorkerShare:
    """The data that a capture reads and stores."""

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


def worker_share(part: Part | None, documents: Documents, window: int, generate: Generate | None) -> WorkerShare:
    first, stop = part_range(part, documents, window, generate)
    count, tokens = stop - first, int(documents.lengths[first:stop].sum())
    if generate is not None:
        count *= generate.answers
        positions = count * generate.max_tokens
    elif count == len(documents):
        positions = documents.counts["tokens_learnt"]
    else:
        positions = sum(int(documents.target_mask(i)[1:].sum()) for i in range(first, stop))
    return WorkerShare(first, stop, count, tokens, positions)


def position_bytes(config: HiddenStatesConfig | None, teacher: PretrainedConfig | None) -> int:
    """Returns the size of the hidden states of one position, exactly; 0 where none are kept."""
    if config is None or teacher is None:
        return 0
    return hidden_bytes_per_position(config, teacher.get_text_config().hidden_size)


def size_text(config: HiddenStatesConfig, size_bytes: int, counts: tuple[int, int] | None, *, at_most: bool) -> str:
    """Returns the size of a capture's hidden states in words.

    Args:
        size_bytes: the size of one position's.
        counts: its documents and positions, where they are known.
        at_most: there may be fewer positions.
    """
    layers = ", ".join(map(str, config.layers))
    text = f"layers {layers} in {config.format}, {size_bytes:,} bytes a position"
    if counts is None:
        return f"{text}; in all: not known before the data are tokenized"
    count, positions = counts
    total = f"{positions * size_bytes:,} bytes ({positions * size_bytes / 2**20:,.1f} MiB)"
    most = "at most " if at_most else ""
    return f"{text}; {count:,} documents, {most}{positions:,} positions: {most}{total}"

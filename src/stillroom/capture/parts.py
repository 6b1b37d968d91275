"""Parts: the share of each of several workers, who need not know of each other; and their stores joined as one."""

import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from stillroom.capture.config import DECIDES_ANSWERS, FREE_TO_CHANGE, Generate, Part
from stillroom.data.dataset import Documents
from stillroom.errors import (
    ConfigError,
    DataError,
    Interrupted,
    MismatchError,
    MissingError,
    StillroomError,
    StorageError,
)
from stillroom.recipe import differences
from stillroom.runs import read_json
from stillroom.store.concat import concat
from stillroom.store.format import Manifest

BY_CONTENT = ("teacher.model", "teacher.tokenizer", "teacher.revision", "data.path", "part")
"""Settings that may differ from one machine to the next: the stores tell by fingerprints whether it is the same."""


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
    """Puts the part's name before errors that are raised inside, and before how far an interrupted run came."""
    try:
        yield
    except StillroomError as error:
        error.what = error.what if part is None else f"{part}: {error.what}"
        raise
    except Interrupted as error:
        error.args = error.args if part is None else (f"{part}: {error}",)
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


# --- joining ---------------------------------------------------------------------------------------------------------


class FoundPart(NamedTuple):
    """The folder of a part, and its run.json."""

    path: Path
    part: Part
    record: Mapping[str, Any]


def join(
    places: Sequence[str | Path],
    out: str | Path | None = None,
    *,
    keep_parts: bool = True,
    overwrite: bool = False,
    report: Callable[[str], object] = lambda _: None,
) -> tuple[Path, Manifest]:
    """Writes the store of a whole capture from those of its parts; returns its folder and manifest.

    Everything is checked before anything is written, and the store appears as a whole: a join that was stopped is begun
    again by the same command.

    Args:
        places: the ``out`` of the capture; or several folders, each that of a part or one that holds parts.
        out: the joined store; by default ``store`` in the only place.
        keep_parts: leave the stores of the parts; where it is False they are deleted once the joined one is whole.
        overwrite: replace a store that is there.

    Raises:
        MissingError: a part is missing or not done.
        MismatchError: parts are of different captures, or one is there twice, or a document.
        DataError: a part is damaged.
        StorageError: ``out`` exists, or cannot be written.
    """
    if out is None and len(places) != 1:
        raise ConfigError(
            "it is not said where the joined store belongs",
            {"places": ", ".join(map(str, places)) or "none", "out": "not given"},
            why="Only where all parts are in one folder does it go there, as OUT/store.",
            fix="Name the capture's `out`, or set out=DIR.",
        )
    target = Path(places[0], "store") if out is None else Path(out)
    parts = _found(places)
    _check(parts)
    record = parts[0].record
    answers = 1 if record["config"]["generate"] is None else record["config"]["generate"]["answers"]
    stores = [found.path / "store" for found in parts]
    count = record["data"]["documents"] * answers
    manifest = concat(stores, target, overwrite=overwrite, num_documents=count, report=report)
    for store in [] if keep_parts else stores:
        shutil.rmtree(store)
    return target, manifest


def _found(places: Sequence[str | Path]) -> list[FoundPart]:
    """The parts in these folders, in their order; one whose worker was killed early goes by its folder's name."""
    parts = []
    for place in map(Path, places):
        for folder in [place] if (place / "run.json").exists() else sorted(place.glob("part-*-of-*")):
            begun = (folder / "run.json").exists()
            match read_json(folder / "run.json") if begun else re.fullmatch(r"part-(\d+)-of-(\d+)", folder.name):
                case re.Match() as name if int(name[1]) < int(name[2]):
                    part = Part(index=int(name[1]), of=int(name[2]))
                    parts.append(FoundPart(folder, part, {"status": "not begun"}))
                case {"config": {"part": {"index": int(i), "of": int(of)}, "generate": _}, "status": str()} as record:
                    parts.append(FoundPart(folder, Part(index=i, of=of), record))
                case {"config": {"part": None}}:
                    raise ConfigError(
                        f"the capture in {folder} was not divided",
                        {"its store": folder / "store"},
                        why="There is nothing to join it with.",
                        fix="Use its store as it is; `stillroom store concat` joins stores of different data.",
                    )
                case other:
                    raise DataError(
                        f"{folder} does not hold a part of a capture",
                        {"expected": "the run.json of a capture, with its part", "found": str(other)[:60]},
                        why="Nobody can tell which documents its store has.",
                        fix="Name the `out` of the captures, and move away what is none.",
                    )
    if not parts:
        raise MissingError(
            f"there are no parts of a capture in {', '.join(map(str, places))}",
            {"expected": "folders such as part-0000-of-0008, or such a folder itself"},
            why="Only what several workers captured can be joined.",
            fix="Name the `out` of their captures.",
        )
    return sorted(parts, key=lambda found: (found.part.of, found.part.index))


def _check(parts: Sequence[FoundPart]) -> None:
    """Returns where the parts are of one capture and one division of its data, each once, and all are done."""
    first, last, of = parts[0], parts[-1], parts[0].part.of
    if of != last.part.of:
        raise MismatchError(
            "there are parts of different numbers of workers",
            {str(first.part): first.path, str(last.part): last.path},
            why="They are of two captures, whose documents are divided differently.",
            fix="Delete those that are not meant, or name the folders of the others.",
        )
    for one, other in pairwise(parts):
        if one.part == other.part:
            raise MismatchError(
                f"{one.part} is there twice",
                {"one": one.path, "other": other.path},
                why="Its documents would be in the joined store twice.",
                fix="Name it once.",
            )
    states = {found.part.index: found.record["status"] for found in parts}
    undone = {i: states.get(i, "missing") for i in range(of) if states.get(i) != "done"}
    if undone:
        index, state = next(iter(undone.items()))
        state = "missing" if state == "missing" else "not finished"
        where = next((found.path.parent for found in parts if found.part.index == index), first.path.parent)
        command = f'stillroom capture RECIPE "part={{index: {index}, of: {of}}}" out={where} --resume'
        shown = {"started": "started: at work, or killed"}
        raise MissingError(
            f"part {index} of {of} is {state}" if len(undone) == 1 else f"{len(undone)} of {of} parts are not done",
            {f"part {i}": shown.get(status, status) for i, status in list(undone.items())[:8]}
            | ({"and": f"{len(undone) - 8} more"} if len(undone) > 8 else {}),
            why="The joined store would lack their documents. Parts are counted from 0.",
            fix=f"Run `{command}`, with the recipe of the others" + (", and so on." if len(undone) > 1 else "."),
        )
    bound = () if first.record["config"]["generate"] is None else DECIDES_ANSWERS[:1]
    free = [*BY_CONTENT, *(name for name in FREE_TO_CHANGE if name not in bound)]
    for found in parts[1:]:
        for key, (one, two) in differences(first.record["config"], found.record["config"]).items():
            if not any(key == name or key.startswith(f"{name}.") for name in free):
                raise MismatchError(
                    f"{first.part} and {found.part} were captured with different {key}",
                    {f"part {first.part.index}": one, f"part {found.part.index}": two},
                    why="They are of different captures, and the joined store would say what no teacher said.",
                    fix="Capture the one that is wrong anew, with the recipe of the others and --overwrite.",
                )

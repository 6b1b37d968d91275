"""Join: the parts of one capture, each found done and of the same settings, as one store."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from stillroom.capture.config import DECIDES_ANSWERS, FREE_TO_CHANGE, Part
from stillroom.errors import ConfigError, DataError, MismatchError, MissingError
from stillroom.recipe import differences
from stillroom.runs import read_json
from stillroom.store.concat import concat
from stillroom.store.format import Manifest

BY_CONTENT = ("teacher.model", "teacher.tokenizer", "teacher.revision", "data.path", "part")
"""Settings that may differ from one machine to the next: the stores tell by fingerprints whether it is the same."""


@dataclass(frozen=True)
class FoundPart:
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
    versions: Mapping[str, str] | None = None,
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
    _check_complete(parts)
    _check_same(parts)
    record = parts[0].record
    answers = 1 if record["config"]["generate"] is None else record["config"]["generate"]["answers"]
    manifest = concat(
        [found.path / "store" for found in parts],
        target,
        overwrite=overwrite,
        num_documents=record["data"]["documents"] * answers,
        versions=versions,
        report=report,
    )
    if not keep_parts:
        for found in parts:
            shutil.rmtree(found.path / "store")
    return target, manifest


def _found(places: Sequence[str | Path]) -> list[FoundPart]:
    """The parts in these folders, in their order."""
    folders = [
        folder
        for place in map(Path, places)
        for folder in ([place] if (place / "run.json").exists() else sorted(place.glob("part-*-of-*")))
    ]
    if not folders:
        raise MissingError(
            f"there are no parts of a capture in {', '.join(map(str, places))}",
            {"expected": "folders such as part-0000-of-0008, or such a folder itself"},
            why="Only what several workers captured can be joined.",
            fix="Name the `out` of their captures.",
        )
    return sorted(map(_read, folders), key=lambda found: (found.part.of, found.part.index))


def _read(folder: Path) -> FoundPart:
    """A part; one whose worker was killed before it had a run.json goes by its folder's name."""
    if not (folder / "run.json").exists():
        index, of = folder.name.removeprefix("part-").split("-of-")
        if index.isdecimal() and of.isdecimal() and int(index) < int(of):
            return FoundPart(folder, Part(index=int(index), of=int(of)), {"status": "not begun"})
    record = read_json(folder / "run.json") if (folder / "run.json").exists() else {}
    match record:
        case {"config": {"part": {"index": int(index), "of": int(of)}, "generate": _}, "status": str()}:
            return FoundPart(folder, Part(index=index, of=of), record)
        case {"config": {"part": None}}:
            raise ConfigError(
                f"the capture in {folder} was not divided",
                {"its store": folder / "store"},
                why="There is nothing to join it with.",
                fix="Use its store as it is; `stillroom store concat` joins stores of different data.",
            )
    raise DataError(
        f"{folder} does not hold a part of a capture",
        {"expected": "the run.json of a capture, with its part", "found": str(record)[:60]},
        why="Nobody can tell which documents its store has.",
        fix="Name the `out` of the captures, and move away what is none.",
    )


def _check_complete(parts: Sequence[FoundPart]) -> None:
    """Returns where the parts are of one division of the data, each once, and all are done."""
    last, of = parts[-1].part, parts[0].part.of
    if of != last.of:
        raise MismatchError(
            "there are parts of different numbers of workers",
            {str(parts[0].part): parts[0].path, str(last): parts[-1].path},
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
        first = next(iter(undone))
        state = "missing" if undone[first] == "missing" else "not finished"
        where = next((found.path.parent for found in parts if found.part.index == first), parts[0].path.parent)
        command = f'stillroom capture RECIPE "part={{index: {first}, of: {of}}}" out={where} --resume'
        shown = {"started": "started: at work, or killed"}
        raise MissingError(
            f"part {first} of {of} is {state}" if len(undone) == 1 else f"{len(undone)} of {of} parts are not done",
            {f"part {i}": shown.get(status, status) for i, status in list(undone.items())[:8]}
            | ({"and": f"{len(undone) - 8} more"} if len(undone) > 8 else {}),
            why="The joined store would lack their documents. Parts are counted from 0.",
            fix=f"Run `{command}`, with the recipe of the others" + (", and so on." if len(undone) > 1 else "."),
        )


def _check_same(parts: Sequence[FoundPart]) -> None:
    """Returns where all were captured with the same settings."""
    first = parts[0]
    bound = (DECIDES_ANSWERS[0],) if first.record["config"]["generate"] is not None else ()
    free = [*BY_CONTENT, *(name for name in FREE_TO_CHANGE if name not in bound)]
    for found in parts[1:]:
        changed = differences(first.record["config"], found.record["config"])
        other = {k: v for k, v in changed.items() if not any(k == f or k.startswith(f"{f}.") for f in free)}
        if other:
            key, (one, two) = next(iter(other.items()))
            raise MismatchError(
                f"{first.part} and part {found.part.index} were captured with another {key}",
                {f"part {first.part.index}": one, f"part {found.part.index}": two},
                why="They are of different captures, and the joined store would say what no teacher said.",
                fix="Capture the one that is wrong anew, with the recipe of the others and --overwrite.",
            )

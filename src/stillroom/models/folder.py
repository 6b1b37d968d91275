"""The folder of a local model: whether its files are all there and whole, from their headers."""

import json
import struct
from contextlib import suppress
from pathlib import Path

from stillroom.errors import DataError, MissingError
from stillroom.tokenizers import refuse_lfs_pointer

MOST_HEADER_BYTES = 100_000_000
"""The longest header that safetensors itself accepts."""


def check_folder(folder: Path) -> list[Path]:
    """The files of a local model that will be read, after a look at their headers.

    Raises MissingError where the folder, its config.json or one of its weight files is not there; DataError where a
    weight file is truncated, a git-lfs pointer, or not safetensors.
    """
    if not (folder / "config.json").is_file():
        raise MissingError(
            f"{folder} is not a model folder",
            {"expected": "config.json", "found": _listing(folder)},
            why="A model is an ordinary Hugging Face folder with config.json and *.safetensors.",
            fix="Check the path; the name of a model on the hub has the form owner/name.",
        )
    weights = sorted(folder.glob("*.safetensors"))
    for index in folder.glob("*.safetensors.index.json"):
        named = _named_by(index)
        if missing := [name for name in named if not (folder / name).is_file()]:
            raise MissingError(
                f"{folder} lacks some of its weights",
                {"named by the index": f"{len(named)} files", "missing": ", ".join(missing[:3])},
                why="The model cannot be whole without them.",
                fix="Copy or download the missing files.",
            )
    if not weights:
        raise MissingError(
            f"{folder} holds no safetensors weights",
            {"expected": "*.safetensors", "found": _listing(folder)},
            why="Only safetensors are read: other formats can run code when they are opened.",
            fix="Convert the weights to safetensors, or check that the download was complete.",
        )
    for path in weights:
        refuse_lfs_pointer(path, "weights")
        size, header, expected = path.stat().st_size, read_header(path), None
        with suppress(ValueError, TypeError, KeyError, IndexError, AttributeError):
            tensors = json.loads(header).items()
            ends = [tensor["data_offsets"][1] for name, tensor in tensors if name != "__metadata__"]
            expected = 8 + len(header) + max(ends, default=0)
        if expected != size:
            raise DataError(
                f"{path} is truncated or damaged",
                {"bytes there": size, "bytes expected": expected or "unknown: the header is broken"},
                why="Some of the weights are missing or cannot be trusted.",
                fix="Copy or download the file again.",
            )
    return [folder / "config.json", *weights]


def _named_by(index: Path) -> list[str]:
    """The weight files that an index names. Raises as `check_folder` does."""
    folder = index.parent
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        outside = [name for name in names if Path(name).name != name]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(
            f"the index {index} is damaged",
            {"expected": "weight_map with the file of each tensor", "found": f"{type(error).__name__}: {error}"},
            why="Nobody can tell which files belong to the model.",
            fix="Copy or download the index again.",
        ) from None
    if outside:
        raise DataError(
            f"{index} names a file outside its folder",
            {"named": outside[0], "folder": folder},
            why="A model's files never leave its folder.",
            fix="Do not use this model; its index was tampered with.",
        )
    return names


def _listing(folder: Path) -> str:
    if not folder.is_dir():
        return "no such folder"
    return ", ".join(sorted(p.name for p in folder.iterdir())[:5]) or "an empty folder"


def read_header(path: Path) -> bytes:
    """The header of a safetensors file, as it stands there; nothing where it has none that can be read."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        return file.read(length) if 8 + length <= size and length <= MOST_HEADER_BYTES else b""

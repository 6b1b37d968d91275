"""Sizes of a model's files, from the headers of its weights alone."""

import json
import math
import struct
from pathlib import Path
from typing import NamedTuple

from transformers.utils.hub import cached_file

from stillroom import models
from stillroom.tokenizers import is_local


class Sizes(NamedTuple):
    num_parameters: int
    """Numbers in the weight files, where tied ones stand once."""
    size_bytes: int
    """Of the weight files."""


def sizes(name: str, revision: str | None) -> Sizes:
    """Of a model in a folder, or of the hub; the latter must have been loaded before.

    Raises:
        MissingError: its weights are not there.
        DataError: a file is damaged.
    """
    if is_local(name):
        folder = Path(name).expanduser()
    else:
        folder = Path(str(cached_file(name, "config.json", revision=revision, local_files_only=True))).parent
    weights = [path for path in models.check_folder(folder) if path.suffix == ".safetensors"]
    return Sizes(sum(map(_num_parameters, weights)), sum(path.stat().st_size for path in weights))


def _num_parameters(path: Path) -> int:
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    return sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")

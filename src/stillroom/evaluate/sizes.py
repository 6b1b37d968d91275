"""Sizes of a model's files, from the headers of its weights alone."""

from pathlib import Path
from typing import NamedTuple

from transformers.utils.hub import cached_file

from stillroom.config import is_local
from stillroom.estimates.headers import numbers_of
from stillroom.models.folder import check_folder


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
    weights = [path for path in check_folder(folder) if path.suffix == ".safetensors"]
    return Sizes(sum(sum(numbers_of(path).values()) for path in weights), sum(path.stat().st_size for path in weights))

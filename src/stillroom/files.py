"""Files: written whole or not at all, and told apart by their bytes."""

import fcntl
import json
import os
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from stillroom.errors import DataError, StorageError


def crc32(path: Path) -> int:
    """The CRC-32 of a file, which a flipped bit changes."""
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            checksum = zlib.crc32(block, checksum)
    return checksum


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(
            f"{path} is not JSON",
            {"problem": error},
            why="It says what the run is, so nothing can go on without it.",
            fix="Restore the file, or start again with --overwrite.",
        ) from None


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns what a disk says while ``path`` is written into a StorageError."""
    try:
        yield
    except OSError as error:
        folder = next((p for p in path.parents if p.is_dir()), Path())
        raise StorageError(
            f"{path} could not be written",
            {"reason": error.strerror or str(error), "free": f"{shutil.disk_usage(folder).free / 2**20:.0f} MiB"},
            why="What was written before is whole.",
            fix="Make room or mend the rights, then run the same command with --resume.",
        ) from error


def write_json(path: Path, values: Any) -> None:
    """Writes a JSON file under a temporary name, syncs it and renames it."""
    temporary = path.with_name(f".{path.name}.tmp")
    with writing(path), temporary.open("w", encoding="utf-8") as file:
        json.dump(values, file, indent=2, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
        temporary.replace(path)


def lock(folder: Path, busy: StorageError) -> IO[str]:
    """Locks a folder by its file ``.lock``, until what is returned is closed or the process ends.

    Raises:
        StorageError: ``busy``, where another process holds the lock.
    """
    file = (folder / ".lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise busy from None
    return file


def sync_folder(folder: Path) -> None:
    """Syncs the names in a folder, so that a file that was renamed into it is there after a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

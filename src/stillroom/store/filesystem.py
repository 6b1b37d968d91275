"""Place: where the files of a store are."""

import posixpath
from pathlib import Path
from typing import Any

import pyarrow as pa

from stillroom.errors import MissingError, require
from stillroom.store.format import MANIFEST, MOST_MANIFEST_BYTES, damaged


class StoreFiles:
    """A folder, here or wherever fsspec reaches."""

    def __init__(self, path: str) -> None:
        self.path, self.remote = path.rstrip("/"), "://" in path
        self._files: Any = None
        if self.remote:
            require("fsspec", "hub", f"reading {path}")
            import fsspec

            try:
                self._files, self.path = fsspec.core.url_to_fs(self.path)
            except ImportError as error:
                raise MissingError(
                    f"the store {path} cannot be reached",
                    {"needed": str(error)},
                    why="Each kind of address has a package of its own.",
                    fix="Install that package, or copy the store to this machine.",
                ) from None

    def of(self, name: str) -> str:
        return posixpath.join(self.path, name)

    def size(self, name: str) -> int:
        try:
            return self._files.size(self.of(name)) if self.remote else Path(self.of(name)).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            raise self._missing(name) from None

    def read(self, name: str, most: int) -> bytes:
        size = self.size(name)
        if size > most:
            raise damaged(self.path, f"{name} in bytes", size, f"at most {most}")
        if not self.remote:
            return Path(self.of(name)).read_bytes()
        return self._files.cat_file(self.of(name))

    def fetch(self, name: str, folder: Path) -> str:
        """A folder of small files, as one on this machine."""
        if not self.remote:
            return self.of(name)
        for file in self._files.ls(self.of(name), detail=True):
            if file["type"] == "file" and file["size"] <= MOST_MANIFEST_BYTES:
                (folder / posixpath.basename(file["name"])).write_bytes(self._files.cat_file(file["name"]))
        return str(folder)

    def open(self, name: str) -> Any:
        """The file as Arrow reads it: memory-mapped where it is here."""
        if not self.remote:
            return pa.memory_map(self.of(name))
        return pa.PythonFile(self._files.open(self.of(name), "rb"), mode="r")

    def _missing(self, name: str) -> MissingError:
        return MissingError(
            f"{self.path} is not a store" if name == MANIFEST else f"the store {self.path} lacks a file",
            {"missing": name},
            why="A store is a folder with manifest.json and the shards that it names.",
            fix="Check the path; the store of a capture is OUT/store. A missing shard has to be copied again.",
        )

"""Store: a store opened for reading. Any row by itself, memory-mapped; nothing is loaded but what is asked for."""

import posixpath
import zlib
from collections.abc import Sequence
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from stillroom.errors import DataError, MissingError, require
from stillroom.store.batches import check_uncompressed
from stillroom.store.config import AnySignal, Full
from stillroom.store.format import (
    MANIFEST,
    MOST_MANIFEST_BYTES,
    TOKENIZER,
    Manifest,
    Shard,
    damaged,
    emptied,
    read_manifest,
    row_crc32,
    schema,
)
from stillroom.store.levels import Levels


class Store:
    """The documents of a store, in their order, with what the teacher said of them.

    Args:
        path: the folder; or an address such as s3://bucket/store, where the package of that kind is installed.
        partial: take a store whose capture is not complete.

    Raises:
        MissingError: there is no store.
        DataError: it is damaged, of a later format, or not complete.
    """

    def __init__(self, path: str | Path, *, partial: bool = False) -> None:
        self.path = str(path)
        self.place = Place(self.path)
        self.manifest: Manifest = read_manifest(self.place.read(MANIFEST, MOST_MANIFEST_BYTES), self.path)
        if not (self.manifest.complete or partial):
            raise DataError(
                f"the store {self.path} is not complete",
                {"documents there": self.manifest.documents, "its capture": "interrupted, or under way"},
                why="A student would learn from a part of the data, and nobody would know.",
                fix="Go on with the capture by --resume; `stillroom store check` tells what is there.",
            )
        self.shards = [StoredShard(self.place, shard, self.manifest) for shard in self.manifest.shards]
        found = sum(shard.num_documents for shard in self.shards)
        if found != self.manifest.documents:
            raise damaged(self.path, "documents", found, self.manifest.documents)
        self._starts = np.cumsum([0, *(shard.num_documents for shard in self.shards)])
        self._lengths: np.ndarray | None = None

    def __len__(self) -> int:
        return self.manifest.documents

    @property
    def signal_config(self) -> AnySignal:
        return self.manifest.signal

    @property
    def fingerprint(self) -> str:
        return self.manifest.fingerprint

    @property
    def counts(self) -> dict[str, int]:
        """What the documents are, as a run writes it down."""
        m = self.manifest
        return {"documents": m.documents, "tokens": m.tokens, "tokens_learnt": m.positions}

    @property
    def lengths(self) -> np.ndarray:
        """int64 [documents]: the tokens of each document."""
        if self._lengths is None:
            self._lengths = np.concatenate([np.zeros(0, np.int64), *(shard.lengths() for shard in self.shards)])
        return self._lengths

    def fetch_tokenizer(self, folder: Path) -> str:
        """The folder of the tokenizer of the documents; one that is elsewhere is copied to ``folder``."""
        return self.place.fetch(TOKENIZER, folder)

    def tokens(self, index: int) -> np.ndarray:
        """The tokens of a document, [n]: a read-only view of the file."""
        shard, row = self._find(index)
        return shard.tokens(row)

    def keep(self, index: int) -> np.ndarray:
        """Whether the token after each is to be learnt, bool [n]; False for the last."""
        shard, row = self._find(index)
        return shard.keep(row)

    def learn(self, index: int) -> np.ndarray:
        """Which tokens of a document are to be learnt, bool [n]; entry i speaks of token i itself."""
        return np.roll(self.keep(index), 1)

    def document(self, index: int) -> int:
        """The number of a document in the data that were captured."""
        shard, row = self._find(index)
        return int(shard.column(row, "document").as_py())

    def name(self, index: int) -> str:
        """A document as a message calls it."""
        return f"{self.path} document {index}"

    def signal_bytes(self, index: int) -> int:
        """The size of a document's signal."""
        shard, row = self._find(index)
        return len(shard.signal(row))

    def levels(self, indices: Sequence[int]) -> Levels:
        """What is stored of the kept positions of some documents, one after the other.

        Raises:
            DataError: a row's checksum is wrong, or it cannot be decoded.
        """
        parts: dict[int, Levels] = {}
        by_shard: dict[int, list[int]] = {}
        for index in indices:
            by_shard.setdefault(int(np.searchsorted(self._starts, index, side="right")) - 1, []).append(index)
        for number, wanted in by_shard.items():
            start = int(self._starts[number])
            decoded = self.shards[number].levels([index - start for index in wanted])
            if len(by_shard) == 1:
                return decoded
            at = 0
            for index in wanted:
                end = at + int(self.keep(index).sum())
                parts[index] = decoded.slice(at, end)
                at = end
        return Levels.concatenate([parts[index] for index in indices])

    def logits(self, indices: Sequence[int]) -> np.ndarray:
        """Of a full store: the logits of the kept positions of some documents, float32 [kept, columns]."""
        found = [self._find(index) for index in indices]
        return np.concatenate([shard.logits(row) for shard, row in found])

    @property
    def num_shards(self) -> int:
        return len(self.shards)

    def _find(self, index: int) -> tuple["StoredShard", int]:
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self.shards[number], index - int(self._starts[number])


class Place:
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


class StoredShard:
    """One Arrow file and its tables, opened when first needed."""

    def __init__(self, place: Place, shard: Shard, manifest: Manifest) -> None:
        self.place, self.shard, self.manifest = place, shard, manifest
        self.num_documents = shard.documents
        self.files = {f"{shard.name}.arrow": shard.size_bytes, f"{shard.name}.tables": shard.tables_bytes}
        for name, size in self.files.items():
            found = place.size(name)
            if not found and not (name.endswith(".tables") and isinstance(manifest.signal, Full)):
                raise emptied(place.path, name)
            if found != size:
                raise damaged(place.path, f"{name} in bytes", found, size)

    @cached_property
    def batches(self) -> list[pa.RecordBatch]:
        name = f"{self.shard.name}.arrow"
        try:
            source = self.place.open(name)
            file = pa.ipc.open_file(source)
            self._check_columns(file.schema)
            check_uncompressed(source, self.shard.size_bytes)
            batches = [file.get_batch(i) for i in range(file.num_record_batches)]
            for batch in batches:
                batch.validate(full=True)
                if any(column.null_count for column in batch.columns):
                    raise damaged(self.place.path, f"columns of {name}", "nulls", "a value in each row")
        except (pa.ArrowException, OSError, ValueError) as error:
            if isinstance(error, DataError):
                raise
            raise damaged(self.place.path, name, str(error).splitlines()[0][:120], "an Arrow file") from None
        found = sum(map(len, batches))
        if found != self.num_documents:
            raise damaged(self.place.path, f"documents in {name}", found, self.num_documents)
        return batches

    def _check_columns(self, found: pa.Schema) -> None:
        expected = schema(self.manifest.num_columns)
        if found.equals(expected):
            return
        pairs = list(zip_longest(map(str, found), map(str, expected), fillvalue="none"))
        number = next((i for i, (one, other) in enumerate(pairs) if one != other), 0)
        where = f"column {number} of {self.shard.name}.arrow"
        raise damaged(self.place.path, where, *(text.removeprefix("pyarrow.Field")[:80] for text in pairs[number]))

    @cached_property
    def _starts(self) -> np.ndarray:
        return np.cumsum([0, *map(len, self.batches)])

    @cached_property
    def codec(self) -> Any:
        from stillroom.store.codec import Codec

        name = f"{self.shard.name}.tables"
        data = self.place.read(name, self.shard.tables_bytes)
        if (found := zlib.crc32(data)) != self.shard.tables_crc32:
            raise damaged(self.place.path, f"checksum of {name}", found, self.shard.tables_crc32)
        try:
            return Codec.from_bytes(data, self.manifest.num_columns, len(self.manifest.side))
        except ValueError as error:
            raise damaged(self.place.path, name, error, "the codec's tables") from None

    def lengths(self) -> np.ndarray:
        return np.concatenate([np.diff(batch["tokens"].offsets.to_numpy()).astype(np.int64) for batch in self.batches])

    def column(self, row: int, name: str) -> Any:
        batch = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self.batches[batch][name][row - int(self._starts[batch])]

    def tokens(self, row: int) -> np.ndarray:
        return self.column(row, "tokens").values.to_numpy(zero_copy_only=False)

    def keep(self, row: int) -> np.ndarray:
        return self.column(row, "keep").values.to_numpy(zero_copy_only=False)

    def signal(self, row: int) -> memoryview:
        """A row's bytes, after its checksum was found right."""
        tokens, keep = self.tokens(row), self.keep(row)
        signal = memoryview(self.column(row, "signal").as_buffer())
        found = row_crc32(self.column(row, "document").as_py(), tokens, keep, signal)
        expected = self.column(row, "crc32").as_py()
        where = f"{self.shard.name}.arrow row {row}"
        if found != expected:
            raise damaged(self.place.path, f"checksum of {where}", found, expected)
        highest = int(tokens.max(initial=0))
        if len(keep) != len(tokens) or (len(keep) and keep[-1]) or highest >= self.manifest.num_columns:
            raise damaged(self.place.path, f"tokens and keep of {where}", f"{len(tokens)} and {len(keep)}", "as many")
        return signal

    def logits(self, row: int) -> np.ndarray:
        signal, kept = self.signal(row), int(self.keep(row).sum())
        if not isinstance(self.manifest.signal, Full) or len(signal) != 4 * kept * self.manifest.num_columns:
            size = 4 * kept * self.manifest.num_columns
            raise damaged(self.place.path, f"bytes of {self.shard.name}.arrow row {row}", len(signal), size)
        return np.frombuffer(signal, "<f4").reshape(kept, self.manifest.num_columns)

    def levels(self, rows: Sequence[int]) -> Levels:
        """Of some rows, one after the other."""
        signals = [self.signal(row) for row in rows]  # which finds their checksums right first
        kept = [self.tokens(row)[self.keep(row)].astype(np.int32) for row in rows]
        offsets = np.cumsum([0, *map(len, kept)], dtype=np.int64)
        try:
            tokens = np.concatenate([np.zeros(0, np.int32), *kept])
            found = self.codec.decode(signals, tokens, offsets)
        except ValueError as error:
            if isinstance(error, DataError):
                raise
            raise damaged(
                self.place.path, f"signals in {self.shard.name}.arrow", error, "what its tables say"
            ) from None
        if self.manifest.signal.kind != "sampled" and found.counts.min(initial=1) < 1:
            raise damaged(self.place.path, f"entries in {self.shard.name}.arrow", 0, "at least 1 a position")
        return found

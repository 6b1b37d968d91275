"""Store: a store opened for reading. Any row by itself, memory-mapped; nothing is loaded but what is asked for."""

import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from stillroom.errors import DataError, MismatchError
from stillroom.layers import Layer
from stillroom.store.arrow import check_uncompressed
from stillroom.store.config import AnySignal, Full
from stillroom.store.filesystem import StoreFiles
from stillroom.store.format import (
    MANIFEST,
    MOST_MANIFEST_BYTES,
    TOKENIZER,
    Manifest,
    Shard,
    damaged,
    emptied,
    hidden_crc32,
    read_manifest,
    row_crc32,
    schema,
)
from stillroom.store.hidden_states import bytes_per_position, decode
from stillroom.store.quantize import LogProbCodes


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
        self.place = StoreFiles(self.path)
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

    def loss_mask(self, index: int) -> np.ndarray:
        """Whether the token after each is to be learnt, bool [n]; False for the last."""
        shard, row = self._find(index)
        return shard.loss_mask(row)

    def target_mask(self, index: int) -> np.ndarray:
        """Which tokens of a document are to be learnt, bool [n]; entry i speaks of token i itself."""
        return np.roll(self.loss_mask(index), 1)

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

    def levels(self, indices: Sequence[int]) -> LogProbCodes:
        """What is stored of the kept positions of some documents, one after the other.

        Raises:
            DataError: a row's checksum is wrong, or it cannot be decoded.
        """
        parts: dict[int, LogProbCodes] = {}
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
                end = at + int(self.loss_mask(index).sum())
                parts[index] = decoded.slice(at, end)
                at = end
        return LogProbCodes.concatenate([parts[index] for index in indices])

    def logits(self, indices: Sequence[int]) -> np.ndarray:
        """Of a full store: the logits of the kept positions of some documents, float32 [kept, columns]."""
        found = [self._find(index) for index in indices]
        return np.concatenate([shard.logits(row) for shard, row in found])

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The layers whose hidden states are stored, in the order of a model; empty where none are."""
        return () if self.manifest.hidden is None else self.manifest.hidden.layers

    def hidden(self, indices: Sequence[int], layers: Sequence[Layer] | None = None) -> dict[Layer, np.ndarray]:
        """The teacher's states at the kept positions of some documents, one after the other: float32 [kept, width].

        Args:
            layers: those that are wanted; by default all that are stored.

        Raises:
            MismatchError: one of them is not stored.
            DataError: a row's checksum is wrong, or its states cannot be decoded.
        """
        wanted: tuple[Layer, ...] = self.layers if layers is None else tuple(layers)
        for layer in wanted:
            if layer not in self.layers:
                raise self._lacks(layer)
        if not wanted:
            return {}
        found = [self._find(index) for index in indices]
        rows = [shard.hidden_bytes(row) for shard, row in found]  # no more is allocated than is there
        edges = np.cumsum([0, *(int(shard.loss_mask(row).sum()) for shard, row in found)]).tolist()
        shape = edges[-1], self.manifest.hidden_width
        states: dict[Layer, np.ndarray] = {layer: np.empty(shape, np.float32) for layer in wanted}
        for (shard, row), data, start, stop in zip(found, rows, edges[:-1], edges[1:], strict=True):
            shard.decode_hidden(row, data, {layer: states[layer][start:stop] for layer in wanted})
        return states

    def hidden_bytes(self, index: int) -> memoryview:
        """A document's hidden states as they are stored."""
        shard, row = self._find(index)
        return shard.hidden_bytes(row)

    def _lacks(self, layer: Layer) -> MismatchError:
        stored = ", ".join(map(str, self.layers))
        return MismatchError(
            f"the store {self.path} does not hold layer {layer}",
            {"asked for": layer, "stored": stored or "no hidden states"},
            why="What a layer of the teacher gave out is known only where the capture kept it.",
            fix=(f"Take one of the stored layers ({stored}), or capture" if stored else "Capture")
            + f" anew with hidden={{layers: [{', '.join(map(str, (*self.layers, layer)))}]}}.",
        )

    @property
    def num_shards(self) -> int:
        return len(self.shards)

    def _find(self, index: int) -> tuple["StoredShard", int]:
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self.shards[number], index - int(self._starts[number])


class StoredShard:
    """One Arrow file and its tables, opened when first needed."""

    def __init__(self, place: StoreFiles, shard: Shard, manifest: Manifest) -> None:
        self.place, self.shard, self.manifest = place, shard, manifest
        self.num_documents = shard.documents
        self._held: tuple[int, pa.RecordBatch] | None = None
        self.files = {f"{shard.name}.arrow": shard.size_bytes, f"{shard.name}.tables": shard.tables_bytes}
        for name, size in self.files.items():
            found = place.size(name)
            if not found and not (name.endswith(".tables") and isinstance(manifest.signal, Full)):
                raise emptied(place.path, name)
            if found != size:
                raise damaged(place.path, f"{name} in bytes", found, size)

    @cached_property
    def batches(self) -> list[pa.RecordBatch]:
        """All but the hidden states."""
        name = f"{self.shard.name}.arrow"
        with self._readable():
            source = self.place.open(name)
            file = pa.ipc.open_file(source)
            self._check_columns(file.schema)
            check_uncompressed(source, self.shard.size_bytes)
            if self.manifest.hidden is not None:
                file = _only(source, range(len(file.schema) - 1))
            batches = [file.get_batch(i) for i in range(file.num_record_batches)]
            for batch in batches:
                self._check_batch(batch)
        found = sum(map(len, batches))
        if found != self.num_documents:
            raise damaged(self.place.path, f"documents in {name}", found, self.num_documents)
        return batches

    @contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except (pa.ArrowException, OSError, ValueError) as error:
            if isinstance(error, DataError):
                raise
            raise damaged(
                self.place.path, f"{self.shard.name}.arrow", str(error).splitlines()[0][:120], "an Arrow file"
            ) from None

    def _check_batch(self, batch: pa.RecordBatch) -> None:
        batch.validate(full=True)
        if any(column.null_count for column in batch.columns):
            raise damaged(self.place.path, f"columns of {self.shard.name}.arrow", "nulls", "a value in each row")

    def _hidden_batch(self, number: int) -> pa.RecordBatch:
        """The hidden states of a record batch. The last one is held: where it lies elsewhere it was read whole."""
        held = self._held
        if held is None or held[0] != number:
            with self._readable():
                batch = self._hidden_file.get_batch(number)
                self._check_batch(batch)
            held = self._held = (number, batch)
        return held[1]

    @cached_property
    def _hidden_file(self) -> Any:
        self.batches  # noqa: B018  # which checks the file's headers first
        return _only(self.place.open(f"{self.shard.name}.arrow"), [len(self._schema) - 1])

    @property
    def _schema(self) -> pa.Schema:
        return schema(self.manifest.num_columns, hidden=self.manifest.hidden is not None)

    def _check_columns(self, found: pa.Schema) -> None:
        expected = self._schema
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
        from stillroom.store.codec.codec import Codec

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
        batch, place = self._batch_of(row)
        return self.batches[batch][name][place]

    def _batch_of(self, row: int) -> tuple[int, int]:
        """The record batch that a row is in, and its place there."""
        batch = int(np.searchsorted(self._starts, row, side="right")) - 1
        return batch, row - int(self._starts[batch])

    def tokens(self, row: int) -> np.ndarray:
        return self.column(row, "tokens").values.to_numpy(zero_copy_only=False)

    def loss_mask(self, row: int) -> np.ndarray:
        return self.column(row, "keep").values.to_numpy(zero_copy_only=False)

    def signal(self, row: int) -> memoryview:
        """A row's bytes, after its checksum was found right."""
        tokens, loss_mask = self.tokens(row), self.loss_mask(row)
        signal = memoryview(self.column(row, "signal").as_buffer())
        of_hidden = None if self.manifest.hidden is None else self.column(row, "hidden_crc32").as_py()
        found = row_crc32(self.column(row, "document").as_py(), tokens, loss_mask, signal, of_hidden)
        expected = self.column(row, "crc32").as_py()
        where = f"{self.shard.name}.arrow row {row}"
        if found != expected:
            raise damaged(self.place.path, f"checksum of {where}", found, expected)
        highest = int(tokens.max(initial=0))
        if len(loss_mask) != len(tokens) or (len(loss_mask) and loss_mask[-1]) or highest >= self.manifest.num_columns:
            raise damaged(
                self.place.path, f"tokens and keep of {where}", f"{len(tokens)} and {len(loss_mask)}", "as many"
            )
        return signal

    def hidden_bytes(self, row: int) -> memoryview:
        """A row's hidden states as they are stored, after their checksum and their size were found right."""
        config, width = self.manifest.hidden, self.manifest.hidden_width
        assert config is not None
        batch, place = self._batch_of(row)
        hidden = memoryview(self._hidden_batch(batch)["hidden"][place].as_buffer())
        tokens, loss_mask = self.tokens(row), self.loss_mask(row)
        found = hidden_crc32(self.column(row, "document").as_py(), tokens, loss_mask, hidden)
        expected = self.column(row, "hidden_crc32").as_py()
        where = f"hidden states of {self.shard.name}.arrow row {row}"
        if found != expected:
            raise damaged(self.place.path, f"checksum of {where}", found, expected)
        size = int(loss_mask.sum()) * bytes_per_position(config, width)
        if len(hidden) != size:
            raise damaged(self.place.path, f"bytes of {where}", len(hidden), size)
        return hidden

    def decode_hidden(self, row: int, data: memoryview, into: Mapping[Layer, np.ndarray]) -> None:
        """Writes a row's states, of some layers, into arrays of [kept, width]."""
        config, width = self.manifest.hidden, self.manifest.hidden_width
        assert config is not None
        try:
            decode(data, config, width, int(self.loss_mask(row).sum()), into)
        except ValueError as error:
            where = f"hidden states of {self.shard.name}.arrow row {row}"
            raise damaged(self.place.path, where, error, "states") from None

    def logits(self, row: int) -> np.ndarray:
        signal, kept = self.signal(row), int(self.loss_mask(row).sum())
        if not isinstance(self.manifest.signal, Full) or len(signal) != 4 * kept * self.manifest.num_columns:
            size = 4 * kept * self.manifest.num_columns
            raise damaged(self.place.path, f"bytes of {self.shard.name}.arrow row {row}", len(signal), size)
        return np.frombuffer(signal, "<f4").reshape(kept, self.manifest.num_columns)

    def levels(self, rows: Sequence[int]) -> LogProbCodes:
        """Of some rows, one after the other."""
        signals = [self.signal(row) for row in rows]  # which finds their checksums right first
        kept = [self.tokens(row)[self.loss_mask(row)].astype(np.int32) for row in rows]
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


def _only(source: Any, columns: Sequence[int]) -> Any:
    """An Arrow file of which some columns alone are read."""
    return pa.ipc.open_file(source, options=pa.ipc.IpcReadOptions(included_fields=list(columns)))

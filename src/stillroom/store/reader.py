"""A store opened for reading: any row by itself, memory-mapped; nothing is loaded but what is asked for."""

import struct
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from stillroom.errors import DataError, MismatchError
from stillroom.layers import Layer
from stillroom.store.config import AnySignal, Full
from stillroom.store.format import (
    MANIFEST,
    MOST_MANIFEST_BYTES,
    TOKENIZER,
    Manifest,
    Shard,
    StoreFiles,
    check_equal,
    damaged,
    empty,
    hidden_crc32,
    read_manifest,
    row_crc32,
    schema,
)
from stillroom.store.quantize import LogProbCodes, decode_hidden, hidden_bytes_per_position


class Store:
    """The documents of a store, in their order, with the teacher's signal of them.

    Args:
        path: the folder; or an address such as s3://bucket/store, where the package of that kind is installed.
        partial: take a store whose capture is not complete.

    Raises:
        MissingError: there is no store.
        DataError: it is damaged, of a later format, or not complete.
    """

    def __init__(self, path: str | Path, *, partial: bool = False) -> None:
        self.path = str(path)
        self.files = StoreFiles(self.path)
        self.manifest: Manifest = read_manifest(self.files.read(MANIFEST, MOST_MANIFEST_BYTES), self.path)
        if not (self.manifest.complete or partial):
            raise DataError(
                f"the store {self.path} is not complete",
                {"documents there": self.manifest.documents, "its capture": "interrupted, or under way"},
                why="A student would learn from a part of the data, and nobody would know.",
                fix="Go on with the capture by --resume; `stillroom store check` tells what is there.",
            )
        self.shards = [StoredShard(self.files, shard, self.manifest) for shard in self.manifest.shards]
        self._starts = np.cumsum([0, *(shard.num_documents for shard in self.shards)])
        check_equal(self.path, "documents", int(self._starts[-1]), self.manifest.documents)

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
        """The numbers of documents, tokens and targets, as a run writes them down."""
        m = self.manifest
        return {"documents": m.documents, "tokens": m.tokens, "tokens_learnt": m.positions}

    @property
    def lengths(self) -> np.ndarray:
        """int64 [documents]: the tokens of each document."""
        return self._lengths

    @cached_property
    def _lengths(self) -> np.ndarray:  # kept: a protocol's property cannot be a cached one
        lengths = self._of_all(lambda batch: batch["tokens"].value_lengths())
        check_equal(self.path, "tokens", int(lengths.sum()), self.manifest.tokens)
        return lengths

    @cached_property
    def document_numbers(self) -> np.ndarray:
        """int64 [documents]: the number of each document in the data that were captured."""
        return self._of_all(lambda batch: batch["document"])

    def _of_all(self, values: Callable[[pa.RecordBatch], pa.Array]) -> np.ndarray:
        arrays = [values(batch).to_numpy() for shard in self.shards for batch in shard.batches]
        return np.concatenate([np.zeros(0, np.int64), *arrays])

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The layers whose hidden states are stored, in the order of a model; empty where none are."""
        return () if self.manifest.hidden is None else self.manifest.hidden.layers

    def fetch_tokenizer(self, folder: Path) -> str:
        """The folder of the documents' tokenizer; one that is elsewhere is copied to ``folder``."""
        return self.files.fetch(TOKENIZER, folder)

    def tokens(self, index: int) -> np.ndarray:
        """The tokens of a document, [n]: a read-only view of the file."""
        return StoredShard.tokens(*self._find(index))

    def loss_mask(self, index: int) -> np.ndarray:
        """Whether the token after each is a target, bool [n]; False for the last."""
        return StoredShard.loss_mask(*self._find(index))

    def target_mask(self, index: int) -> np.ndarray:
        """Whether each token of a document is a target, bool [n]; entry i is about token i itself."""
        return np.roll(self.loss_mask(index), 1)

    def unchecked_mask(self, index: int) -> np.ndarray:
        """The target mask of a document that another process reads, which finds its checksum right: all processes count
        the targets of a step, and none need read the others' signals for that."""
        shard, row = self._find(index)
        return np.roll(shard.column(row, "keep").values.to_numpy(zero_copy_only=False), 1)

    def document(self, index: int) -> int:
        """The number of a document in the data that were captured."""
        return StoredShard.document(*self._find(index))

    def name(self, index: int) -> str:
        """A document as a message calls it."""
        return f"{self.path} document {index}"

    def signal_bytes(self, index: int) -> int:
        """The size of a document's signal."""
        return len(StoredShard.signal(*self._find(index)))

    def levels(self, indices: Sequence[int]) -> LogProbCodes:
        """The codes of the kept positions of some documents, one after the other.

        Raises:
            DataError: a row's checksum is wrong, or it cannot be decoded.
        """
        found = [self._find(index) for index in indices]
        shards = list(dict.fromkeys(shard for shard, _ in found))
        if len(shards) == 1:
            return shards[0].levels([row for _, row in found])
        parts: dict[tuple[StoredShard, int], LogProbCodes] = {}
        for shard in shards:
            rows = [row for one, row in found if one is shard]
            codes = shard.levels(rows)
            edges = np.cumsum([0, *(int(shard.loss_mask(row).sum()) for row in rows)]).tolist()
            parts |= {(shard, row): codes.slice(*each) for row, each in zip(rows, pairwise(edges), strict=True)}
        return LogProbCodes.concatenate([parts[place] for place in found])

    def logits(self, indices: Sequence[int]) -> np.ndarray:
        """The logits of a full store at the kept positions of some documents, float32 [kept, vocab_size]."""
        return np.concatenate([shard.logits(row) for shard, row in map(self._find, indices)])

    def hidden(self, indices: Sequence[int], layers: Sequence[Layer] | None = None) -> dict[Layer, np.ndarray]:
        """The teacher's states at the kept positions of some documents, one after the other: float32 [kept, width].

        Args:
            layers: those that are wanted; by default all that are stored.

        Raises:
            MismatchError: one of them is not stored.
            DataError: a row's checksum is wrong, or its states cannot be decoded.
        """
        wanted = self.layers if layers is None else tuple(layers)
        stored = ", ".join(map(str, self.layers))
        for layer in (layer for layer in wanted if layer not in self.layers):
            raise MismatchError(
                f"the store {self.path} does not hold layer {layer}",
                {"asked for": layer, "stored": stored or "no hidden states"},
                why="What a layer of the teacher gave out is known only where the capture kept it.",
                fix=(f"Take one of the stored layers ({stored}), or capture" if stored else "Capture")
                + f" anew with hidden={{layers: [{', '.join(map(str, (*self.layers, layer)))}]}}.",
            )
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
        return StoredShard.hidden_bytes(*self._find(index))

    def _find(self, index: int) -> tuple["StoredShard", int]:
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self.shards[number], index - int(self._starts[number])


class StoredShard:
    """One Arrow file and its tables, opened when first needed."""

    def __init__(self, files: StoreFiles, shard: Shard, manifest: Manifest) -> None:
        self.files, self.shard, self.manifest = files, shard, manifest
        self.num_documents = shard.documents
        self.arrow, self.tables = f"{shard.name}.arrow", f"{shard.name}.tables"
        self._hidden_file: Any = None
        self._held: tuple[int, pa.RecordBatch] | None = None
        for name, size in ((self.arrow, shard.size_bytes), (self.tables, shard.tables_bytes)):
            found = files.size(name)
            if not found and not (name == self.tables and isinstance(manifest.signal, Full)):
                raise empty(files.path, name)
            check_equal(files.path, f"{name} in bytes", found, size)

    @cached_property
    def batches(self) -> list[pa.RecordBatch]:
        """The record batches without the hidden states."""
        expected = schema(self.manifest.num_columns, hidden=self.manifest.hidden is not None)
        with self._readable():
            source = self.files.open(self.arrow)
            file = pa.ipc.open_file(source)
            if not file.schema.equals(expected):
                pairs = list(zip_longest(map(str, file.schema), map(str, expected), fillvalue="none"))
                number = next((i for i, (one, other) in enumerate(pairs) if one != other), 0)
                found, wanted = (text.removeprefix("pyarrow.Field")[:80] for text in pairs[number])
                raise damaged(self.files.path, f"column {number} of {self.arrow}", found, wanted)
            _check_uncompressed(source, self.shard.size_bytes)
            if self.manifest.hidden is not None:
                last = len(expected) - 1
                options = [pa.ipc.IpcReadOptions(included_fields=part) for part in (list(range(last)), [last])]
                file, self._hidden_file = (pa.ipc.open_file(source, options=each) for each in options)
            batches = [self._valid(file.get_batch(i)) for i in range(file.num_record_batches)]
        check_equal(self.files.path, f"documents in {self.arrow}", sum(map(len, batches)), self.num_documents)
        return batches

    @contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except (pa.ArrowException, OSError, ValueError) as error:
            if isinstance(error, DataError):
                raise
            raise damaged(self.files.path, self.arrow, str(error).splitlines()[0][:120], "an Arrow file") from None

    def _valid(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        batch.validate(full=True)
        if any(column.null_count for column in batch.columns):
            raise damaged(self.files.path, f"columns of {self.arrow}", "nulls", "a value in each row")
        return batch

    @cached_property
    def _starts(self) -> np.ndarray:
        return np.cumsum([0, *map(len, self.batches)])

    @cached_property
    def _found_right(self) -> np.ndarray:  # kept: no more is allocated than there are rows
        return np.zeros(self._starts[-1], bool)

    @cached_property
    def codec(self) -> Any:
        from stillroom.store.codec import Codec

        data = self.files.read(self.tables, self.shard.tables_bytes)
        check_equal(self.files.path, f"checksum of {self.tables}", zlib.crc32(data), self.shard.tables_crc32)
        try:
            return Codec.from_bytes(data, self.manifest.num_columns, len(self.manifest.side))
        except ValueError as error:
            raise damaged(self.files.path, self.tables, error, "the codec's tables") from None

    def column(self, row: int, name: str) -> Any:
        batch, place = self._batch_of(row)
        return self.batches[batch][name][place]

    def _batch_of(self, row: int) -> tuple[int, int]:
        """The record batch that a row is in, and its place there."""
        batch = int(np.searchsorted(self._starts, row, side="right")) - 1
        return batch, row - int(self._starts[batch])

    def document(self, row: int) -> int:
        return self._right(row, "document").as_py()

    def tokens(self, row: int) -> np.ndarray:
        return self._right(row, "tokens").values.to_numpy(zero_copy_only=False)

    def loss_mask(self, row: int) -> np.ndarray:
        return self._right(row, "keep").values.to_numpy(zero_copy_only=False)

    def _right(self, row: int, name: str) -> Any:
        """What a row says, after its checksum was found right once, whoever reads it and for whatever."""
        if not self._found_right[row]:
            self.signal(row)
        return self.column(row, name)

    def signal(self, row: int) -> memoryview:
        """A row's bytes, after its checksum was found right."""
        tokens, loss_mask = (
            self.column(row, name).values.to_numpy(zero_copy_only=False) for name in ("tokens", "keep")
        )
        signal = memoryview(self.column(row, "signal").as_buffer())
        hidden_checksum = None if self.manifest.hidden is None else self.column(row, "hidden_crc32").as_py()
        found = row_crc32(self.column(row, "document").as_py(), tokens, loss_mask, signal, hidden_checksum)
        where = f"{self.arrow} row {row}"
        check_equal(self.files.path, f"checksum of {where}", found, self.column(row, "crc32").as_py())
        highest = int(tokens.max(initial=0))
        if len(loss_mask) != len(tokens) or loss_mask[-1:].any() or highest >= self.manifest.num_columns:
            sizes = f"{len(tokens)} and {len(loss_mask)}"
            raise damaged(self.files.path, f"tokens and keep of {where}", sizes, "as many")
        self._found_right[row] = True
        return signal

    def hidden_bytes(self, row: int) -> memoryview:
        """A row's hidden states as they are stored, after their checksum and their size were found right."""
        config, width = self.manifest.hidden, self.manifest.hidden_width
        assert config is not None
        number, place = self._batch_of(row)
        if self._held is None or self._held[0] != number:  # the last batch is held, since a remote one was read whole
            with self._readable():
                self._held = number, self._valid(self._hidden_file.get_batch(number))
        hidden = memoryview(self._held[1]["hidden"][place].as_buffer())
        tokens, loss_mask = self.tokens(row), self.loss_mask(row)
        found = hidden_crc32(self.document(row), tokens, loss_mask, hidden)
        where = f"hidden states of {self.arrow} row {row}"
        check_equal(self.files.path, f"checksum of {where}", found, self.column(row, "hidden_crc32").as_py())
        size = int(loss_mask.sum()) * hidden_bytes_per_position(config, width)
        check_equal(self.files.path, f"bytes of {where}", len(hidden), size)
        return hidden

    def decode_hidden(self, row: int, data: memoryview, into: Mapping[Layer, np.ndarray]) -> None:
        """Writes a row's states, of some layers, into arrays of [kept, width]."""
        config, width = self.manifest.hidden, self.manifest.hidden_width
        assert config is not None
        try:
            decode_hidden(data, config, width, int(self.loss_mask(row).sum()), into)
        except ValueError as error:
            raise damaged(self.files.path, f"hidden states of {self.arrow} row {row}", error, "states") from None

    def logits(self, row: int) -> np.ndarray:
        signal, kept = self.signal(row), int(self.loss_mask(row).sum())
        size = 4 * kept * self.manifest.num_columns
        if not isinstance(self.manifest.signal, Full) or len(signal) != size:
            raise damaged(self.files.path, f"bytes of {self.arrow} row {row}", len(signal), size)
        return np.frombuffer(signal, "<f4").reshape(kept, self.manifest.num_columns)

    def levels(self, rows: Sequence[int]) -> LogProbCodes:
        """The codes of some rows, one after the other."""
        signals = [self.signal(row) for row in rows]  # which finds their checksums right first
        kept = [self.tokens(row)[self.loss_mask(row)].astype(np.int32) for row in rows]
        offsets = np.cumsum([0, *map(len, kept)], dtype=np.int64)
        codec = self.codec
        try:
            found = codec.decode(signals, np.concatenate([np.zeros(0, np.int32), *kept]), offsets)
        except ValueError as error:
            raise damaged(self.files.path, f"signals in {self.arrow}", error, "what its tables say") from None
        if self.manifest.signal.kind != "sampled" and found.counts.min(initial=1) < 1:
            raise damaged(self.files.path, f"entries in {self.arrow}", 0, "at least 1 a position")
        return found


def _check_uncompressed(source: Any, size: int) -> None:
    """Raises ValueError unless the headers of an Arrow file of ``size`` bytes say that no record batch is compressed.

    Arrow allocates whatever a compressed buffer says that it will become, so a file of a few bytes could ask for
    terabytes; a shard is never compressed. The headers are FlatBuffers, tables of Arrow's File.fbs and Message.fbs.
    """
    (length,) = _unpack("<i", _header(source, size, size - 10, 4), 0)  # the file ends with it and with ARROW1
    footer = _header(source, size, size - 10 - length, length)
    root = _follow(footer, 0)
    if _vector(footer, root, 2)[1]:
        raise ValueError("it holds dictionaries, which no column has")
    start, count = _vector(footer, root, 3)
    for i in range(count):  # each is the offset of a message, the size of its header and the size of its body
        offset, length, _ = _unpack("<qi4xq", footer, start + 24 * i)
        prefixed = _header(source, size, offset, length)
        if prefixed[:4] != b"\xff\xff\xff\xff":
            raise ValueError("a message does not begin as one")
        message, root = prefixed[8:], _follow(prefixed[8:], 0)
        version, kind, header = (_field(message, root, number) for number in range(3))
        if not (version and kind and header):
            raise ValueError("a message is not a record batch")
        if (*_unpack("<h", message, version), *_unpack("<B", message, kind)) != (4, 3):  # V5, RecordBatch
            raise ValueError("a message is not a record batch of Arrow's format 1.0")
        if _field(message, _follow(message, header), 3):  # the compression, which is there only where there is one
            raise ValueError("a body is compressed, and could ask for any amount of memory")


def _header(source: Any, size: int, start: int, length: int) -> bytes:
    if not 0 <= start <= start + length <= size:
        raise ValueError("a header lies outside the file")
    source.seek(start)
    return source.read(length)


def _unpack(kind: str, data: bytes, place: int) -> tuple[int, ...]:
    if not 0 <= place <= len(data) - struct.calcsize(kind):
        raise ValueError("a header is cut off")
    return struct.unpack_from(kind, data, place)


def _follow(data: bytes, place: int) -> int:
    """The place of the table or vector that the offset at ``place`` leads to."""
    return place + _unpack("<I", data, place)[0]


def _field(data: bytes, table: int, number: int) -> int:
    """The place of a field of a table; 0 where the table lacks it."""
    names = table - _unpack("<i", data, table)[0]
    if 4 + 2 * number >= _unpack("<H", data, names)[0]:
        return 0
    offset = _unpack("<H", data, names + 4 + 2 * number)[0]
    return table + offset if offset else 0


def _vector(data: bytes, table: int, number: int) -> tuple[int, int]:
    """The place of a vector's items, and their number."""
    if not (place := _field(data, table, number)):
        return 0, 0
    start = _follow(data, place)
    return start + 4, _unpack("<I", data, start)[0]

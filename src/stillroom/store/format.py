"""The format of a store: its manifest, the columns of its shards, its checksums, and where its files are.

A store is a folder: ``manifest.json``, the tokenizer in ``tokenizer/``, and shards, each an Arrow file ``00000.arrow``
with one row a document, and the codec's tables for its signal column, ``00000.tables``. docs/formats/store.md describes
it byte by byte.
"""

import hashlib
import json
import os
import posixpath
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Annotated, Any

import numpy as np
import pyarrow as pa
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from stillroom.errors import DataError, MissingError, StorageError, require
from stillroom.recipe import parse_json
from stillroom.runs import lock, seal, write_json, writing
from stillroom.store.config import HiddenStatesConfig, SignalConfig, side_columns

FORMAT, WITH_HIDDEN = 1, 2
"""The version of everything in the folder, and that of a store which holds hidden states too."""
MANIFEST, TOKENIZER = "manifest.json", "tokenizer"
MOST_MANIFEST_BYTES = 2**28
METADATA = b"stillroom"
"""The key of an exported file's note of the store that it came from: its manifest as JSON, without the shards."""
HIDDEN_KEYS = ("hidden", "hidden_width", "num_layers")
"""The keys of a manifest that only a store with hidden states has."""
COUNTS = ("documents", "positions", "tokens", "entries", "draws")
"""The keys of a manifest that count what is in all shards."""

PROMISE = "promise"
"""The engine of a store that a capture is to make: it has a manifest and a tokenizer, and no document."""

Count = Annotated[int, Field(ge=0, lt=2**62)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Shard(_Part):
    """One Arrow file with its tables."""

    name: Annotated[str, Field(pattern=r"^[0-9]{5,9}$")]
    """The files are NAME.arrow and NAME.tables."""
    documents: Annotated[int, Field(gt=0, lt=2**40)]
    positions: Count
    size_bytes: Count
    crc32: Count
    tables_bytes: Count
    tables_crc32: Count


class SourceInfo(_Part):
    """The name and fingerprint of a teacher, a tokenizer or data."""

    name: str
    fingerprint: str


class Manifest(_Part):
    """The description of a store. It is written anew, whole, after each shard."""

    format: int
    complete: bool
    """False while a capture is under way, or was interrupted."""
    teacher: SourceInfo
    engine: str
    """The program that ran the teacher: transformers, vllm, openai, import; PROMISE where none did yet."""
    tokenizer: SourceInfo
    template: str
    """The sha256 of the chat template that rows went through; "none" where they went through none."""
    data: SourceInfo
    part: tuple[Count, Annotated[int, Field(gt=0)]] = (0, 1)
    """The index of this part of the data, and the number of parts."""
    merged: tuple[SourceInfo, ...] = ()
    """The data of each store that this one was concatenated of, where they were of different data."""
    num_columns: Annotated[int, Field(gt=0, lt=2**24)]
    """The size of the vocabulary over which the teacher's softmax was taken."""
    length: Annotated[int, Field(gt=0, lt=2**31)]
    """The most input positions of a document."""
    signal: SignalConfig
    side: tuple[str, ...]
    """The names of the side columns, in their order."""
    seed: Count
    """The seed of the samples."""
    documents: Count = 0
    positions: Count = 0
    """The number of positions that have a signal."""
    tokens: Count = 0
    entries: Count = 0
    draws: Count = 0
    """The number of sampled ids, each counted once a position."""
    codec_error_nats: float = 0.0
    """The mean over positions of the divergence between the teacher's kept entries and what is read back; for a
    truncated signal at the stored temperature at which a position's is the largest."""
    shards: tuple[Shard, ...] = ()
    versions: dict[str, str] = Field(default_factory=dict)
    hidden: HiddenStatesConfig | None = None
    """The hidden states that are kept besides the signal; this key and the next two are there only where some are."""
    hidden_width: Annotated[int, Field(ge=0, le=2**20)] = 0
    """The channels of each hidden state; 0 where there are none."""
    num_layers: Annotated[int, Field(ge=0, le=2**20)] = 0
    """The teacher's blocks; 0 where there are no hidden states."""

    @model_serializer(mode="wrap")
    def _without_absent_keys(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {k: v for k, v in dump(self).items() if self.hidden is not None or k not in HIDDEN_KEYS}

    @model_validator(mode="after")
    def _is_consistent(self) -> "Manifest":
        if [shard.name for shard in self.shards] != [f"{i:05d}" for i in range(len(self.shards))]:
            raise ValueError("the shards are not 00000, 00001, … in this order")
        if list(self.side) != side_columns(self.signal):
            raise ValueError(f"the side columns of such a signal are {side_columns(self.signal)}")
        if any((self.hidden is None) != (number == 0) for number in (self.hidden_width, self.num_layers)):
            raise ValueError("hidden states have a width and are of some layers, and where there are none nothing is")
        layers = () if self.hidden is None else self.hidden.layers
        if any(isinstance(layer, int) and layer >= self.num_layers for layer in layers):
            raise ValueError("hidden states are of layers that the teacher does not have")
        if self.format != format_of(self.hidden):
            raise ValueError(f"with such hidden states the format is {format_of(self.hidden)}")
        return self

    @property
    def origins(self) -> list[tuple[SourceInfo, tuple[int, int]]]:
        """All data whose documents are here, each with the part that is."""
        return [(data, (0, 1)) for data in self.merged] or [(self.data, self.part)]

    @property
    def promised(self) -> bool:
        return self.engine == PROMISE

    @property
    def size_bytes(self) -> int:
        return sum(shard.size_bytes + shard.tables_bytes for shard in self.shards)

    @property
    def fingerprint(self) -> str:
        """The sha256 of all that decides the store's contents, its first 32 hex digits."""
        parts = self.model_dump(mode="json", exclude={"versions", "complete"})
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def format_of(hidden: HiddenStatesConfig | None) -> int:
    """The version of a store: readers that know nothing of hidden states refuse one that holds them."""
    return FORMAT if hidden is None else WITH_HIDDEN


def read_manifest(data: bytes, where: object) -> Manifest:
    """Reads a manifest from its file's bytes.

    Raises:
        DataError: it is broken, was changed, or is of a version that is not known.
    """
    if not data:
        raise empty(where, MANIFEST)
    try:
        values = parse_json(data)
        version = values["format"]
        expected = seal(values)["sha256"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise damaged(where, MANIFEST, f"{type(error).__name__}: {str(error)[:80]}", "a manifest") from None
    if type(version) is not int or version not in (FORMAT, WITH_HIDDEN):
        raise DataError(
            f"the store {where} has a format that is not known",
            {"its format": repr(version)[:20], "known": f"{FORMAT} to {WITH_HIDDEN}"},
            why="Read with other rules than it was written by, it would say what the teacher never said.",
            fix="Use the version of stillroom that wrote it, or a later one.",
        )
    if values.pop("sha256", None) != expected:
        raise damaged(where, f"checksum of {MANIFEST}", "another", expected[:16])
    try:
        manifest = Manifest.model_validate_json(json.dumps(values))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise damaged(where, f"{MANIFEST} at `{key}`", first["msg"], "a valid value") from None
    layers = [] if manifest.hidden is None else list(manifest.hidden.layers)
    if layers and (found := values["hidden"]["layers"]) != layers:  # a recipe may name them in any order, a store not
        raise damaged(where, f"{MANIFEST} at `hidden.layers`", found, f"in the order of a model, {layers}")
    return manifest


def damaged(where: object, what: str, found: object, expected: object) -> DataError:
    return DataError(
        f"the store {where} is damaged",
        {f"{what}: found": found, "expected": expected},
        why="Its files were changed, cut or mixed with others since they were written; nothing in them can be trusted.",
        fix="`stillroom store check` names all that is wrong; copy the store again, or capture it anew.",
    )


def check_equal(where: object, what: str, found: object, expected: object) -> None:
    """Raises the DataError of a damaged store unless the value that was found is the expected one."""
    if found != expected:
        raise damaged(where, what, found, expected)


def empty(where: object, name: str) -> DataError:
    """The error of a file that has its name and no bytes."""
    return DataError(
        f"{name} of the store {where} is empty",
        {name: "0 bytes"},
        why="Its writing was interrupted before anything reached the disk: by a copy that broke off, a full disk, or a "
        "machine that lost its power.",
        fix="Copy that file again from where the store came from, or capture it anew.",
    )


def no_tokenizer(what: str, missing: str, teacher_tokenizer: SourceInfo, why: str) -> MissingError:
    """The error of a store without its tokenizer."""
    return MissingError(
        what,
        {"missing": missing, "made with": teacher_tokenizer.name},
        why=why,
        fix=f"Save the tokenizer of {teacher_tokenizer.name} into that folder by `save_pretrained`.",
    )


def schema(vocab_size: int, *, hidden: bool = False) -> pa.Schema:
    """The columns of a shard. Token ids take two bytes where the vocabulary allows it."""
    token = pa.uint16() if vocab_size <= 2**16 else pa.uint32()
    fields = [
        ("document", pa.int64()),
        ("tokens", pa.list_(pa.field("item", token, nullable=False))),
        ("keep", pa.list_(pa.field("item", pa.bool_(), nullable=False))),
        ("signal", pa.large_binary()),
        ("crc32", pa.uint32()),
        *([("hidden_crc32", pa.uint32()), ("hidden", pa.large_binary())] if hidden else []),
    ]
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in fields])


def list_array(values: pa.Array, lengths: Iterable[int], kind: pa.DataType | None = None) -> pa.Array:
    """Values as lists of these lengths, one after the other."""
    offsets = pa.array(np.cumsum([0, *lengths], dtype=np.int32))
    return pa.ListArray.from_arrays(offsets, values, type=kind)


def row_crc32(
    document: int,
    tokens: np.ndarray,
    loss_mask: np.ndarray,
    signal: bytes | memoryview,
    hidden_crc32: int | None = None,
) -> int:
    """The checksum of a row: of its document, tokens and mask as little-endian int64, uint32 and bytes of 0 and 1, of
    its signal, and of the checksum of its hidden states, as uint32, so that a signal is checked without reading them.
    """
    checksum = zlib.crc32(signal, _crc32_of_document(document, tokens, loss_mask))
    return checksum if hidden_crc32 is None else zlib.crc32(int(hidden_crc32).to_bytes(4, "little"), checksum)


def hidden_crc32(document: int, tokens: np.ndarray, loss_mask: np.ndarray, hidden: bytes | memoryview) -> int:
    """The checksum of a row's document, tokens and mask, and then of its hidden states."""
    return zlib.crc32(hidden, _crc32_of_document(document, tokens, loss_mask))


def _crc32_of_document(document: int, tokens: np.ndarray, loss_mask: np.ndarray) -> int:
    checksum = zlib.crc32(int(document).to_bytes(8, "little", signed=True))
    checksum = zlib.crc32(np.ascontiguousarray(tokens, dtype="<u4").data, checksum)
    return zlib.crc32(np.ascontiguousarray(loss_mask, dtype=np.uint8).data, checksum)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes a manifest with its checksum; it is there whole or not at all."""
    write_json(folder / MANIFEST, seal(manifest.model_dump(mode="json")))


@contextmanager
def synced_file(path: Path) -> Iterator[IO[bytes]]:
    """A file to be written: it has a temporary name, under which it is locked, and is synced and renamed at the end."""
    temporary = path.with_name(f"{path.name}.tmp")
    busy = StorageError(
        f"another process writes {path}",
        {"at work on": temporary},
        why="Two that write one file would mix what they write.",
        fix="Wait for it or stop it; or choose another name.",
    )
    with writing(path):
        file = lock(temporary, busy)
    with file:
        try:
            file.truncate(0)  # of what a killed one left
            yield file
            with writing(path):
                file.flush()
                os.fsync(file.fileno())
                temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


class StoreFiles:
    """The files of a store, in a folder of this machine or wherever fsspec reaches."""

    def __init__(self, path: str) -> None:
        self.path, self.remote = path.rstrip("/"), "://" in path
        self._filesystem: Any = None
        if self.remote:
            require("fsspec", "hub", f"reading {path}")
            import fsspec

            try:
                self._filesystem, self.path = fsspec.core.url_to_fs(self.path)
            except ImportError as error:
                raise MissingError(
                    f"the store {path} cannot be reached",
                    {"needed": str(error)},
                    why="Each kind of address has a package of its own.",
                    fix="Install that package, or copy the store to this machine.",
                ) from None

    def address(self, name: str) -> str:
        return posixpath.join(self.path, name)

    def size(self, name: str) -> int:
        try:
            if self.remote:
                return self._filesystem.size(self.address(name))
            return Path(self.address(name)).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            raise MissingError(
                f"{self.path} is not a store" if name == MANIFEST else f"the store {self.path} lacks a file",
                {"missing": name},
                why="A store is a folder with manifest.json and the shards that it names.",
                fix="Check the path; the store of a capture is OUT/store. A missing shard has to be copied again.",
            ) from None

    def read(self, name: str, most: int) -> bytes:
        """The bytes of a file. DataError where it has more than ``most``."""
        size = self.size(name)
        if size > most:
            raise damaged(self.path, f"{name} in bytes", size, f"at most {most}")
        return self._filesystem.cat_file(self.address(name)) if self.remote else Path(self.address(name)).read_bytes()

    def fetch(self, name: str, folder: Path) -> str:
        """A folder of small files as one of this machine: itself, or its files copied to ``folder``."""
        if not self.remote:
            return self.address(name)
        for file in self._filesystem.ls(self.address(name), detail=True):
            if file["type"] == "file" and file["size"] <= MOST_MANIFEST_BYTES:
                (folder / posixpath.basename(file["name"])).write_bytes(self._filesystem.cat_file(file["name"]))
        return str(folder)

    def crc32(self, name: str, to: IO[bytes] | None = None) -> int:
        """The checksum of a file, which is copied to another one on the way."""
        checksum = 0
        with self.open(name) as file:
            while block := file.read(1 << 22):
                checksum = zlib.crc32(block, checksum)
                if to is not None:
                    to.write(block)
        return checksum

    def open(self, name: str) -> Any:
        """The file as Arrow reads it, memory-mapped where it is on this machine."""
        if not self.remote:
            return pa.memory_map(self.address(name))
        return pa.PythonFile(self._filesystem.open(self.address(name), "rb"), mode="r")

"""The store's format: its manifest, and the columns of its shards. docs/formats/store.md tells it byte by byte.

A store is a folder: ``manifest.json``, the tokenizer in ``tokenizer/``, and shards, each an Arrow file ``00000.arrow``
with one row a document, and the codec's tables for its signal column, ``00000.tables``.
"""

import hashlib
import json
import zlib
from collections.abc import Mapping
from typing import Annotated, Any

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

from stillroom.errors import DataError
from stillroom.store.config import HiddenStatesConfig, SignalConfig, side_columns

FORMAT, WITH_HIDDEN = 1, 2
"""The version of everything in the folder, and that of a store which holds hidden states too."""
MANIFEST, TOKENIZER = "manifest.json", "tokenizer"
MOST_MANIFEST_BYTES = 2**28
OF_HIDDEN = ("hidden", "hidden_width", "num_layers")
"""The keys of a manifest that only a store with hidden states has."""

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
    """Where something came from."""

    name: str
    fingerprint: str


class Manifest(_Part):
    """What a store is. It is written anew, whole, after each shard."""

    format: int
    complete: bool
    """False while a capture is under way, or was interrupted."""
    teacher: SourceInfo
    engine: str
    """What asked the teacher: transformers, vllm, openai, import."""
    tokenizer: SourceInfo
    template: str
    """The sha256 of the chat template that rows went through; "none" where they went through none."""
    data: SourceInfo
    part: tuple[Count, Annotated[int, Field(gt=0)]] = (0, 1)
    """Which part of the data this is, and of how many."""
    merged: tuple[SourceInfo, ...] = ()
    """Of a store that was merged of stores of other data: the data of each."""
    num_columns: Annotated[int, Field(gt=0, lt=2**24)]
    """The columns over which the teacher's softmax was taken."""
    length: Annotated[int, Field(gt=0, lt=2**31)]
    """The most input positions of a document."""
    signal: SignalConfig
    side: tuple[str, ...]
    """The names of the side columns, in their order."""
    seed: Count
    """Of the draws."""
    documents: Count = 0
    positions: Count = 0
    """Positions that have a signal."""
    tokens: Count = 0
    entries: Count = 0
    draws: Count = 0
    """Different drawn ids."""
    codec_error_nats: float = 0.0
    """Mean over positions of the divergence between what the teacher said of the kept entries and what is read back; of
    a truncated signal at the stored temperature where a position's is the most."""
    shards: tuple[Shard, ...] = ()
    versions: dict[str, str] = Field(default_factory=dict)
    hidden: HiddenStatesConfig | None = None
    """The inner states that are kept besides the signal; the key is there only where some are, as are the next two."""
    hidden_width: Annotated[int, Field(ge=0, le=2**20)] = 0
    """The channels of each of them; 0 where there are none."""
    num_layers: Annotated[int, Field(ge=0, le=2**20)] = 0
    """The teacher's blocks; 0 where there are no hidden states."""

    @model_serializer(mode="wrap")
    def _without_what_is_not_there(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values = dump(self)
        return {k: v for k, v in values.items() if self.hidden is not None or k not in OF_HIDDEN}

    @model_validator(mode="after")
    def _fits_together(self) -> "Manifest":
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
    def size_bytes(self) -> int:
        return sum(shard.size_bytes + shard.tables_bytes for shard in self.shards)

    @property
    def fingerprint(self) -> str:
        """The sha256, in hex, of all that the store says."""
        parts = self.model_dump(mode="json", exclude={"versions", "complete"})
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def format_of(hidden: HiddenStatesConfig | None) -> int:
    """The version of a store: readers that know nothing of hidden states refuse one that holds them."""
    return FORMAT if hidden is None else WITH_HIDDEN


def seal(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a manifest with their checksum, the sha256 of them as JSON with sorted keys and no spaces."""
    rest = {key: value for key, value in values.items() if key != "sha256"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return {**rest, "sha256": hashlib.sha256(text.encode()).hexdigest()}


def read_manifest(data: bytes, where: object) -> Manifest:
    """A manifest from its file's bytes.

    Raises:
        DataError: it is broken, was changed, or is of a version that is not known.
    """
    if not data:
        raise emptied(where, MANIFEST)
    try:
        values = json.loads(data)
        version = values["format"]
        expected = seal(values)["sha256"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise damaged(where, "manifest.json", f"{type(error).__name__}: {str(error)[:80]}", "a manifest") from None
    if type(version) is not int or version not in (FORMAT, WITH_HIDDEN):
        raise DataError(
            f"the store {where} has a format that is not known",
            {"its format": repr(version)[:20], "known": f"{FORMAT} to {WITH_HIDDEN}"},
            why="Read with other rules than it was written by, it would say what the teacher never said.",
            fix="Use the version of stillroom that wrote it, or a later one.",
        )
    if values.pop("sha256", None) != expected:
        raise damaged(where, "checksum of manifest.json", "another", expected[:16])
    try:
        manifest = Manifest.model_validate_json(json.dumps(values))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise damaged(where, f"manifest.json at `{place}`", first["msg"], "a valid value") from None
    layers = [] if manifest.hidden is None else list(manifest.hidden.layers)
    if layers and (found := values["hidden"]["layers"]) != layers:  # a recipe may name them in any order, a store not
        raise damaged(where, "manifest.json at `hidden.layers`", found, f"in the order of a model, {layers}")
    return manifest


def damaged(where: object, what: str, found: object, expected: object) -> DataError:
    return DataError(
        f"the store {where} is damaged",
        {f"{what}: found": found, "expected": expected},
        why="Its files were changed, cut or mixed with others since they were written; nothing in them can be trusted.",
        fix="`stillroom store check` names all that is wrong; copy the store again, or capture it anew.",
    )


def emptied(where: object, name: str) -> DataError:
    """The error of a file that has its name and no bytes."""
    return DataError(
        f"{name} of the store {where} is empty",
        {name: "0 bytes"},
        why="Its writing was interrupted before anything reached the disk: by a copy that broke off, a full disk, or a "
        "machine that lost its power.",
        fix="Copy that file again from where the store came from, or capture it anew.",
    )


def schema(num_columns: int, *, hidden: bool = False) -> pa.Schema:
    """The columns of a shard. Token ids take two bytes where the vocabulary allows it."""
    token = pa.uint16() if num_columns <= 2**16 else pa.uint32()
    fields = [
        pa.field("document", pa.int64(), nullable=False),
        pa.field("tokens", pa.list_(pa.field("item", token, nullable=False)), nullable=False),
        pa.field("keep", pa.list_(pa.field("item", pa.bool_(), nullable=False)), nullable=False),
        pa.field("signal", pa.large_binary(), nullable=False),
        pa.field("crc32", pa.uint32(), nullable=False),
    ]
    if hidden:
        fields += [
            pa.field("hidden_crc32", pa.uint32(), nullable=False),
            pa.field("hidden", pa.large_binary(), nullable=False),
        ]
    return pa.schema(fields)


def row_crc32(
    document: int,
    tokens: np.ndarray,
    loss_mask: np.ndarray,
    signal: bytes | memoryview,
    hidden_crc32: int | None = None,
) -> int:
    """The checksum of a row: document, tokens and keep as little-endian int64, uint32 and bytes of 0 and 1, signal; and
    the checksum of its hidden states where it has some, as uint32, so that a signal is checked without reading them."""
    checksum = zlib.crc32(signal, _crc32_of_document(document, tokens, loss_mask))
    return checksum if hidden_crc32 is None else zlib.crc32(int(hidden_crc32).to_bytes(4, "little"), checksum)


def hidden_crc32(document: int, tokens: np.ndarray, loss_mask: np.ndarray, hidden: bytes | memoryview) -> int:
    """The checksum of a row's hidden states, which are those of this document: of it, then of them."""
    return zlib.crc32(hidden, _crc32_of_document(document, tokens, loss_mask))


def _crc32_of_document(document: int, tokens: np.ndarray, loss_mask: np.ndarray) -> int:
    checksum = zlib.crc32(int(document).to_bytes(8, "little", signed=True))
    checksum = zlib.crc32(np.ascontiguousarray(tokens, dtype="<u4").data, checksum)
    return zlib.crc32(np.ascontiguousarray(loss_mask, dtype=np.uint8).data, checksum)


def values_of(manifest: Manifest) -> dict[str, Any]:
    """The manifest as JSON values, with their checksum."""
    return seal(manifest.model_dump(mode="json"))

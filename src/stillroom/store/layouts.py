"""Layouts of Parquet files that hold top-k log-probabilities; their rows are read a few at a time."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from stillroom.errors import DataError, MissingError
from stillroom.store.distillkit import AnyCompression, LegacyCompression, decode

NAMES = {
    "tokens": ("tokens", "input_ids"),
    "ids": ("ids", "token_ids"),
    "log_probs": ("log_probs", "logprobs", "top_values"),
}
"""Columns of the plain layout, by the names that they may have."""
PACKED = ("compressed_logprobs", "bytepacked_indices")
PACKED_LEGACY = ("packed_indices", "exact_values", "coeffs")
METADATA = b"stillroom"
"""An exported file's note of the store that it came from."""
ROWS_AT_ONCE = 8
KINDS = {
    **dict.fromkeys(("tokens", "input_ids", "labels", "attention_mask", "keep"), (1, "whole numbers")),
    **dict.fromkeys(("ids", "token_ids", "packed_indices", *PACKED), (2, "whole numbers")),
    **dict.fromkeys(("log_probs", "logprobs", "top_values", "exact_values", "coeffs"), (2, "numbers")),
    **dict.fromkeys(("entropy", "label_log_prob"), (1, "numbers")),
    "document": (0, "whole numbers"),
}
"""The depth of the lists of each column that is read, and their contents. Columns that begin with log_rest are like
entropy; others are left alone."""


@dataclass(frozen=True)
class ForeignRow:
    """A text with the teacher's signal of its positions, as a file has it."""

    where: str
    document: int | None
    tokens: np.ndarray
    """int64 [n]"""
    loss_mask: np.ndarray | None
    """bool [n]; None where the file does not say."""
    counts: np.ndarray
    """int64 [p] entries of each position; their ``ids`` (int64) and ``log_probs`` (float64) are one after the other."""
    ids: np.ndarray
    log_probs: np.ndarray
    num_ordered: int | None = None
    """The first so many entries of a position are known never to rise; None is all of them."""
    further: dict[str, np.ndarray] = field(default_factory=dict)
    """Columns of one number a position: log_rest, log_rest@2.0, entropy, label_log_prob."""


@dataclass(frozen=True)
class Scan:
    """The facts of all the files that are known before any is read whole."""

    files: tuple[Path, ...]
    columns: frozenset[str]
    metadata: dict[str, Any]
    """The manifest of the store that they were exported from, or nothing."""
    fingerprint: str
    num_rows: int
    most_tokens: int
    most_entries: int
    """The most entries of a position; 0 where the columns do not tell."""


def find_files(paths: Sequence[str]) -> tuple[Path, ...]:
    """Files, and the .parquet files of folders, in their order. MissingError where there are none."""
    found: list[Path] = []
    for path in map(Path, paths):
        found += sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    for path in found or map(Path, paths):
        if not path.is_file():
            raise MissingError(
                f"{path} is not there" if not path.is_dir() else f"the folder {path} has no .parquet files",
                {"looked for": path.absolute()},
                why="A store is made of what these files hold.",
                fix="Name Parquet files, or a folder of them: `stillroom store import FILE… out=DIR tokenizer=PATH`.",
            )
    return tuple(found)


def scan(paths: Sequence[str]) -> Scan:
    """Reads the files' headers, lengths and checksums.

    Raises:
        MissingError: a file is not there.
        DataError: one is not Parquet, or has other columns than the first.
    """
    files = find_files(paths)
    digest, num_rows, most_tokens, most_entries = hashlib.sha256(), 0, 0, 0
    columns: frozenset[str] | None = None
    metadata: dict[str, Any] | None = None
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
        with _opened(path) as parquet:
            here, notes = frozenset(parquet.schema_arrow.names), (parquet.schema_arrow.metadata or {}).get(METADATA)
            try:
                notes = {} if notes is None else dict(json.loads(notes))
            except (ValueError, TypeError):
                raise _bad(path, "its note of the store that it came from is broken", str(notes)[:60]) from None
            if (columns is not None and here != columns) or (metadata is not None and notes != metadata):
                raise _bad(path, "columns or their notes differ from those of the first file", sorted(here))
            columns, metadata = here, notes
            tokens, ids = name_of("tokens", here), name_of("ids", here)
            if tokens is None:
                raise _bad(path, "there is no column of tokens", sorted(here))
            _check_types(parquet.schema_arrow, path)
            num_rows += parquet.metadata.num_rows
            for batch in _batches(parquet, path, [tokens, *([ids] if ids else [])]):
                most_tokens = max(most_tokens, int(_lengths(batch[tokens]).max(initial=0)))
                if ids:
                    most_entries = max(most_entries, int(_lengths(batch[ids].values).max(initial=0)))
    assert columns is not None
    return Scan(files, columns, metadata or {}, digest.hexdigest()[:32], num_rows, most_tokens, most_entries)


def name_of(column: str, names: frozenset[str]) -> str | None:
    """The name that a column of the plain layout has here."""
    return next((name for name in NAMES[column] if name in names), None)


def plain_names(scanned: Scan) -> tuple[str, str, str]:
    """The names of the columns of tokens, ids and log-probabilities.

    Raises:
        DataError: one is not there.
    """
    names = [name_of(column, scanned.columns) for column in NAMES]
    missing = [" or ".join(known) for known, name in zip(NAMES.values(), names, strict=True) if name is None]
    if missing:
        raise _bad(scanned.files[0], f"there is no column {', '.join(missing)}", sorted(scanned.columns))
    tokens, ids, log_probs = map(str, names)
    return tokens, ids, log_probs


def plain_rows(scanned: Scan) -> Iterator[ForeignRow]:
    """The rows of files of plain columns."""
    tokens, ids, log_probs = plain_names(scanned)
    further = sorted(c for c in scanned.columns if c.startswith("log_rest") or c in ("entropy", "label_log_prob"))
    for where, path, batch, row in _rows(scanned):
        start, stop = _bounds(batch[ids], row)
        numbers, counts = _nested(batch[ids].values, start, stop)
        values, others = _nested(batch[log_probs].values, *_bounds(batch[log_probs], row))
        if not np.array_equal(counts, others):
            raise _bad(path, "a row has other numbers of ids than of log-probabilities", where)
        numbers_of = {name: _list(batch[name], row).astype(np.float64) for name in further}
        for name, column in numbers_of.items():
            if len(column) != stop - start:
                raise _bad(path, f"`{name}` has {len(column)} numbers for {stop - start} positions", where)
        yield ForeignRow(
            where,
            int(batch["document"][row].as_py()) if "document" in scanned.columns else None,
            _list(batch[tokens], row).astype(np.int64),
            _loss_mask(batch, row, scanned.columns, where, path),
            counts,
            numbers.astype(np.int64),
            values.astype(np.float64),
            None,
            numbers_of,
        )


def distillkit_rows(scanned: Scan, settings: AnyCompression) -> Iterator[ForeignRow]:
    """The rows of DistillKit's compressed files."""
    names = PACKED_LEGACY if isinstance(settings, LegacyCompression) else PACKED
    tokens = str(name_of("tokens", scanned.columns))
    for where, path, batch, row in _rows(scanned):
        columns = {name: _matrix(batch[name], row, path, name, where) for name in names}
        if len({len(values) for values in columns.values()}) > 1:
            raise _bad(path, "a row has more positions of one column than of another", where)
        ids, log_probs = decode(settings, columns, where)
        yield ForeignRow(
            where,
            None,
            _list(batch[tokens], row).astype(np.int64),
            _loss_mask(batch, row, scanned.columns, where, path),
            np.full(len(ids), settings.k, np.int64),
            ids.ravel(),
            log_probs.ravel(),
            settings.exact_k,
        )


def _loss_mask(batch: pa.RecordBatch, row: int, columns: frozenset[str], where: str, path: Path) -> np.ndarray | None:
    """Whether the token after each is a target, where the file says it by `keep` or by `labels`; else None."""
    if "attention_mask" in columns and not _list(batch["attention_mask"], row).all():
        raise _bad(path, "attention_mask leaves out some tokens, so the row is not one text", where)
    if "keep" in columns:
        return _list(batch["keep"], row).astype(bool)
    if "labels" in columns:
        labels = _list(batch["labels"], row).astype(np.int64)
        return np.append(labels[1:] >= 0, False) if len(labels) else np.zeros(0, bool)
    return None


def _rows(scanned: Scan) -> Iterator[tuple[str, Path, pa.RecordBatch, int]]:
    columns = [name for name in sorted(scanned.columns) if _kind(name)]
    for path in scanned.files:
        number = 0
        with _opened(path) as parquet:
            for batch in _batches(parquet, path, columns):
                for row in range(len(batch)):
                    yield f"{path} row {number}", path, batch, row
                    number += 1


def _opened(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path, memory_map=True, pre_buffer=False)
    except (pa.ArrowException, OSError) as error:
        raise _bad(path, "it is not a Parquet file", str(error).splitlines()[0][:100]) from None


def _batches(parquet: pq.ParquetFile, path: Path, columns: list[str]) -> Iterator[pa.RecordBatch]:
    try:
        for batch in parquet.iter_batches(ROWS_AT_ONCE, columns=columns):
            for name in columns:
                level = batch[name]
                while not level.null_count and isinstance(level, pa.ListArray | pa.LargeListArray):
                    level = level.values
                if level.null_count:
                    raise _bad(path, f"`{name}` lacks values", "null")
            yield batch
    except (pa.ArrowException, OSError) as error:
        raise _bad(path, "it cannot be read to its end", str(error).splitlines()[0][:100]) from None


def _lengths(column: pa.Array) -> np.ndarray:
    return np.diff(column.offsets.to_numpy())


def _kind(name: str) -> tuple[int, str] | None:
    return (1, "numbers") if name.startswith("log_rest") else KINDS.get(name)


def _check_types(schema: pa.Schema, path: Path) -> None:
    """Raises DataError where a column that is known by its name holds something else."""
    for column in schema:
        known = _kind(column.name)
        if known is None:
            continue
        depth, inner = 0, column.type
        while pa.types.is_list(inner) or pa.types.is_large_list(inner):
            depth, inner = depth + 1, inner.value_type
        whole = pa.types.is_integer(inner) or (column.name == "keep" and pa.types.is_boolean(inner))
        right = whole if known[1] == "whole numbers" else pa.types.is_floating(inner)
        if depth != known[0] or not right:
            wanted = f"{'lists of ' * known[0]}{known[1]}"
            raise _bad(path, f"`{column.name}` is not of {wanted}", column.type)


def _bounds(column: Any, row: int) -> tuple[int, int]:
    offsets = column.offsets
    return int(offsets[row].as_py()), int(offsets[row + 1].as_py())


def _list(column: Any, row: int) -> np.ndarray:
    start, stop = _bounds(column, row)
    return column.values[start:stop].to_numpy(zero_copy_only=False)


def _nested(inner: pa.Array, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """The values of some inner lists, one after the other, and the length of each list."""
    offsets = inner.offsets[start : stop + 1].to_numpy()
    values = inner.values[int(offsets[0]) : int(offsets[-1])].to_numpy(zero_copy_only=False)
    return values, np.diff(offsets).astype(np.int64)


def _matrix(column: pa.Array, row: int, path: Path, name: str, where: str) -> np.ndarray:
    """A row's lists, all of one length, [p, width]."""
    values, lengths = _nested(column.values, *_bounds(column, row))
    if len(lengths) and lengths.min() != lengths.max():
        raise _bad(path, f"`{name}` has {lengths.min()} to {lengths.max()} values a position", where)
    if name in PACKED:
        if values.size and (values.min() < 0 or values.max() > 255):
            raise _bad(path, f"`{name}` is not of bytes", where)
        values = values.astype(np.uint8)
    return values.reshape(len(lengths), int(lengths[0]) if len(lengths) else 0)


def _bad(path: Path, what: str, found: object) -> DataError:
    return DataError(
        f"{path} cannot be imported",
        {"problem": what, "found": found},
        why="What is read by guessing may be something else than the teacher said.",
        fix="See `stillroom store --help` for the layouts that are known; name the right one by layout=.",
    )

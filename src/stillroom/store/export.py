"""Export: a store as plain columns of one Parquet file, which anything reads."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from stillroom.errors import StorageError
from stillroom.runs import writing
from stillroom.store.config import SAMPLED, AnySignal, Full, known_temperatures, side_columns
from stillroom.store.format import Manifest
from stillroom.store.quantize import to_sparse
from stillroom.store.reader import Store

METADATA = b"stillroom"
"""The file's own note of the store that it came from: its manifest as JSON, without the shards."""
ENTRIES_AT_ONCE = 1 << 20
"""Entries that are in memory at a time."""


def export(
    store: Store, out: str | Path, *, overwrite: bool = False, report: Callable[[str], object] = lambda _: None
) -> int:
    """Writes one row a document, under a temporary name, synced and renamed; returns the file's size in bytes.

    ``ids`` and ``log_probs`` hold one list for each kept position, likeliest exact entries first; those of a truncated
    signal and its ``log_rest`` sum to 1. Those of a sampled one are weights, which sum to 1 on average. Hidden states
    are left out (``left_out``).

    Raises:
        StorageError: the file exists and ``overwrite`` is off, or it cannot be written.
        DataError: the store is damaged.
    """
    path = Path(out)
    check_file(path, overwrite=overwrite)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with writing(path):
            temporary.parent.mkdir(parents=True, exist_ok=True)
            file = temporary.open("wb")
        with file:
            columns = export_schema(store.manifest)
            with pq.ParquetWriter(file, columns, compression="zstd") as writer:
                for first, stop in _runs(store):
                    report(f"exported {first:,} of {len(store):,} documents")
                    rows = _rows(store, first, stop)
                    with writing(path):
                        writer.write_table(pa.table(rows, schema=columns))
            with writing(path):
                file.flush()
                os.fsync(file.fileno())
        with writing(path):
            temporary.replace(path)
        return path.stat().st_size
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def left_out(store: Store) -> str | None:
    """What the store holds and an export does not, in words; None where that is nothing."""
    if not store.layers:
        return None
    return f"the hidden states of layers {', '.join(map(str, store.layers))}: plain columns have no place for them"


def check_file(out: str | Path, *, overwrite: bool) -> None:
    """Raises StorageError where a file must not be written there."""
    path = Path(out)
    if path.is_dir() or (path.exists() and not overwrite):
        raise StorageError(
            f"{path} exists",
            {"out": path, "it is": "a folder" if path.is_dir() else f"a file of {path.stat().st_size:,} bytes"},
            why="Nothing that is there is lost unless you say so.",
            fix="Choose another name." if path.is_dir() else "Use --overwrite, or choose another name.",
        )


def export_schema(manifest: Manifest) -> pa.Schema:
    """The columns of an exported file, with the manifest in its metadata."""
    lists = {"ids": pa.list_(pa.list_(pa.int32())), "log_probs": pa.list_(pa.list_(pa.float32()))}
    fields = [("document", pa.int64()), ("tokens", pa.list_(pa.int32())), ("keep", pa.list_(pa.bool_()))]
    fields += [*lists.items(), *((name, pa.list_(pa.float32())) for name in _further(manifest.signal))]
    return pa.schema(fields, metadata={METADATA: manifest.model_copy(update={"shards": ()}).model_dump_json().encode()})


def rest_name(temperature: float) -> str:
    """The column of the log of the mass that is left out at a temperature."""
    return "log_rest" if temperature == 1.0 else f"log_rest@{temperature!r}"


def _further(signal: AnySignal) -> list[str]:
    """The columns of one number a position."""
    rests = [rest_name(temperature) for temperature in known_temperatures(signal)]
    entropy = ["entropy"] if signal.kind in SAMPLED or "entropy" in side_columns(signal) else []
    return [*rests, *entropy, *(["label_log_prob"] if "label" in side_columns(signal) else [])]


def _runs(store: Store) -> Iterator[tuple[int, int]]:
    """Documents that are taken together: as many as have so many entries, about."""
    m = store.manifest
    each = (m.entries + m.draws) / max(1, m.tokens)
    sizes = np.cumsum(store.lengths * each)
    first = 0
    while first < len(store):
        before = sizes[first - 1] if first else 0
        stop = max(first + 1, int(np.searchsorted(sizes, before + ENTRIES_AT_ONCE, side="right")))
        yield first, stop
        first = stop


def _rows(store: Store, first: int, stop: int) -> dict[str, Any]:
    """The columns of some documents."""
    rows = range(first, stop)
    tokens, loss_mask = [store.tokens(row) for row in rows], [store.loss_mask(row) for row in rows]
    kept = np.array([int(mask.sum()) for mask in loss_mask], np.int64)
    counts, ids, log_probs, further = _positions(store, rows)
    found: dict[str, Any] = {
        "document": pa.array([store.document(row) for row in rows], pa.int64()),
        "tokens": _lists(np.array([len(t) for t in tokens]), pa.array(np.concatenate(tokens), pa.int32())),
        "keep": _lists(np.array([len(t) for t in tokens]), pa.array(np.concatenate(loss_mask), pa.bool_())),
        "ids": _lists(kept, _lists(counts, pa.array(ids, pa.int32()))),
        "log_probs": _lists(kept, _lists(counts, pa.array(log_probs, pa.float32()))),
    }
    return found | {name: _lists(kept, pa.array(values, pa.float32())) for name, values in further.items()}


def _positions(store: Store, rows: range) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Of the kept positions of some documents: the number of entries of each, all ids and log-probs, and the rest."""
    config = store.signal_config
    if isinstance(config, Full):
        logits = store.logits(rows).astype(np.float64)
        top = logits.max(-1, keepdims=True)
        log_probs = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
        order = np.argsort(-log_probs, axis=-1, kind="stable")
        counts = np.full(len(logits), logits.shape[1], np.int64)
        return counts, order.ravel(), np.take_along_axis(log_probs, order, -1).ravel(), {}
    levels = store.levels(rows)
    sparse = to_sparse(levels, config)
    counts = (levels.counts + levels.draw_counts).astype(np.int64)
    there = np.arange(sparse.ids.shape[1]) < counts[:, None]
    further = {rest_name(temperature): rest.numpy() for temperature, rest in sparse.log_rests.items()}
    if sparse.entropy is not None:
        further["entropy"] = sparse.entropy.numpy()
    if sparse.label_log_probs is not None:
        further["label_log_prob"] = sparse.label_log_probs.numpy()
    return counts, sparse.ids.numpy()[there], sparse.log_targets()[0].numpy()[there], further


def _lists(lengths: np.ndarray, values: pa.Array) -> pa.Array:
    """Values cut into lists."""
    return pa.ListArray.from_arrays(pa.array(np.cumsum([0, *lengths], dtype=np.int32)), values)

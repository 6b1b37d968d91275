"""Export: a store as plain columns of one Parquet file, which any program reads."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from stillroom.errors import StorageError
from stillroom.runs import writing
from stillroom.store.config import SAMPLED, Full, known_temperatures, side_columns
from stillroom.store.format import METADATA, Manifest, list_array
from stillroom.store.quantize import to_sparse
from stillroom.store.reader import Store

ENTRIES_AT_ONCE = 1 << 20
"""Entries that are in memory at a time."""


def export(
    store: Store, out: str | Path, *, overwrite: bool = False, report: Callable[[str], object] = lambda _: None
) -> int:
    """Writes one row a document, under a temporary name, synced and renamed; returns the file's size in bytes.

    ``ids`` and ``log_probs`` hold one list for each kept position, the most likely exact entries first; those of a
    truncated signal and its ``log_rest`` sum to 1. Those of a sampled one are weights, which sum to 1 on average.
    Hidden states are left out (``left_out``).

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
                for rows in _row_groups(store):
                    report(f"exported {rows.start:,} of {len(store):,} documents")
                    table = pa.table(_columns(store, rows), schema=columns)
                    with writing(path):
                        writer.write_table(table)
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
    """The contents of the store that an export does not hold, in words; None where there are none."""
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
    signal = manifest.signal
    further = [rest_name(temperature) for temperature in known_temperatures(signal)]
    further += ["entropy"] * (signal.kind in SAMPLED or "entropy" in side_columns(signal))
    further += ["label_log_prob"] * ("label" in side_columns(signal))
    fields = [
        ("document", pa.int64()),
        ("tokens", pa.list_(pa.int32())),
        ("keep", pa.list_(pa.bool_())),
        ("ids", pa.list_(pa.list_(pa.int32()))),
        ("log_probs", pa.list_(pa.list_(pa.float32()))),
        *((name, pa.list_(pa.float32())) for name in further),
    ]
    return pa.schema(fields, metadata={METADATA: manifest.model_copy(update={"shards": ()}).model_dump_json().encode()})


def rest_name(temperature: float) -> str:
    """The column of the log of the residual mass at a temperature."""
    return "log_rest" if temperature == 1.0 else f"log_rest@{temperature!r}"


def _row_groups(store: Store) -> Iterator[range]:
    """Documents that are taken together: as many as have ``ENTRIES_AT_ONCE`` entries, about."""
    m = store.manifest
    sizes = np.cumsum(store.lengths * ((m.entries + m.draws) / max(1, m.tokens)))
    first = 0
    while first < len(store):
        before = sizes[first - 1] if first else 0
        stop = max(first + 1, int(np.searchsorted(sizes, before + ENTRIES_AT_ONCE, side="right")))
        yield range(first, stop)
        first = stop


def _columns(store: Store, rows: range) -> dict[str, Any]:
    """The columns of some documents."""
    tokens, loss_mask = [store.tokens(row) for row in rows], [store.loss_mask(row) for row in rows]
    lengths, kept = [len(t) for t in tokens], [int(mask.sum()) for mask in loss_mask]
    counts, ids, log_probs, further = _positions(store, rows)
    return {
        "document": pa.array([store.document(row) for row in rows], pa.int64()),
        "tokens": list_array(pa.array(np.concatenate(tokens), pa.int32()), lengths),
        "keep": list_array(pa.array(np.concatenate(loss_mask), pa.bool_()), lengths),
        "ids": list_array(list_array(pa.array(ids, pa.int32()), counts), kept),
        "log_probs": list_array(list_array(pa.array(log_probs, pa.float32()), counts), kept),
        **{name: list_array(pa.array(values, pa.float32()), kept) for name, values in further.items()},
    }


def _positions(store: Store, rows: range) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """The number of entries of each kept position of some documents, all ids and log-probs, and further columns."""
    config = store.signal_config
    if isinstance(config, Full):
        logits = store.logits(rows).astype(np.float64)
        top = logits.max(-1, keepdims=True)
        log_probs = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
        order = np.argsort(-log_probs, axis=-1, kind="stable")
        counts = np.full(len(logits), logits.shape[1], np.int64)
        return counts, order.ravel(), np.take_along_axis(log_probs, order, -1).ravel(), {}
    codes = store.levels(rows)
    sparse = to_sparse(codes, config)
    counts = (codes.counts + codes.sample_counts).astype(np.int64)
    present = np.arange(sparse.ids.shape[1]) < counts[:, None]
    further = {rest_name(temperature): values.numpy() for temperature, values in sparse.log_rests.items()}
    for name, values in (("entropy", sparse.entropy), ("label_log_prob", sparse.label_log_probs)):
        if values is not None:
            further[name] = values.numpy()
    return counts, sparse.ids.numpy()[present], sparse.log_targets()[0].numpy()[present], further

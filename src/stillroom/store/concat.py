"""Merge: several stores of one teacher into one: the parts of a capture, or captures of different data."""

import hashlib
import heapq
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from stillroom.errors import ConfigError, MismatchError, MissingError
from stillroom.runs import write_json, writing
from stillroom.store.format import (
    MANIFEST,
    TOKENIZER,
    Manifest,
    Shard,
    SourceInfo,
    damaged,
    hidden_crc32,
    row_crc32,
    schema,
    values_of,
)
from stillroom.store.reader import Store, StoredShard
from stillroom.store.writer import StoreWriter, check_out, new_store

SAME = ("teacher", "engine", "tokenizer", "template", "num_columns", "signal", "side", "hidden", "hidden_width",
        "num_layers")  # fmt: skip
"""What all stores must share."""

SAME_OF_PARTS = ("data", "length", "seed")
"""What the parts of one capture must share besides."""

ROWS_AT_ONCE = 64

BLOCK_BYTES = 1 << 22

Report = Callable[[str], object]


def concat(
    paths: Sequence[str | Path],
    out: str | Path,
    *,
    overwrite: bool = False,
    num_documents: int | None = None,
    versions: Mapping[str, str] | None = None,
    report: Report = lambda _: None,
) -> Manifest:
    """Writes the merged store, and returns what it is. Everything is checked before anything is written.

    Parts of one capture become part 0 of 1, their documents in the order of the data. Other stores are put one after
    the other: documents are numbered anew, and the data's name and fingerprint are made of those of all.

    Args:
        num_documents: documents that the parts of a capture must hold, numbered from 0; None where nobody knows.

    Raises:
        ConfigError: there are not two stores, or ``out`` is one of them.
        MismatchError: the stores do not fit together.
        MissingError, DataError: one is not there, not complete, or damaged.
        StorageError: ``out`` exists, or cannot be written.
    """
    _check_paths(paths, out)
    stores = [Store(path) for path in paths]
    stores, parts = _fitting(stores)
    check_out(out, overwrite=overwrite)
    numbers = [_document_numbers(store) for store in stores]
    if parts:
        _check_once(stores, numbers, num_documents)
    ranges = [None if not len(of_store) else (int(of_store.min()), int(of_store.max())) for of_store in numbers]
    manifest = _manifest(stores, parts, versions)
    with tempfile.TemporaryDirectory() as fetched:
        tokenizer = _tokenizer(stores, Path(fetched))
        with new_store(out, overwrite=overwrite) as folder:
            shutil.copytree(tokenizer, folder / TOKENIZER)
            if parts and any(a[1] > b[0] for a, b in pairwise(r for r in ranges if r is not None)):
                return _interleave(stores, folder, manifest, report)
            return _append(stores, [0] * len(stores) if parts else _offsets(ranges), folder, manifest, report)


def _check_paths(paths: Sequence[str | Path], out: str | Path) -> None:
    places = [str(path) if "://" in str(path) else str(Path(path).resolve()) for path in paths]
    if len(set(places)) < 2 or len(set(places)) < len(places):
        raise ConfigError(
            "there are no two different stores to merge" if len(set(places)) < 2 else "a store is named twice",
            {"stores": ", ".join(map(str, paths)) or "none"},
            why="What it says would be there twice." if len(places) > 1 else "A merge joins several into one.",
            fix="Name each store once: `stillroom store merge A B out=DIR`.",
        )
    target = Path(out).resolve()
    for path, place in zip(paths, places, strict=True):
        if "://" not in place and (Path(place).is_relative_to(target) or target.is_relative_to(place)):
            raise ConfigError(
                "`out` lies in one of the stores, or one of them in it",
                {"out": out, "store": path},
                why="The merged store would be mixed with what it is made of.",
                fix="Choose another `out`.",
            )


def _fitting(stores: list[Store]) -> tuple[list[Store], bool]:
    """The stores in the order in which they are merged, and whether they are the parts of one capture."""
    for store in stores[1:]:
        _same(stores[0], store, SAME)
    of = {store.manifest.part[1] for store in stores}
    if of == {1}:
        _check_different(stores)
        return stores, False
    first = stores[0]
    for store in stores[1:]:
        _same(first, store, SAME_OF_PARTS)
    stores = sorted(stores, key=lambda store: store.manifest.part[0])
    there = [f"{store.manifest.part[0]} of {store.manifest.part[1]}" for store in stores]
    needed = [f"{i} of {max(of)}" for i in range(max(of))] if max(of) <= 2**20 else [f"{max(of)} parts"]
    if there != needed:
        missing = [part for part in needed if part not in there]
        raise MismatchError(
            "the stores are not all parts of one capture, each once",
            {"there": ", ".join(there), "missing": ", ".join(missing[:8]) or "none"},
            why="The merged store would lack documents of its data, or hold some twice.",
            fix="Name the store of each part once; finish those that are missing.",
        )
    return stores, True


def _same(a: Store, b: Store, names: Sequence[str]) -> None:
    for name in names:
        of_a, of_b = (getattr(store.manifest, name) for store in (a, b))
        if _compared(of_a) != _compared(of_b):
            where, in_a, in_b = _first_difference(name, _shown(of_a), _shown(of_b))
            raise MismatchError(
                f"the stores differ in their {where}",
                {a.path: in_a, b.path: in_b},
                why="A store says one kind of thing of one teacher in the tokens of one tokenizer."
                if name in SAME
                else "They are parts of different captures, and only those of one make up its data.",
                fix="Merge stores of equal settings; several stores can also be used one after the other.",
            )


def _compared(value: Any) -> Any:
    """A model or a tokenizer is the same under another name, or in another folder, if its fingerprint is."""
    return value.fingerprint if isinstance(value, SourceInfo) else value


def _shown(value: Any) -> Any:
    """A value as an error quotes it, the settings of a signal by name."""
    if isinstance(value, SourceInfo):
        return f"{value.name} ({value.fingerprint[:32]})"
    return value.model_dump(mode="json") if hasattr(value, "model_dump") else value


def _first_difference(name: str, a: Any, b: Any) -> tuple[str, Any, Any]:
    """The first setting in which two values differ, by its dotted name, with both of its values."""
    if isinstance(a, dict) and isinstance(b, dict):
        key = next(key for key in ("kind", *a, *b) if a.get(key) != b.get(key))
        return _first_difference(f"{name}.{key}", a.get(key), b.get(key))
    return name, a, b


def _check_different(stores: Sequence[Store]) -> None:
    seen: dict[tuple[str, int], str] = {}
    for store in stores:
        said = store.manifest.data.fingerprint, store.manifest.seed
        if said in seen:
            raise MismatchError(
                "two stores are of the same data and seed",
                {seen[said]: f"{said[0][:32]}, seed {said[1]}", store.path: f"{said[0][:32]}, seed {said[1]}"},
                why="They say the same, so each of their documents would be there twice.",
                fix="Leave one of them out.",
            )
        seen[said] = store.path


def _manifest(stores: Sequence[Store], parts: bool, versions: Mapping[str, str] | None) -> Manifest:
    """Of the merged store, with no shards yet."""
    all_of_them = [store.manifest for store in stores]
    first = all_of_them[0]
    data = first.data
    if not parts:
        prints = " ".join(f"{m.data.fingerprint} {m.seed}" for m in all_of_them)
        name = " + ".join(m.data.name for m in all_of_them)
        data = SourceInfo(name=name, fingerprint=hashlib.sha256(prints.encode()).hexdigest()[:32])
    return first.model_copy(
        update={
            "complete": False,
            "data": data,
            "part": (0, 1),
            "merged": () if parts else tuple(data for m in all_of_them for data, _ in m.origins),
            "length": max(m.length for m in all_of_them),
            "versions": dict(first.versions if versions is None else versions),
            "shards": (),
            **dict.fromkeys(("documents", "positions", "tokens", "entries", "draws"), 0),
            "codec_error_nats": 0.0,
        }
    )


def _document_numbers(store: Store) -> np.ndarray:
    """The numbers of a store's documents, int64 [documents], in its order."""
    columns = [batch["document"].to_numpy() for shard in store.shards for batch in shard.batches]
    return np.concatenate([np.zeros(0, np.int64), *columns])


def _check_once(stores: Sequence[Store], numbers: Sequence[np.ndarray], num_documents: int | None) -> None:
    """Returns where no document is in the parts twice and, where their number is known, none is missing."""
    there = np.sort(np.concatenate(numbers))
    twice = there[1:][there[1:] == there[:-1]]
    if len(twice):
        holding = [s for s, of_store in zip(stores, numbers, strict=True) for _ in range((of_store == twice[0]).sum())]
        raise MismatchError(
            f"document {twice[0]} is in the parts twice",
            {f"part {store.manifest.part[0]} of {store.manifest.part[1]}": store.path for store in holding[:2]},
            why="A student would learn it twice. They were not made by one way of dividing the data.",
            fix="Capture one of these parts anew, with --overwrite.",
        )
    missing = np.flatnonzero(there != np.arange(len(there)))
    if num_documents is not None and (len(there) != num_documents or len(missing)):
        first = int(missing[0]) if len(missing) else len(there)
        raise MismatchError(
            "the parts do not hold the documents of the capture's data",
            {"in the data": f"{num_documents:,}, from 0", "in the parts": f"{len(there):,}, and not document {first}"},
            why="They were not made by one way of dividing the data.",
            fix="Capture the part that should hold that document anew, with --overwrite.",
        )


def _offsets(ranges: Sequence[tuple[int, int] | None]) -> list[int]:
    """What is added to the document numbers of each store."""
    ends = [0, *(1 + max(0, r[1]) if r is not None else 0 for r in ranges)]
    return np.cumsum(ends)[:-1].tolist()


def _append(
    stores: Sequence[Store], firsts: Sequence[int], folder: Path, manifest: Manifest, report: Report
) -> Manifest:
    """Shard after shard: copied byte for byte, or, where documents get other numbers, with the same signals."""
    shards: list[Shard] = []
    total = sum(store.num_shards for store in stores)
    for store, first in zip(stores, firsts, strict=True):
        for shard in store.shards:
            report(f"merged {len(shards)} of {total} shards")
            name = f"{len(shards):05d}"
            tables = _copy(shard, "tables", folder / f"{name}.tables", shard.shard.tables_crc32)
            if first:
                checksum, size = _renumber(shard, first, folder / f"{name}.arrow")
            else:
                checksum, size = _copy(shard, "arrow", folder / f"{name}.arrow", shard.shard.crc32)
            shards.append(
                shard.shard.model_copy(
                    update={
                        "name": name,
                        "crc32": checksum,
                        "size_bytes": size,
                        "tables_crc32": tables[0],
                        "tables_bytes": tables[1],
                    }
                )
            )
    totals: dict[str, Any] = {
        name: sum(getattr(store.manifest, name) for store in stores)
        for name in ("documents", "positions", "tokens", "entries", "draws")
    }
    error = sum(store.manifest.codec_error_nats * store.manifest.positions for store in stores)
    totals["codec_error_nats"] = error / max(1, totals["positions"])
    manifest = manifest.model_copy(update={**totals, "shards": tuple(shards), "complete": True})
    write_json(folder / MANIFEST, values_of(manifest))
    return manifest


def _copy(shard: StoredShard, kind: str, to: Path, expected: int) -> tuple[int, int]:
    """Copies a file, and returns its checksum and size."""
    name, checksum, size = f"{shard.shard.name}.{kind}", 0, 0
    with shard.place.open(name) as source, writing(to), to.open("wb") as file:
        while block := source.read(BLOCK_BYTES):
            checksum = zlib.crc32(block, checksum)
            size += len(block)
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    if checksum != expected:
        raise damaged(shard.place.path, f"checksum of {name}", checksum, expected)
    return checksum, size


def _renumber(shard: StoredShard, first: int, to: Path) -> tuple[int, int]:
    """Writes a shard whose documents have other numbers; all else stays as it is, since nothing depends on them."""
    columns = schema(shard.manifest.num_columns, hidden=shard.manifest.hidden is not None)
    with writing(to):
        file = to.open("wb")
    row = 0
    with file:
        with pa.ipc.new_file(file, columns) as writer:
            for batch in shard.batches:
                renumbered = _renumbered(shard, batch, row, first)
                row += len(batch)
                with writing(to):
                    writer.write_batch(pa.record_batch(renumbered, schema=columns))
        with writing(to):
            file.flush()
            os.fsync(file.fileno())
    checksum = 0
    with to.open("rb") as written:
        while block := written.read(BLOCK_BYTES):
            checksum = zlib.crc32(block, checksum)
    return checksum, to.stat().st_size


def _renumbered(shard: StoredShard, batch: pa.RecordBatch, start: int, first: int) -> list[pa.Array]:
    """The columns of a record batch, which begins at row ``start``, with other numbers and so other checksums."""
    numbers, checksums, of_hidden, hidden = [], [], [], []
    for row in range(start, start + len(batch)):
        number = shard.column(row, "document").as_py() + first
        document = number, shard.tokens(row), shard.loss_mask(row)
        states = None
        if shard.manifest.hidden is not None:
            hidden.append(shard.hidden_bytes(row))
            of_hidden.append(states := hidden_crc32(*document, hidden[-1]))
        numbers.append(number)
        checksums.append(row_crc32(*document, shard.signal(row), states))
    arrays = [pa.array(numbers, pa.int64()), *(batch[name] for name in ("tokens", "keep", "signal"))]
    arrays.append(pa.array(checksums, pa.uint32()))
    if shard.manifest.hidden is not None:
        arrays += [pa.array(of_hidden, pa.uint32()), pa.array(hidden, pa.large_binary())]
    return arrays


def _interleave(stores: Sequence[Store], folder: Path, manifest: Manifest, report: Report) -> Manifest:
    """Document by document in the order of the data, for parts that are not stretches of it."""

    def documents(store: Store, number: int) -> Iterator[tuple[int, int, int, Any]]:
        for start in range(0, len(store), ROWS_AT_ONCE):
            rows = range(start, min(start + ROWS_AT_ONCE, len(store)))
            full = store.signal_config.kind == "full"
            said = store.logits(rows) if full else store.levels(rows)
            at = 0
            for row in rows:
                end = at + int(store.loss_mask(row).sum())
                yield store.document(row), number, row, said[at:end] if full else said.slice(at, end)  # pyright: ignore
                at = end

    shard_positions = max(shard.positions for store in stores for shard in store.manifest.shards)
    streams = [documents(store, number) for number, store in enumerate(stores)]
    with StoreWriter(folder, manifest, shard_positions=max(1, shard_positions)) as writer:
        for document, number, row, said in heapq.merge(*streams, key=lambda item: item[:2]):
            store = stores[number]
            error = store.manifest.codec_error_nats * len(said)
            hidden = bytes(store.hidden_bytes(row)) if store.layers else None
            writer.add(document, np.asarray(store.tokens(row), np.int32), store.loss_mask(row), said, error, hidden)
            report(f"merged {writer.num_documents:,} of {sum(map(len, stores)):,} documents")
        return writer.finish()


def _tokenizer(stores: Sequence[Store], fetched: Path) -> Path:
    """The folder of the tokenizer of the first store that has it; they all have the same one."""
    for store in stores:
        try:
            folder = Path(store.fetch_tokenizer(fetched))
        except FileNotFoundError:
            continue
        if folder.is_dir() and any(folder.iterdir()):
            return folder
    raise MissingError(
        "none of the stores has its tokenizer",
        {"missing": f"{stores[0].path}/{TOKENIZER}", "made with": stores[0].manifest.tokenizer.name},
        why="Without it nobody can tell what the token ids of the merged store mean.",
        fix=f"Save the tokenizer of {stores[0].manifest.tokenizer.name} into that folder by `save_pretrained`.",
    )

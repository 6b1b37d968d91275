"""Concat: several stores of one teacher as one: the parts of a capture, or captures of different data."""

import hashlib
import heapq
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from stillroom.errors import ConfigError, MismatchError
from stillroom.recipe import differences
from stillroom.runs import crc32, same_model, versions, writing
from stillroom.store.config import Full
from stillroom.store.format import (
    COUNTS,
    TOKENIZER,
    Manifest,
    Shard,
    SourceInfo,
    check_equal,
    no_tokenizer,
    schema,
    synced_file,
    write_manifest,
)
from stillroom.store.reader import Store, StoredShard
from stillroom.store.writer import StoreWriter, check_out, new_store, record_batch

SAME = ("teacher", "engine", "tokenizer", "template", "num_columns", "signal", "side", "hidden", "hidden_width",
        "num_layers")  # fmt: skip
"""The keys of the manifest that all stores must share."""

SAME_OF_PARTS = ("data", "length", "seed")
"""The keys that the parts of one capture must share besides."""

ROWS_AT_ONCE = 64

Report = Callable[[str], object]


def concat(
    paths: Sequence[str | Path],
    out: str | Path,
    *,
    overwrite: bool = False,
    num_documents: int | None = None,
    report: Report = lambda _: None,
) -> Manifest:
    """Writes the concatenated store, and returns its manifest. Everything is checked before anything is written.

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
    stores, parts = _fitting([Store(path) for path in paths])
    check_out(out, overwrite=overwrite)
    numbers = [store.document_numbers for store in stores]
    if parts:
        _check_once(stores, numbers, num_documents)
    alternate = parts and any(a.max() > b.min() for a, b in pairwise(each for each in numbers if len(each)))
    ends = [0, *(1 + max(0, int(each.max(initial=-1))) if len(each) else 0 for each in numbers)]
    firsts = [0] * len(stores) if parts else np.cumsum(ends).tolist()
    manifest = _manifest(stores, parts)
    with tempfile.TemporaryDirectory() as fetched:
        tokenizer = _tokenizer(stores, Path(fetched))
        with new_store(out, overwrite=overwrite) as folder:
            shutil.copytree(tokenizer, folder / TOKENIZER)
            if alternate:
                return _interleave(stores, folder, manifest, report)
            return _append(stores, firsts, folder, manifest, report)


def _check_paths(paths: Sequence[str | Path], out: str | Path) -> None:
    places = [str(path) if "://" in str(path) else str(Path(path).resolve()) for path in paths]
    if len(set(places)) < 2 or len(set(places)) < len(places):
        raise ConfigError(
            "there are no two different stores to concatenate" if len(set(places)) < 2 else "a store is named twice",
            {"stores": ", ".join(map(str, paths)) or "none"},
            why="What it says would be there twice." if len(places) > 1 else "It makes one store of several.",
            fix="Name each store once: `stillroom store concat A B out=DIR`.",
        )
    target = Path(out).resolve()
    for path, place in zip(paths, places, strict=True):
        if "://" not in place and (Path(place).is_relative_to(target) or target.is_relative_to(place)):
            raise ConfigError(
                "`out` lies in one of the stores, or one of them in it",
                {"out": out, "store": path},
                why="The new store would be mixed with what it is made of.",
                fix="Choose another `out`.",
            )


def _fitting(stores: list[Store]) -> tuple[list[Store], bool]:
    """The stores in the order in which they are written, and whether they are the parts of one capture."""
    for store in stores[1:]:
        _same(stores[0], store, SAME)
    of = max(store.manifest.part[1] for store in stores)
    if of == 1:
        seen: dict[str, str] = {}
        for store in stores:
            shown = f"{store.manifest.data.fingerprint[:32]}, seed {store.manifest.seed}"
            if (other := seen.setdefault(shown, store.path)) != store.path:
                raise MismatchError(
                    "two stores are of the same data and seed",
                    {other: shown, store.path: shown},
                    why="They say the same, so each of their documents would be there twice.",
                    fix="Leave one of them out.",
                )
        return stores, False
    for store in stores[1:]:
        _same(stores[0], store, SAME_OF_PARTS)
    stores = sorted(stores, key=lambda store: store.manifest.part[0])
    there = ["{} of {}".format(*store.manifest.part) for store in stores]
    needed = [f"{i} of {of}" for i in range(of)] if of <= 2**20 else [f"{of} parts"]
    if there != needed:
        missing = [part for part in needed if part not in there]
        raise MismatchError(
            "the stores are not all parts of one capture, each once",
            {"there": ", ".join(there), "missing": ", ".join(missing[:8]) or "none"},
            why="The new store would lack documents of its data, or hold some twice.",
            fix="Name the store of each part once; finish those that are missing.",
        )
    return stores, True


def _same(a: Store, b: Store, names: Sequence[str]) -> None:
    """Raises MismatchError where two stores differ in a key; a model, tokenizer or data by its fingerprint alone."""
    one, other = (store.manifest.model_dump(mode="json", include=set(names)) for store in (a, b))
    changed = differences(one, other)
    if "teacher.fingerprint" in changed and same_model(*changed["teacher.fingerprint"]):
        del changed["teacher.fingerprint"]  # one of them was written by a version that knew samples alone
    keys = [key for key in changed if not key.endswith(".name")]
    if not keys:
        return
    key = next((key for key in keys if key.endswith(".kind")), keys[0])  # a kind decides what else there is
    where, values = key.removesuffix(".fingerprint"), changed[key]
    if where != key:
        sources = [getattr(store.manifest, where) for store in (a, b)]
        values = [f"{source.name} ({source.fingerprint[:32]})" for source in sources]
    raise MismatchError(
        f"the stores differ in their {where}",
        dict(zip((a.path, b.path), values, strict=True)),
        why="A store says one kind of thing of one teacher in the tokens of one tokenizer."
        if names is SAME
        else "They are parts of different captures, and only those of one make up its data.",
        fix="Concatenate stores of equal settings; several stores can also be used one after the other.",
    )


def _manifest(stores: Sequence[Store], parts: bool) -> Manifest:
    """The manifest of the new store, with no shards yet."""
    manifests = [store.manifest for store in stores]
    first, data, merged = manifests[0], manifests[0].data, ()
    if not parts:
        prints = " ".join(f"{m.data.fingerprint} {m.seed}" for m in manifests)
        name = " + ".join(m.data.name for m in manifests)
        data = SourceInfo(name=name, fingerprint=hashlib.sha256(prints.encode()).hexdigest()[:32])
        merged = tuple(source for m in manifests for source in m.merged or (m.data,))
    return first.model_copy(
        update={
            "complete": False,
            "data": data,
            "part": (0, 1),
            "merged": merged,
            "length": max(m.length for m in manifests),
            "versions": versions(),
            "shards": (),
            **dict.fromkeys(COUNTS, 0),
            "codec_error_nats": 0.0,
        }
    )


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


def _append(
    stores: Sequence[Store], firsts: Sequence[int], folder: Path, manifest: Manifest, report: Report
) -> Manifest:
    """Writes shard after shard: copied byte for byte, or, where documents get other numbers, with the same signals."""
    shards: list[Shard] = []
    columns = schema(manifest.num_columns, hidden=manifest.hidden is not None)
    total = sum(len(store.shards) for store in stores)
    for store, first in zip(stores, firsts, strict=False):
        for shard in store.shards:
            report(f"concatenated {len(shards)} of {total} shards")
            name = f"{len(shards):05d}"
            arrow, tables = folder / f"{name}.arrow", folder / f"{name}.tables"
            _copy(shard, shard.tables, tables, shard.shard.tables_crc32)
            if not first:
                _copy(shard, shard.arrow, arrow, shard.shard.crc32)
            else:
                with writing(arrow), synced_file(arrow) as file, pa.ipc.new_file(file, columns) as writer:
                    edges = np.cumsum([0, *map(len, shard.batches)]).tolist()
                    for rows in (range(*each) for each in pairwise(edges)):
                        signals = [shard.signal(row) for row in rows]
                        hidden = [shard.hidden_bytes(row) for row in rows] if store.layers else []
                        numbered = [(first + shard.document(i), shard.tokens(i), shard.loss_mask(i)) for i in rows]
                        writer.write_batch(record_batch(columns, numbered, signals, hidden))
            changes = {"name": name, "crc32": crc32(arrow), "size_bytes": arrow.stat().st_size}
            shards.append(shard.shard.model_copy(update=changes))
    totals: dict[str, Any] = {name: sum(getattr(store.manifest, name) for store in stores) for name in COUNTS}
    error = sum(store.manifest.codec_error_nats * store.manifest.positions for store in stores)
    totals["codec_error_nats"] = error / max(1, totals["positions"])
    manifest = manifest.model_copy(update={**totals, "shards": tuple(shards), "complete": True})
    write_manifest(folder, manifest)
    return manifest


def _copy(shard: StoredShard, name: str, to: Path, expected: int) -> None:
    """Copies a file of a checksum."""
    with writing(to), synced_file(to) as file:
        check_equal(shard.files.path, f"checksum of {name}", shard.files.crc32(name, file), expected)


def _interleave(stores: Sequence[Store], folder: Path, manifest: Manifest, report: Report) -> Manifest:
    """Writes document by document in the order of the data, for parts whose documents alternate."""

    def documents(store: Store, number: int) -> Iterator[tuple[int, int, int, Any]]:
        for start in range(0, len(store), ROWS_AT_ONCE):
            rows = range(start, min(start + ROWS_AT_ONCE, len(store)))
            ends = np.cumsum([0, *(int(store.loss_mask(row).sum()) for row in rows)]).tolist()
            signal = store.logits(rows) if isinstance(store.signal_config, Full) else store.levels(rows)
            for row, edges in zip(rows, pairwise(ends), strict=True):
                part = signal[slice(*edges)] if isinstance(signal, np.ndarray) else signal.slice(*edges)
                yield store.document(row), number, row, part

    shard_positions = max(shard.positions for store in stores for shard in store.manifest.shards)
    streams = [documents(store, number) for number, store in enumerate(stores)]
    with StoreWriter(folder, manifest, shard_positions=max(1, shard_positions)) as writer:
        for document, number, row, signal in heapq.merge(*streams, key=lambda item: item[:2]):
            store = stores[number]
            error = store.manifest.codec_error_nats * len(signal)
            hidden = bytes(store.hidden_bytes(row)) if store.layers else None
            writer.add(document, np.asarray(store.tokens(row), np.int32), store.loss_mask(row), signal, error, hidden)
            report(f"concatenated {writer.num_documents:,} of {sum(map(len, stores)):,} documents")
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
    raise no_tokenizer(
        "none of the stores has its tokenizer",
        f"{stores[0].path}/{TOKENIZER}",
        stores[0].manifest.tokenizer,
        why="Without it nobody can tell what the token ids of the new store mean.",
    )

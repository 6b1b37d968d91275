"""Writes a store shard by shard; a shard is there whole or not at all."""

import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from stillroom.errors import MismatchError, StorageError
from stillroom.runs import crc32, lock, replace_folder, same_model, sync_folder, sync_tree, writing
from stillroom.store.codec import Codec
from stillroom.store.config import SHARD_POSITIONS, Full
from stillroom.store.format import (
    MANIFEST,
    TOKENIZER,
    Manifest,
    Shard,
    hidden_crc32,
    list_array,
    read_manifest,
    row_crc32,
    schema,
    synced_file,
    write_manifest,
)
from stillroom.store.quantize import LogProbCodes, hidden_bytes_per_position


def check_out(out: str | Path, *, overwrite: bool) -> None:
    """Returns where a new store may have this name.

    Raises:
        StorageError: something is there, and it is not a store or ``overwrite`` is off.
    """
    path = Path(out)
    if "://" in str(out):
        raise StorageError(
            f"a store cannot be written to {out}",
            {"out": out, "needed": "a folder of this machine"},
            why="A folder appears there at once and as a whole, by a new name; an address cannot do that.",
            fix="Write it here, and copy it.",
        )
    if not (path.exists() or path.is_symlink()):
        return
    store = path.is_dir() and not path.is_symlink() and (path / MANIFEST).is_file()
    if store and overwrite:
        return
    holds = ", ".join(sorted(p.name for p in path.iterdir())[:4]) or "nothing" if path.is_dir() else "a file"
    raise StorageError(
        f"{path} exists" if store or not overwrite else f"{path} is not a store",
        {"out": path, "holds": holds},
        why="Nothing that is there is lost unless you say so, and only a store is deleted at all.",
        fix="Choose another `out`." if not store else "Use --overwrite to delete that store, or choose another `out`.",
    )


@contextmanager
def new_store(out: str | Path, *, overwrite: bool) -> Iterator[Path]:
    """A folder to write a store into, which becomes ``out`` at the end, and is deleted where the block fails.

    With ``overwrite`` a store that is there is deleted, but only once the new one is whole. One process at a time makes
    a store of a name: others are refused.
    """
    check_out(out, overwrite=overwrite)
    path = Path(out)
    made, mark = (path.with_name(f".{path.name}.{kind}") for kind in ("new", "lock"))
    busy = StorageError(
        f"another process makes the store {path}",
        {"out": path, "its lock": mark},
        why="Two that write one store would mix what they write.",
        fix="Wait for it or stop it; or choose another `out`.",
    )
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        held = lock(mark, busy)
    with held:
        try:
            check_out(out, overwrite=overwrite)  # again, since another one may have just been made
            shutil.rmtree(made, ignore_errors=True)
            with writing(path):
                made.mkdir()
            yield made
            with writing(path):
                replace_folder(made, path)
        finally:
            shutil.rmtree(made, ignore_errors=True)
            mark.unlink()


ROWS_AT_ONCE = 256
"""Rows of a record batch at the most."""
BATCH_HIDDEN_BYTES = 2**25
"""A record batch is closed when it has so many bytes of hidden states; one of a remote file is read whole."""
SHARD_HIDDEN_BYTES = 2**29
"""A shard is closed when it has so many; it is held in memory until it is written."""
WRITTEN_NAMES = re.compile(r"[0-9]{5,9}\.(arrow|tables)(\.tmp)?|\.manifest\.json\.tmp")
"""The names of files that a writer makes."""
Row = tuple[int, np.ndarray, np.ndarray]
"""A document's number, tokens and loss mask."""
IDENTITY = ("teacher", "engine", "tokenizer", "template", "data", "part", "num_columns", "length", "signal",
            "seed", "hidden")  # fmt: skip
"""The keys of the manifest that a resumed capture must share with the store that is there."""


class StoreWriter:
    """Writes a store's shards; a context manager that locks the folder.

    What ``manifest.json`` lists is whole and synced; a file that it does not list is what a killed writer left, and is
    deleted. So after ``kill -9`` at any byte the store goes on from its last whole shard.

    Args:
        path: the store's folder; it is made.
        manifest: what the store is to be, with no shards yet.
        shard_positions: a shard is closed when it has so many positions.
        shard_hidden_bytes: or when it has so many bytes of hidden states.

    Raises:
        StorageError: another process writes to the folder.
        MismatchError: the folder holds a store of something else.
    """

    def __init__(
        self,
        path: str | Path,
        manifest: Manifest,
        *,
        shard_positions: int = SHARD_POSITIONS,
        shard_hidden_bytes: int = SHARD_HIDDEN_BYTES,
    ) -> None:
        self.path, self.shard_positions, self.shard_hidden_bytes = Path(path), shard_positions, shard_hidden_bytes
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            busy = StorageError(
                f"another process writes to the store {self.path}",
                {"store": self.path},
                why="Two captures into one folder would write over each other's shards.",
                fix="Wait for it or stop it; or choose another folder. Workers that share the work have a folder each.",
            )
            self._lock = lock(self.path, busy)
        try:
            if (self.path / MANIFEST).exists():
                before = read_manifest((self.path / MANIFEST).read_bytes(), self.path)
                for name in IDENTITY:
                    then, now = getattr(before, name), getattr(manifest, name)
                    same = then == now
                    if name == "teacher":
                        same = then.name == now.name and same_model(then.fingerprint, now.fingerprint)
                    if not same:
                        raise MismatchError(
                            f"the store {self.path} has another {name}",
                            {"there": then, "now": now},
                            why="Half of it would say one thing and half another.",
                            fix="Put back what was there, or choose another `out`.",
                        )
                manifest = before
            listed = {f"{shard.name}.{kind}" for shard in manifest.shards for kind in ("arrow", "tables")}
            for file in self.path.iterdir():
                if file.name not in listed and WRITTEN_NAMES.fullmatch(file.name):
                    file.unlink()
            write_manifest(self.path, manifest)
            self.manifest = manifest
        except BaseException:
            self._lock.close()
            raise
        self._rows: list[Row] = []
        self._signals: list[LogProbCodes | np.ndarray] = []
        self._hidden: list[bytes] = []
        self._positions, self._error = 0, 0.0
        self._broken: BaseException | None = None

    @property
    def num_documents(self) -> int:
        """Documents in whole shards."""
        return self.manifest.documents

    @property
    def num_positions(self) -> int:
        """Positions in whole shards and in the one that is begun."""
        return self.manifest.positions + self._positions

    def add(
        self,
        document: int,
        tokens: np.ndarray,
        loss_mask: np.ndarray,
        signal: LogProbCodes | np.ndarray,
        error_nats: float = 0.0,
        hidden: bytes | None = None,
    ) -> None:
        """Takes one document.

        Args:
            document: its number in the data.
            tokens: [n].
            loss_mask: bool [n]: whether the token after each is a target; False for the last.
            signal: the codes of the kept positions, or for a full store their logits, float32 [kept, vocab_size].
            error_nats: the cost of quantizing, summed over them.
            hidden: their hidden states as ``encode_hidden`` makes them, where the manifest says that there are some.
        """
        if self._broken is not None:  # what follows a shard that is not there would leave a gap
            raise self._broken
        assert len(signal) == int(loss_mask.sum()), f"{len(signal)} signals for {int(loss_mask.sum())} kept positions"
        assert self._hidden_bytes_of(len(signal)) == (None if hidden is None else len(hidden)), "other hidden states"
        self._rows.append((document, tokens, loss_mask))
        self._signals.append(signal)
        if hidden is not None:
            self._hidden.append(hidden)
        self._positions += len(signal)
        self._error += error_nats
        full = (self._hidden_bytes_of(self._positions) or 0) >= self.shard_hidden_bytes
        if self._positions >= self.shard_positions or full:
            try:
                self.flush()
            except BaseException as error:
                self._broken = error
                raise

    def _hidden_bytes_of(self, positions: int) -> int | None:
        config, width = self.manifest.hidden, self.manifest.hidden_width
        return None if config is None else positions * hidden_bytes_per_position(config, width)

    def finish(self) -> Manifest:
        """Writes the last shard, and that the store is complete."""
        self.flush()
        if (tokenizer := self.path / TOKENIZER).is_dir():  # which others put there
            sync_tree(tokenizer)
        self.manifest = self.manifest.model_copy(update={"complete": True})
        write_manifest(self.path, self.manifest)
        return self.manifest

    def flush(self) -> None:
        """Closes the shard that is begun, if there is one."""
        if not self._rows:
            return
        name = f"{len(self.manifest.shards):05d}"
        if isinstance(self.manifest.signal, Full):
            signals = [np.ascontiguousarray(signal, dtype="<f4").tobytes() for signal in self._signals]
            tables, entries, samples = b"", self._positions * self.manifest.num_columns, 0
        else:
            codes = LogProbCodes.concatenate([signal for signal in self._signals if isinstance(signal, LogProbCodes)])
            tokens = np.concatenate([tokens[loss_mask] for _, tokens, loss_mask in self._rows]).astype(np.int32)
            codec = Codec.train(tokens, codes, self.manifest.num_columns)
            signals = codec.encode(tokens, codes, np.cumsum([0, *map(len, self._signals)], dtype=np.int64))
            tables, entries, samples = codec.to_bytes(), len(codes.ids), len(codes.sample_ids)
        arrow, side_file = self.path / f"{name}.arrow", self.path / f"{name}.tables"
        with writing(arrow):
            with synced_file(side_file) as file:
                file.write(tables)
            with synced_file(arrow) as file:
                self._write_arrow(file, signals)
            sync_folder(self.path)
        shard = Shard(
            name=name,
            documents=len(self._rows),
            positions=self._positions,
            size_bytes=arrow.stat().st_size,
            crc32=crc32(arrow),
            tables_bytes=len(tables),
            tables_crc32=crc32(side_file),
        )
        before = self.manifest
        positions = before.positions + self._positions
        error = (before.codec_error_nats * before.positions + self._error) / max(1, positions)
        self.manifest = before.model_copy(
            update={
                "complete": False,
                "documents": before.documents + len(self._rows),
                "positions": positions,
                "tokens": before.tokens + sum(len(tokens) for _, tokens, _ in self._rows),
                "entries": before.entries + entries,
                "draws": before.draws + samples,
                "codec_error_nats": error,
                "shards": (*before.shards, shard),
            }
        )
        write_manifest(self.path, self.manifest)
        self._rows, self._signals, self._hidden, self._positions, self._error = [], [], [], 0, 0.0

    def _write_arrow(self, file: Any, signals: list[bytes]) -> None:
        columns = schema(self.manifest.num_columns, hidden=self.manifest.hidden is not None)
        with pa.ipc.new_file(file, columns) as writer:
            start = 0
            while start < len(self._rows):
                stop = start + ROWS_AT_ONCE
                if self._hidden:
                    sizes = np.cumsum([len(hidden) for hidden in self._hidden[start:stop]])
                    stop = min(stop, start + int(np.searchsorted(sizes, BATCH_HIDDEN_BYTES)) + 1)
                rows, hidden = self._rows[start:stop], self._hidden[start:stop]
                writer.write_batch(record_batch(columns, rows, signals[start:stop], hidden))
                start = stop

    def __enter__(self) -> "StoreWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.close()


def record_batch(
    columns: pa.Schema, rows: Sequence[Row], signals: Sequence[bytes | memoryview], hidden: Sequence[bytes | memoryview]
) -> pa.RecordBatch:
    """Rows as a shard holds them, with their checksums; ``hidden`` is empty where there are no hidden states."""
    hidden_checksums: list[int | None] = [None] * len(rows)
    if hidden:
        hidden_checksums = [hidden_crc32(*row, states) for row, states in zip(rows, hidden, strict=True)]
    checksums = [row_crc32(*r, signal, h) for r, signal, h in zip(rows, signals, hidden_checksums, strict=True)]
    tokens, masks = [tokens for _, tokens, _ in rows], [mask for _, _, mask in rows]
    lists = [
        list_array(pa.array(np.concatenate(arrays), kind.value_type), map(len, arrays), kind)
        for arrays, kind in ((tokens, columns.field("tokens").type), (masks, columns.field("keep").type))
    ]
    arrays = [
        pa.array([document for document, _, _ in rows], pa.int64()),
        *lists,
        pa.array(signals, pa.large_binary()),
        pa.array(checksums, pa.uint32()),
        *([pa.array(hidden_checksums, pa.uint32()), pa.array(hidden, pa.large_binary())] if hidden else []),
    ]
    return pa.record_batch(arrays, schema=columns)

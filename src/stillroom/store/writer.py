"""Writes a store shard by shard; a shard is there whole or not at all."""

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa

from stillroom.errors import MismatchError, StorageError
from stillroom.runs import crc32, lock, sync_folder, write_json, writing
from stillroom.store.codec.codec import Codec
from stillroom.store.config import SHARD_POSITIONS, Full
from stillroom.store.format import MANIFEST, Manifest, Shard, hidden_crc32, read_manifest, row_crc32, schema, values_of
from stillroom.store.hidden_states import bytes_per_position
from stillroom.store.quantize import LogProbCodes


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

    With ``overwrite`` a store that is there is deleted, but only once the new one is whole.
    """
    check_out(out, overwrite=overwrite)
    path = Path(out)
    made, old = (path.with_name(f".{path.name}.{kind}") for kind in ("new", "old"))
    for rest in (made, old):
        if rest.exists():
            shutil.rmtree(rest)
    with writing(path):
        made.mkdir(parents=True)
    try:
        yield made
        with writing(path):
            if path.exists():
                path.rename(old)
            made.rename(path)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise
    if old.exists():
        shutil.rmtree(old)


ROWS_AT_ONCE = 256
"""Rows of a record batch at the most."""

BATCH_HIDDEN_BYTES = 2**25
"""A record batch is closed when it has so many bytes of hidden states; one that lies elsewhere is read whole."""

SHARD_HIDDEN_BYTES = 2**29
"""So is a shard, which is held in memory until it is written."""

OURS = re.compile(r"[0-9]{5,9}\.(arrow|tables)(\.tmp)?|\.manifest\.json\.tmp")
"""The names of files that a writer makes."""

Row = tuple[int, np.ndarray, np.ndarray]
"""A document's number, tokens and keep."""

IDENTITY = ("teacher", "engine", "tokenizer", "template", "data", "part", "num_columns", "length", "signal",
            "seed", "hidden")  # fmt: skip
"""What a capture that is resumed must share with the one that is there."""


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
            self.manifest = self._take_up(manifest)
        except BaseException:
            self._lock.close()
            raise
        self._rows: list[Row] = []
        self._signals: list[LogProbCodes | np.ndarray] = []
        self._hidden: list[bytes] = []
        self._positions, self._error = 0, 0.0
        self._broken: BaseException | None = None

    def _take_up(self, manifest: Manifest) -> Manifest:
        """The manifest that is there, or else this one; and nothing besides what it lists."""
        place = self.path / MANIFEST
        if place.exists():
            before = read_manifest(place.read_bytes(), self.path)
            for name in IDENTITY:
                then, now = getattr(before, name), getattr(manifest, name)
                if then != now:
                    raise MismatchError(
                        f"the store {self.path} has another {name}",
                        {"there": then, "now": now},
                        why="Half of it would say one thing and half another.",
                        fix="Put back what was there, or choose another `out`.",
                    )
            manifest = before
        listed = {f"{shard.name}.{kind}" for shard in manifest.shards for kind in ("arrow", "tables")}
        for file in self.path.iterdir():
            if file.name not in listed and OURS.fullmatch(file.name):
                file.unlink()
        self._write(manifest)
        return manifest

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
            keep: bool [n]: whether the token after each is to be learnt; False for the last.
            signal: of the kept positions: levels, or for a full store the logits, float32 [kept, columns].
            error_nats: what quantising cost, summed over them.
            hidden: their inner states as ``hidden.encode`` makes them, where the manifest says that there are some.
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
        return None if config is None else positions * bytes_per_position(config, width)

    def finish(self) -> Manifest:
        """Writes what is left, and says that the store is complete."""
        self.flush()
        self.manifest = self.manifest.model_copy(update={"complete": True})
        self._write(self.manifest)
        return self.manifest

    def flush(self) -> None:
        """Closes the shard that is begun, if there is one."""
        if not self._rows:
            return
        name = f"{len(self.manifest.shards):05d}"
        tables, signals, entries, draws = self._encode()
        arrow, side_file = self.path / f"{name}.arrow", self.path / f"{name}.tables"
        with writing(arrow):
            _write_synced(side_file, lambda file: file.write(tables))
            _write_synced(arrow, lambda file: self._write_arrow(file, signals))
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
                "draws": before.draws + draws,
                "codec_error_nats": error,
                "shards": (*before.shards, shard),
            }
        )
        self._write(self.manifest)
        self._rows, self._signals, self._hidden, self._positions, self._error = [], [], [], 0, 0.0

    def _encode(self) -> tuple[bytes, list[bytes], int, int]:
        """The shard's tables, the signal column, and the numbers of entries and of drawn ids."""
        if isinstance(self.manifest.signal, Full):
            rows = [np.ascontiguousarray(signal, dtype="<f4").tobytes() for signal in self._signals]
            return b"", rows, self._positions * self.manifest.num_columns, 0
        levels = LogProbCodes.concatenate([signal for signal in self._signals if isinstance(signal, LogProbCodes)])
        tokens = np.concatenate([tokens[loss_mask] for _, tokens, loss_mask in self._rows]).astype(np.int32)
        offsets = np.cumsum([0, *map(len, self._signals)], dtype=np.int64)
        codec = Codec.train(tokens, levels, self.manifest.num_columns)
        return codec.to_bytes(), codec.encode(tokens, levels, offsets), len(levels.ids), len(levels.draw_ids)

    def _write_arrow(self, file: Any, signals: list[bytes]) -> None:
        columns = schema(self.manifest.num_columns, hidden=self.manifest.hidden is not None)
        with pa.ipc.new_file(file, columns) as writer:
            start = 0
            while start < len(self._rows):
                stop = start + self._rows_of_batch(start)
                arrays = self._arrays(columns, self._rows[start:stop], signals[start:stop], self._hidden[start:stop])
                writer.write_batch(pa.record_batch(arrays, schema=columns))
                start = stop

    def _rows_of_batch(self, start: int) -> int:
        """How many rows the record batch has that begins at a row."""
        sizes = np.cumsum([len(hidden) for hidden in self._hidden[start : start + ROWS_AT_ONCE]])
        most = int(np.searchsorted(sizes, BATCH_HIDDEN_BYTES)) + 1 if len(sizes) else ROWS_AT_ONCE
        return min(most, ROWS_AT_ONCE)

    def _arrays(self, columns: pa.Schema, rows: list[Row], signals: list[bytes], hidden: list[bytes]) -> list[pa.Array]:
        """The columns of a record batch."""
        of_hidden: list[int | None] = [None] * len(rows)
        further = []
        if self.manifest.hidden is not None:
            of_hidden = [hidden_crc32(n, t, k, states) for (n, t, k), states in zip(rows, hidden, strict=True)]
            further = [pa.array(of_hidden, pa.uint32()), pa.array(hidden, pa.large_binary())]
        of_rows = [row_crc32(n, t, k, said, of) for (n, t, k), said, of in zip(rows, signals, of_hidden, strict=True)]
        return [
            pa.array([document for document, _, _ in rows], pa.int64()),
            _lists([tokens for _, tokens, _ in rows], columns.field("tokens").type),
            _lists([loss_mask for _, _, loss_mask in rows], columns.field("keep").type),
            pa.array(signals, pa.large_binary()),
            pa.array(of_rows, pa.uint32()),
            *further,
        ]

    def _write(self, manifest: Manifest) -> None:
        write_json(self.path / MANIFEST, values_of(manifest))
        sync_folder(self.path)

    def close(self) -> None:
        self._lock.close()

    def __enter__(self) -> "StoreWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _lists(arrays: list[np.ndarray], kind: pa.DataType) -> pa.Array:
    offsets = np.cumsum([0, *map(len, arrays)], dtype=np.int32)
    values = pa.array(np.concatenate(arrays), kind.value_type)
    return pa.ListArray.from_arrays(pa.array(offsets), values, type=kind)


def _write_synced(path: Path, write: Callable[[Any], object]) -> None:
    """Writes a file under a temporary name, syncs it and renames it."""
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)

"""Check: all that is wrong with a store, and not only the first thing."""

import math
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from stillroom.errors import DataError, MismatchError, StillroomError
from stillroom.store.config import Full
from stillroom.store.format import (
    COUNTS,
    MANIFEST,
    MOST_MANIFEST_BYTES,
    TOKENIZER,
    Manifest,
    StoreFiles,
    check_equal,
    damaged,
    no_tokenizer,
    read_manifest,
)
from stillroom.store.reader import StoredShard

ROWS_AT_ONCE = 64
"""Rows that are decoded together, while nothing is wrong with them."""
NAMED_ROWS = 5
"""Damaged rows of one shard that get an error each; the others are counted."""


@dataclass
class Checked:
    """The findings of a check."""

    path: str
    manifest: Manifest | None = None
    """None where it cannot be read."""
    problems: list[StillroomError] = field(default_factory=list)
    unlisted: list[str] = field(default_factory=list)
    """Files that look like shards but that the manifest does not name."""

    @property
    def whole(self) -> bool:
        """Whether nothing is wrong with what is there; a store that is not complete may be whole."""
        return not self.problems

    def __str__(self) -> str:
        """The summary of a whole store."""
        if self.manifest is None:
            return f"{self.path} cannot be read"
        m = self.manifest
        state = "complete" if m.complete else "NOT COMPLETE: its capture was interrupted, or is under way"
        lines = [
            f"store     {self.path}: {'whole' if self.whole else 'damaged'}, {state}",
            f"checked   {m.documents:,} documents, {m.positions:,} positions, {m.entries + m.draws:,} entries in "
            f"{len(m.shards)} shard{'s' * (len(m.shards) != 1)} ({m.size_bytes / 2**20:,.1f} MiB), and the tokenizer",
        ]
        if self.unlisted:
            more = f" and {len(self.unlisted) - 4} more" if len(self.unlisted) > 4 else ""
            lines.append(f"besides   {', '.join(self.unlisted[:4])}{more}: no part of the store, and not read")
        return "\n".join(lines)


def check(path: str | Path, report: Callable[[str], object] = lambda _: None) -> Checked:
    """Checks the files' and the rows' checksums, decodes every row, and compares with the manifest and its tokenizer.

    Args:
        path: a store's folder or address, complete or not.
        report: is called with a line before each shard is read.
    """
    checked = Checked(str(path))
    with _noted(checked.problems):
        files = StoreFiles(checked.path)
        checked.manifest = manifest = read_manifest(files.read(MANIFEST, MOST_MANIFEST_BYTES), checked.path)
        _check_manifest(checked, files, manifest)
        totals: dict[str, int] = dict.fromkeys(COUNTS, 0)
        counted = True
        for number, shard in enumerate(manifest.shards):
            report(f"checking shard {number + 1} of {len(manifest.shards)}")
            shard_check = ShardCheck(files, manifest, number)
            checked.problems += shard_check.problems
            counted &= shard_check.counted
            totals = {name: total + shard_check.counts[name] for name, total in totals.items()}
            with _noted(checked.problems):
                if shard_check.counted:
                    positions = shard_check.counts["positions"]
                    check_equal(files.path, f"positions of {shard.name}", positions, shard.positions)
        for name in COUNTS if counted else ():
            with _noted(checked.problems):
                check_equal(files.path, f"{name} in all", totals[name], getattr(manifest, name))
        if not files.remote:
            listed = {f"{shard.name}.{kind}" for shard in manifest.shards for kind in ("arrow", "tables")}
            names = sorted({file.name for file in Path(files.path).iterdir()} - listed)
            checked.unlisted = [name for name in names if name.endswith((".arrow", ".tables", ".tmp"))]
    return checked


@contextmanager
def _noted(problems: list[StillroomError]) -> Iterator[None]:
    """Adds an error that is raised inside to the problems, unless it is there."""
    try:
        yield
    except StillroomError as error:
        if str(error) not in map(str, problems):
            problems.append(error)


def _check_manifest(checked: Checked, files: StoreFiles, manifest: Manifest) -> None:
    """Notes all that contradicts itself in a manifest, and what is wrong with the tokenizer beside it."""
    from stillroom.tokenizers import fingerprint, load_tokenizer, required_vocab_size

    error, part = manifest.codec_error_nats, manifest.part
    if not (math.isfinite(error) and error > -1e-6):
        where = f"{MANIFEST} at `codec_error_nats`"
        checked.problems.append(damaged(checked.path, where, error, "a number of at least 0"))
    if part[0] >= part[1]:
        where = f"{MANIFEST} at `part`"
        checked.problems.append(damaged(checked.path, where, part, "an index below the number of parts"))
    with _noted(checked.problems), tempfile.TemporaryDirectory() as folder:
        try:
            where = files.fetch(TOKENIZER, Path(folder))
            if not files.remote and not Path(where).is_dir():
                raise FileNotFoundError
            tokenizer = load_tokenizer(where)
        except FileNotFoundError:
            raise no_tokenizer(
                f"the store {files.path} lacks its tokenizer",
                TOKENIZER,
                manifest.tokenizer,
                why="Without it nobody can tell what its token ids mean, or whether a student fits it.",
            ) from None
        found, vocab_size = fingerprint(tokenizer), required_vocab_size(tokenizer)
        if found != manifest.tokenizer.fingerprint:
            raise MismatchError(
                f"the store {files.path} holds another tokenizer than it was made with",
                {f"in {TOKENIZER}/": found[:32], "in the manifest": manifest.tokenizer.fingerprint[:32]},
                why="Its token ids would be taken for other tokens.",
                fix=f"Put the tokenizer of {manifest.tokenizer.name} back there.",
            )
        if vocab_size > manifest.num_columns:
            most = f"at most {manifest.num_columns}"
            raise damaged(files.path, "columns that its tokenizer needs", vocab_size, most)


class ShardCheck:
    """The check of one shard: its files' and rows' checksums and every row decoded; the problems, and the counts."""

    def __init__(self, files: StoreFiles, manifest: Manifest, number: int) -> None:
        self.manifest, self.path, self.problems = manifest, files.path, list[StillroomError]()
        self.counts: dict[str, int] = dict.fromkeys(COUNTS, 0)
        self.counted = False
        self._num_damaged = 0
        with _noted(self.problems):
            shard = self.shard = StoredShard(files, manifest.shards[number], manifest)
            for name, expected in ((shard.arrow, shard.shard.crc32), (shard.tables, shard.shard.tables_crc32)):
                checksum = 0
                with files.open(name) as file:
                    while block := file.read(1 << 22):
                        checksum = zlib.crc32(block, checksum)
                with _noted(self.problems):
                    check_equal(self.path, f"checksum of {name}", checksum, expected)
            shard.batches  # noqa: B018
            readable = False
            with _noted(self.problems):
                readable = isinstance(manifest.signal, Full) or shard.codec is not None
            for start in range(0, shard.num_documents, ROWS_AT_ONCE):
                rows = range(start, min(start + ROWS_AT_ONCE, shard.num_documents))
                sound = [row for row in rows if self._try(self._check_row, row)]
                if readable and sound:
                    try:
                        self._decode(*sound)
                    except DataError:
                        for row in sound:
                            self._try(self._decode, row)
            self.counted = readable and not self._num_damaged
            if self._num_damaged > NAMED_ROWS:
                found = f"{self._num_damaged:,}, of which the first {NAMED_ROWS} are named"
                raise damaged(self.path, f"damaged rows of {shard.arrow}", found, "none")

    def _check_row(self, row: int) -> None:
        self.shard.signal(row)
        tokens, loss_mask = self.shard.tokens(row), self.shard.loss_mask(row)
        most = self.manifest.length + 1
        if len(tokens) > most:
            raise damaged(self.path, f"tokens of {self.shard.arrow} row {row}", len(tokens), f"at most {most}")
        if (hidden := self.manifest.hidden) is not None:
            data, shape = self.shard.hidden_bytes(row), (int(loss_mask.sum()), self.manifest.hidden_width)
            self.shard.decode_hidden(row, data, {layer: np.empty(shape, np.float32) for layer in hidden.layers})
        self.counts["documents"] += 1
        self.counts["tokens"] += len(tokens)
        self.counts["positions"] += int(loss_mask.sum())

    def _decode(self, *rows: int) -> None:
        if isinstance(self.manifest.signal, Full):
            self.counts["entries"] += sum([self.shard.logits(row).size for row in rows])
        else:
            codes = self.shard.levels(rows)
            self.counts["entries"] += len(codes.ids)
            self.counts["draws"] += len(codes.sample_ids)

    def _try(self, read: Callable[[int], None], row: int) -> bool:
        try:
            read(row)
        except DataError as error:
            self._num_damaged += 1
            if self._num_damaged <= NAMED_ROWS:
                where = f"{self.shard.arrow} row {row}"
                named = where in " ".join(error.values)
                found = error if named else damaged(self.path, where, *list(error.values.values())[:2])
                self.problems.append(found)
            return False
        return True

"""Check: all that is wrong with a store, and not only the first thing."""

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from stillroom.errors import DataError, MismatchError, MissingError, StillroomError
from stillroom.store.config import Full
from stillroom.store.filesystem import StoreFiles
from stillroom.store.format import MANIFEST, MOST_MANIFEST_BYTES, TOKENIZER, Manifest, damaged, read_manifest
from stillroom.store.reader import StoredShard

ROWS_AT_ONCE = 64
"""Rows that are decoded together, while nothing is wrong with them."""
NAMED_ROWS = 5
"""Damaged rows of one shard that get an error each; the others are counted."""
COUNTS = ("documents", "positions", "tokens", "entries", "draws")


@dataclass
class Checked:
    """What a check found."""

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
        report: is told of each shard before it is read.
    """
    checked = Checked(str(path))
    try:
        place = StoreFiles(checked.path)
        checked.manifest = manifest = read_manifest(place.read(MANIFEST, MOST_MANIFEST_BYTES), checked.path)
    except StillroomError as error:
        checked.problems.append(error)
        return checked
    checked.problems += _manifest_problems(manifest, checked.path)
    checked.problems += _tokenizer_problems(place, manifest)
    found, totals_known = dict.fromkeys(COUNTS, 0), True
    for number, shard in enumerate(manifest.shards):
        report(f"checking shard {number + 1} of {len(manifest.shards)}")
        reading = ShardCheck(place, manifest, number)
        checked.problems += reading.problems
        totals_known &= reading.counted
        for name in COUNTS:
            found[name] += reading.counts[name]
        if reading.counted and reading.counts["positions"] != shard.positions:
            checked.problems.append(
                damaged(place.path, f"positions of {shard.name}", reading.counts["positions"], shard.positions)
            )
    if totals_known:
        checked.problems += [
            damaged(place.path, f"{name} in all", found[name], getattr(manifest, name))
            for name in COUNTS
            if found[name] != getattr(manifest, name)
        ]
    checked.unlisted = _unlisted(place, manifest)
    return checked


class ShardCheck:
    """Of one shard: its files' and rows' checksums and every row decoded; the problems, and what was counted."""

    def __init__(self, place: StoreFiles, manifest: Manifest, number: int) -> None:
        self.place, self.manifest, self.shard = place, manifest, manifest.shards[number]
        self.problems: list[StillroomError] = []
        self.counts: dict[str, int] = dict.fromkeys(COUNTS, 0)
        self.counted = False
        self._damaged_rows = 0
        self._run()

    def _run(self) -> None:
        try:
            shard = StoredShard(self.place, self.shard, self.manifest)
        except StillroomError as error:
            self.problems.append(error)
            return
        for name, expected in (("arrow", self.shard.crc32), ("tables", self.shard.tables_crc32)):
            file = f"{self.shard.name}.{name}"
            if (found := _crc32(self.place, file)) != expected:
                self.problems.append(damaged(self.place.path, f"checksum of {file}", found, expected))
        try:
            shard.batches  # noqa: B018
        except StillroomError as error:
            self.problems.append(error)
            return
        readable = True
        if not isinstance(self.manifest.signal, Full):
            try:
                shard.codec  # noqa: B018
            except StillroomError as error:
                readable = False
                if str(error) not in map(str, self.problems):
                    self.problems.append(error)
        self._rows(shard, readable)
        self.counted = readable and not self._damaged_rows
        if self._damaged_rows > NAMED_ROWS:
            self.problems.append(
                damaged(
                    self.place.path,
                    f"damaged rows of {self.shard.name}.arrow",
                    f"{self._damaged_rows:,}, of which the first {NAMED_ROWS} are named",
                    "none",
                )
            )

    def _rows(self, shard: StoredShard, readable: bool) -> None:
        """The checksum of each row, and what it says."""
        for start in range(0, shard.num_documents, ROWS_AT_ONCE):
            rows = range(start, min(start + ROWS_AT_ONCE, shard.num_documents))
            sound = [row for row in rows if self._try(row, lambda row=row: self._row(shard, row))]
            if not (readable and sound):
                continue
            if isinstance(self.manifest.signal, Full):
                for row in sound:
                    self._try(row, lambda row=row: self._count(shard.logits(row)))
                continue
            try:
                self._count(shard.levels(sound))
            except DataError:
                for row in sound:
                    self._try(row, lambda row=row: self._count(shard.levels([row])))

    def _row(self, shard: StoredShard, row: int) -> None:
        shard.signal(row)
        tokens, loss_mask = shard.tokens(row), shard.loss_mask(row)
        where = f"{self.shard.name}.arrow row {row}"
        if len(tokens) > self.manifest.length + 1:
            raise damaged(self.place.path, f"tokens of {where}", len(tokens), f"at most {self.manifest.length + 1}")
        if (hidden := self.manifest.hidden) is not None:
            data, shape = shard.hidden_bytes(row), (int(loss_mask.sum()), self.manifest.hidden_width)
            shard.decode_hidden(row, data, {layer: np.empty(shape, np.float32) for layer in hidden.layers})
        self.counts["documents"] += 1
        self.counts["tokens"] += len(tokens)
        self.counts["positions"] += int(loss_mask.sum())

    def _count(self, signal: Any) -> None:
        if isinstance(signal, np.ndarray):
            self.counts["entries"] += signal.size
        else:
            self.counts["entries"] += len(signal.ids)
            self.counts["draws"] += len(signal.draw_ids)

    def _try(self, row: int, read: Callable[[], object]) -> bool:
        try:
            read()
        except DataError as error:
            self._damaged_rows += 1
            if self._damaged_rows <= NAMED_ROWS:
                where = f"{self.shard.name}.arrow row {row}"
                named = where in " ".join(error.values)
                found = error if named else damaged(self.place.path, where, *list(error.values.values())[:2])
                self.problems.append(found)
            return False
        return True


def _crc32(place: StoreFiles, name: str) -> int:
    checksum = 0
    with place.open(name) as file:
        while block := file.read(1 << 22):
            checksum = zlib.crc32(block, checksum)
    return checksum


def _manifest_problems(manifest: Manifest, path: str) -> list[StillroomError]:
    """What the manifest says that contradicts itself."""
    found: list[StillroomError] = []
    if not (math.isfinite(manifest.codec_error_nats) and manifest.codec_error_nats > -1e-6):
        found.append(
            damaged(path, "manifest.json at `codec_error_nats`", manifest.codec_error_nats, "a number of at least 0")
        )
    if manifest.part[0] >= manifest.part[1]:
        found.append(damaged(path, "manifest.json at `part`", manifest.part, "an index below the number of parts"))
    return found


def _tokenizer_problems(place: StoreFiles, manifest: Manifest) -> list[StillroomError]:
    import tempfile

    from stillroom.tokenizers import fingerprint, load_tokenizer, required_vocab_size

    with tempfile.TemporaryDirectory() as folder:
        try:
            where = place.fetch(TOKENIZER, Path(folder))
            if not place.remote and not Path(where).is_dir():
                raise FileNotFoundError
            tokenizer = load_tokenizer(where)
        except FileNotFoundError:
            return [
                MissingError(
                    f"the store {place.path} lacks its tokenizer",
                    {"missing": TOKENIZER, "made with": manifest.tokenizer.name},
                    why="Without it nobody can tell what its token ids mean, or whether a student fits it.",
                    fix=f"Save the tokenizer of {manifest.tokenizer.name} into that folder by `save_pretrained`.",
                )
            ]
        except StillroomError as error:
            return [error]
        print_found, columns = fingerprint(tokenizer), required_vocab_size(tokenizer)
    if print_found != manifest.tokenizer.fingerprint:
        return [
            MismatchError(
                f"the store {place.path} holds another tokenizer than it was made with",
                {f"in {TOKENIZER}/": print_found[:32], "in the manifest": manifest.tokenizer.fingerprint[:32]},
                why="Its token ids would be taken for other tokens.",
                fix=f"Put the tokenizer of {manifest.tokenizer.name} back there.",
            )
        ]
    if columns > manifest.num_columns:
        return [damaged(place.path, "columns that its tokenizer needs", columns, f"at most {manifest.num_columns}")]
    return []


def _unlisted(place: StoreFiles, manifest: Manifest) -> list[str]:
    if place.remote:
        return []
    listed = {f"{shard.name}.{kind}" for shard in manifest.shards for kind in ("arrow", "tables")}
    files = sorted(file.name for file in Path(place.path).iterdir())
    return [name for name in files if name not in listed and name.endswith((".arrow", ".tables", ".tmp"))]

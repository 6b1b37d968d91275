"""Check: all that is wrong with a store, and not only the first thing."""

import math
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from stillroom.errors import DataError, MismatchError, StillroomError
from stillroom.layers import Layer
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
        with _noted(checked.problems):
            error = manifest.codec_error_nats
            if not (math.isfinite(error) and error > -1e-6):
                raise damaged(checked.path, f"{MANIFEST} at `codec_error_nats`", error, "a number of at least 0")
        with _noted(checked.problems):
            if manifest.part[0] >= manifest.part[1]:
                raise damaged(
                    checked.path, f"{MANIFEST} at `part`", manifest.part, "an index below the number of parts"
                )
        with _noted(checked.problems):
            _check_tokenizer(files, manifest)
        totals, counted = Counter[str](), True
        for number, shard in enumerate(manifest.shards):
            report(f"checking shard {number + 1} of {len(manifest.shards)}")
            counts = check_shard(files, manifest, number, checked.problems)
            counted &= counts is not None
            if counts is not None:
                totals.update(counts)
                with _noted(checked.problems):
                    check_equal(files.path, f"positions of {shard.name}", counts["positions"], shard.positions)
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


def _check_tokenizer(files: StoreFiles, manifest: Manifest) -> None:
    """Raises what is wrong with the tokenizer beside a manifest."""
    from stillroom.tokenizers import fingerprint, load_tokenizer, required_vocab_size

    with tempfile.TemporaryDirectory() as folder:
        try:
            where = files.fetch(TOKENIZER, Path(folder))
            if not files.remote and not Path(where).is_dir():
                raise FileNotFoundError
            tokenizer = load_tokenizer(where)
        except FileNotFoundError:
            why = "Without it nobody can tell what its token ids mean, or whether a student fits it."
            what = f"the store {files.path} lacks its tokenizer"
            raise no_tokenizer(what, TOKENIZER, manifest.tokenizer, why) from None
    found, vocab_size = fingerprint(tokenizer), required_vocab_size(tokenizer)
    if found != manifest.tokenizer.fingerprint:
        raise MismatchError(
            f"the store {files.path} holds another tokenizer than it was made with",
            {f"in {TOKENIZER}/": found[:32], "in the manifest": manifest.tokenizer.fingerprint[:32]},
            why="Its token ids would be taken for other tokens.",
            fix=f"Put the tokenizer of {manifest.tokenizer.name} back there.",
        )
    if vocab_size > manifest.num_columns:
        raise damaged(files.path, "columns that its tokenizer needs", vocab_size, f"at most {manifest.num_columns}")


def check_shard(
    files: StoreFiles, manifest: Manifest, number: int, problems: list[StillroomError]
) -> Counter[str] | None:
    """Notes what is wrong with a shard: the checksums of its files and rows, and every row decoded.

    Returns:
        the counts of what it holds; None where not all of it can be read.
    """
    num_damaged, readable, counts = 0, False, Counter[str]()
    with _noted(problems):
        shard = StoredShard(files, manifest.shards[number], manifest)
        for name, expected in ((shard.arrow, shard.shard.crc32), (shard.tables, shard.shard.tables_crc32)):
            with _noted(problems):
                check_equal(files.path, f"checksum of {name}", files.crc32(name), expected)
        shard.batches  # noqa: B018
        with _noted(problems):
            readable = isinstance(manifest.signal, Full) or shard.codec is not None
        for start in range(0, shard.num_documents, ROWS_AT_ONCE):
            rows = range(start, min(start + ROWS_AT_ONCE, shard.num_documents))
            try:
                counts.update(_read(shard, rows, decode=readable))
            except DataError:  # so the rows are read one by one
                for row in rows:
                    try:
                        counts.update(_read(shard, [row], decode=readable))
                    except DataError as error:
                        num_damaged += 1
                        where = f"{shard.arrow} row {row}"
                        named = where in " ".join(error.values)
                        found = error if named else damaged(files.path, where, *list(error.values.values())[:2])
                        problems += [found] if num_damaged <= NAMED_ROWS else []
        if num_damaged > NAMED_ROWS:
            found = f"{num_damaged:,}, of which the first {NAMED_ROWS} are named"
            raise damaged(files.path, f"damaged rows of {shard.arrow}", found, "none")
        return counts if readable and not num_damaged else None


def _read(shard: StoredShard, rows: Sequence[int], *, decode: bool) -> Counter[str]:
    """The counts of what some rows hold; DataError where one is damaged."""
    manifest, most, counts = shard.manifest, shard.manifest.length + 1, Counter[str](documents=len(rows))
    for row in rows:
        shard.signal(row)
        tokens, kept = shard.tokens(row), int(shard.loss_mask(row).sum())
        if len(tokens) > most:
            raise damaged(shard.files.path, f"tokens of {shard.arrow} row {row}", len(tokens), f"at most {most}")
        if manifest.hidden is not None:
            shape = kept, manifest.hidden_width
            into: dict[Layer, np.ndarray] = {layer: np.empty(shape, np.float32) for layer in manifest.hidden.layers}
            shard.decode_hidden(row, shard.hidden_bytes(row), into)
        counts.update(tokens=len(tokens), positions=kept)
    if decode and isinstance(manifest.signal, Full):
        counts.update(entries=sum(shard.logits(row).size for row in rows))
    elif decode:
        codes = shard.levels(rows)
        counts.update(entries=len(codes.ids), draws=len(codes.sample_ids))
    return counts

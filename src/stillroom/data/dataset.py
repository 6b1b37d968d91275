"""Documents: tokenized data in a cache folder, memory-mapped; built once under a fingerprint of all that made them.

A folder ``<cache>/data/<fingerprint>/`` holds ``documents.arrow`` and ``manifest.json``. It is written under a
temporary name and renamed when it is whole, so a folder of that name is always complete.
"""

import hashlib
import json
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from stillroom.data.config import AnyData, cache_folder
from stillroom.data.formats import Encoded, Encoder, encoder, needs_template
from stillroom.data.sources import Source, open_source
from stillroom.errors import DataError, StillroomError, StorageError
from stillroom.recipe import parse_json
from stillroom.runs import crc32, lock, sync_tree
from stillroom.tokenizers import fingerprint, template_fingerprint, template_of

FORMAT = 2
"""The version of the folder's layout and of the way from rows to tokens. It is part of the fingerprint."""

SCHEMA = pa.schema(
    [
        pa.field("tokens", pa.large_list(pa.int32())),
        pa.field("learn", pa.large_list(pa.int32())),  # start, end, start, end … of the runs of tokens to learn
        pa.field("row", pa.int64()),
        pa.field("weight", pa.float32()),
    ]
)

ROWS_AT_ONCE = 512

NOT_IN_TOKENS = {"path", "split", "subset", "revision", "shuffle", "pack", "cache", "template", "hash_range"}
"""Settings that change no token, or whose effect the fingerprints of source and template already hold."""

LATER = {"roles", "chat_template_kwargs", "system"}
"""Settings that came later: where they are null, documents are found that were made before there were any."""


@dataclass
class Counts:
    """A count of what became of the rows."""

    rows: int = 0
    """Rows read."""
    documents: int = 0
    """Documents kept; a row that is split gives several."""
    cut: int = 0
    split: int = 0
    dropped_overlong: int = 0
    dropped_empty: int = 0
    dropped_cut_away: int = 0
    """Rows left out because all that was to be learned lay beyond the cut."""
    tokens: int = 0
    tokens_learnt: int = 0
    """Tokens that are a target to learn; the first of a document never is."""


class Documents:
    """Tokenized documents in the order of their rows."""

    def __init__(self, table: pa.Table, counts: Counts, fingerprint: str, row_name: Callable[[int], str]) -> None:
        self.counts: dict[str, int] = asdict(counts)
        self.fingerprint, self._row_name = fingerprint, row_name
        self._tokens = [_ListColumn(chunk) for chunk in table["tokens"].chunks]
        self._target_mask = [_ListColumn(chunk) for chunk in table["learn"].chunks]
        self._starts = np.cumsum([0, *(len(chunk) for chunk in table["tokens"].chunks)])
        self.source_rows: np.ndarray = table["row"].to_numpy()
        """int64 [documents]: the row of the source that each document came from, from 0."""
        self._weights: np.ndarray = table["weight"].to_numpy()
        self.lengths: np.ndarray = np.concatenate([np.diff(column.offsets) for column in self._tokens])
        """int64 [documents]: the tokens of each document."""
        self._chosen: np.ndarray | None = None
        """int64 [documents]: the place of each in the file, where it holds more."""

    def choose(self, config: AnyData) -> Self:
        """Keeps the documents that ``config.hash_range`` names. Raises DataError where there are none."""
        if config.hash_range is None:
            return self
        low, high = config.hash_range
        hashes = self._hashes()
        chosen = np.flatnonzero((hashes >= low) & (hashes < high))
        if not len(chosen):
            raise DataError(
                f"no row of {config.path} has a hash in the range that is asked for",
                {"rows": self.counts["rows"], "range": f"{low:g} to {high:g}"},
                why="The rows are chosen by their hash, and there are too few for that share.",
                fix="Ask for a larger share, or give held-out text of its own by its path.",
            )
        self._chosen, self.lengths = chosen, self.lengths[chosen]
        self.source_rows, self._weights = self.source_rows[chosen], self._weights[chosen]
        learnt = int(self._learnt()[chosen].sum())
        self.counts |= {"documents": len(chosen), "tokens": int(self.lengths.sum()), "tokens_learnt": learnt}
        self.fingerprint = hashlib.sha256(f"{self.fingerprint} {low!r} {high!r}".encode()).hexdigest()[:32]
        return self

    def _hashes(self) -> np.ndarray:
        """float64 [documents]: a number from 0 to 1 of each, by the tokens of its row: the pieces of a row have one.

        A sum over the row of SplitMix64 (Steele and others, OOPSLA 2014) of each token and its place.
        """
        firsts = np.flatnonzero(np.diff(self.source_rows, prepend=-1))  # the first document of each row
        before = np.cumsum(self.lengths) - self.lengths
        row_of = np.cumsum(np.diff(self.source_rows, prepend=-1) != 0) - 1
        place_in_row, sums, start = before - before[firsts][row_of], [np.zeros(0, np.uint64)], 0
        for column in self._tokens:
            lengths, offsets = np.diff(column.offsets), column.offsets[:-1]
            if not len(lengths):
                continue
            places = np.arange(column.offsets[-1]) - np.repeat(offsets, lengths)
            places += np.repeat(place_in_row[start : start + len(lengths)], lengths) + 1
            tokens = column.values[: column.offsets[-1]].astype(np.uint64)
            sums.append(np.add.reduceat(_mix(tokens + _GOLDEN * places.astype(np.uint64)), offsets))
            start += len(lengths)
        mixed = _mix(np.add.reduceat(np.concatenate(sums), firsts))
        return ((mixed >> np.uint64(11)) / 2.0**53)[row_of]

    def _learnt(self) -> np.ndarray:
        """int64 [documents of the file]: the tokens of each that are a target; its first never is."""
        found = []
        for column in self._target_mask:
            edges = column.values.reshape(-1, 2).astype(np.int64)
            sizes = np.concatenate(([0], np.cumsum(edges[:, 1] - edges[:, 0] - (edges[:, 0] == 0))))
            found.append(np.diff(sizes[column.offsets // 2]))
        return np.concatenate(found)

    def __len__(self) -> int:
        return len(self.lengths)

    def tokens(self, index: int) -> np.ndarray:
        """The tokens of a document, int32 [n]: a read-only view of the file."""
        chunk, place = self._find(index)
        return self._tokens[chunk][place]

    def target_mask(self, index: int) -> np.ndarray:
        """The tokens of a document that are to be learned, bool [n]; entry i speaks of token i itself."""
        chunk, place = self._find(index)
        target_mask = np.zeros(self.lengths[index], dtype=bool)
        for start, end in self._target_mask[chunk][place].reshape(-1, 2):
            target_mask[start:end] = True
        return target_mask

    def weight(self, index: int) -> float:
        """The weight of each token of a document, for objectives that go by it; 1 unless the data say otherwise."""
        return float(self._weights[index])

    def name(self, index: int) -> str:
        """The row that a document came from as a message calls it, such as "train.jsonl line 12"."""
        return self._row_name(int(self.source_rows[index]))

    def place(self, index: int) -> int:
        """The place of a document in the file."""
        return index if self._chosen is None else int(self._chosen[index])

    def _find(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        index = self.place(index)
        chunk = int(np.searchsorted(self._starts, index, side="right")) - 1
        return chunk, index - int(self._starts[chunk])


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(values: np.ndarray) -> np.ndarray:
    """The output function of SplitMix64, on uint64 [n]."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        values = (values ^ (values >> np.uint64(shift))) * np.uint64(factor)
    return values ^ (values >> np.uint64(31))


class _ListColumn:
    """One chunk of a list column as NumPy views of its values and offsets."""

    def __init__(self, chunk: Any) -> None:
        self.values = chunk.values.to_numpy(zero_copy_only=True)
        self.offsets = chunk.offsets.to_numpy(zero_copy_only=True)

    def __getitem__(self, place: int) -> np.ndarray:
        return self.values[self.offsets[place] : self.offsets[place + 1]]


# --- where they are --------------------------------------------------------------------------------------------------
def cache_path(config: AnyData, tokenizer: PreTrainedTokenizerBase, template: str | None = None) -> Path:
    """The folder where ``prepare`` would find or put the documents. Reads the source; writes nothing."""
    return RowOrigin(config, tokenizer, template).folder


class RowOrigin:
    """The identity of the documents of a config, and so the folder that they belong in."""

    def __init__(self, config: AnyData, tokenizer: PreTrainedTokenizerBase, template: str | None) -> None:
        self.source: Source = open_source(config)
        self.template = (template or template_of(tokenizer)) if needs_template(config) else None
        settings = config.model_dump(mode="json", exclude=NOT_IN_TOKENS)
        self.parts = {
            "format": FORMAT + needs_template(config),  # a conversation's row says more since format 2
            "source": self.source.fingerprint(),
            "tokenizer": fingerprint(tokenizer),
            "template": template_fingerprint(self.template),
            "settings": {name: value for name, value in settings.items() if name not in LATER or value is not None},
        }
        self.fingerprint = hashlib.sha256(json.dumps(self.parts, sort_keys=True).encode()).hexdigest()[:32]
        self.folder = cache_folder(config) / "data" / self.fingerprint


def prepare(
    config: AnyData,
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: str | None = None,
    report: Callable[[int], None] | None = None,
) -> Documents:
    """Opens the tokenized documents of a config, and makes them first where the cache does not have them.

    A document is at most ``length`` + 1 tokens long, which is ``length`` inputs each with a next token. A longer one
    is left out, cut, or split into pieces that overlap by one token, so that each token is predicted exactly once.

    Args:
        template: the chat template, where rows go through one; the tokenizer's own by default.
        report: is called with the number of rows done so far, while documents are made.

    Raises MissingError where the source, or a chat template that is needed, is not there; DataError where a row cannot
    be used, or the folder in the cache is damaged; StorageError where the cache cannot be written.
    """
    plan = RowOrigin(config, tokenizer, template)
    encode = encoder(config, tokenizer, plan.template)
    if not plan.folder.exists():
        _build(plan, config, encode, report or (lambda _: None))
    return _open(plan).choose(config)


def prepared(config: AnyData, tokenizer: PreTrainedTokenizerBase, *, template: str | None = None) -> Documents | None:
    """The tokenized documents of a config where the cache has them. Writes nothing. Raises MissingError where the
    source is not there; DataError where the folder in the cache is damaged."""
    plan = RowOrigin(config, tokenizer, template)
    return _open(plan).choose(config) if plan.folder.exists() else None


JUST_MADE_S = 60.0
"""A folder that is younger than that may not have its lock yet."""


def _sweep(folder: Path) -> None:  # kept: an idea of its own
    """Deletes what processes that were killed left half-made: those who are at work hold a lock."""
    for left in folder.glob(".*.partial"):
        with suppress(OSError):  # somebody is at work there, or has just ended
            if time.time() - left.stat().st_mtime > JUST_MADE_S:
                lock(left, BlockingIOError()).close()
                shutil.rmtree(left, ignore_errors=True)


# --- making them -----------------------------------------------------------------------------------------------------
def _build(plan: RowOrigin, config: AnyData, encode: Encoder, report: Callable[[int], None]) -> None:
    unnamed = plan.folder.with_name(f".{plan.fingerprint}.{secrets.token_hex(4)}.partial")
    counts, held = Counts(), None
    try:
        _sweep(plan.folder.parent)
        unnamed.mkdir(parents=True)
        held = lock(unnamed, BlockingIOError())
        path = unnamed / "documents.arrow"
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
            for documents in encode_all(plan.source, config, encode, counts):
                writer.write_batch(_record_batch(documents))
                report(counts.rows)
        manifest = {
            "format": FORMAT,
            "fingerprint": plan.fingerprint,
            "parts": plan.parts,
            "counts": asdict(counts),
            "size_bytes": path.stat().st_size,
            "crc32": crc32(path),
            "versions": {name: version(name) for name in ("stillroom", "tokenizers", "transformers", "pyarrow")},
        }
        (unnamed / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        (unnamed / ".lock").unlink()
        sync_tree(unnamed)
        try:
            unnamed.rename(plan.folder)
        except OSError:
            if not plan.folder.is_dir():  # else another process was quicker, and its folder is the same
                raise
    except OSError as error:
        if isinstance(error, StillroomError):
            raise
        raise StorageError(
            "the tokenized data cannot be written",
            {"folder": plan.folder, "reason": error.strerror or error},
            why="They are kept on disk, so that they are made only once and need no memory.",
            fix="Make room there, or name another folder by data.cache or $STILLROOM_CACHE.",
        ) from None
    finally:
        shutil.rmtree(unnamed, ignore_errors=True)
        if held is not None:
            held.close()


def encode_all(source: Source, config: AnyData, encode: Encoder, counts: Counts) -> Iterator[list[tuple[int, Encoded]]]:
    """Lists of (row number, document), as they are kept; counts as it goes. Raises DataError where a row cannot be
    used, or no document is left."""
    source_rows = islice(source.rows(), config.max_documents)
    while rows := list(islice(source_rows, ROWS_AT_ONCE)):
        first, kept = counts.rows, list[tuple[int, Encoded]]()
        for row, document in enumerate(encode(rows, lambda index, first=first: source.name(first + index)), first):
            counts.rows += 1
            kept += [(row, piece) for piece in _fit(document, config, counts, partial(source.name, row))]
        for _, document in kept:
            counts.documents += 1
            counts.tokens += len(document.tokens)
            counts.tokens_learnt += int(document.target_mask[1:].sum())
        yield kept
    if not counts.documents:
        dropped = {name: number for name, number in asdict(counts).items() if name.startswith("dropped") and number}
        raise DataError(
            f"no document of {config.path} is left to learn from",
            {"rows read": counts.rows, **dropped},
            why="Every row was left out by the settings.",
            fix="Raise data.length, set data.overlong=cut, or check which tokens data.keep says to learn.",
        )


def _fit(document: Encoded, config: AnyData, counts: Counts, name: Callable[[], str]) -> list[Encoded]:
    """The document as it is kept: itself, cut, in pieces, or not at all."""
    if not document.target_mask[1:].any():
        if config.empty == "refuse":
            raise DataError(
                f"{name()} has nothing to learn",
                {"tokens": len(document.tokens), "tokens to learn": 0},
                why="An empty row is more often a fault in the data than meant.",
                fix="Mend or delete the row, or set data.empty=drop to leave out and count all such rows.",
            )
        counts.dropped_empty += 1
        return []
    tokens, target_mask, size = document.tokens, document.target_mask, config.length + 1
    if len(tokens) <= size:
        return [document]
    if config.overlong == "drop":
        counts.dropped_overlong += 1
        return []
    if config.overlong == "split":
        counts.split += 1
        starts = range(0, len(tokens) - 1, config.length)
        return [document.part(start, start + size) for start in starts]
    if not target_mask[1:size].any():
        counts.dropped_cut_away += 1
        return []
    counts.cut += 1
    return [document.part(0, size)]


def _record_batch(documents: list[tuple[int, Encoded]]) -> pa.RecordBatch:
    tokens = [document.tokens for _, document in documents]
    # Of each target mask the runs of True as int32 [2 * runs]: start, end (excluded), start, end …
    edges = [np.diff(document.target_mask, prepend=False, append=False) for _, document in documents]
    runs = [np.flatnonzero(edge).astype(np.int32) for edge in edges]
    rows = pa.array([row for row, _ in documents], type=pa.int64())
    weights = pa.array([document.weight for _, document in documents], type=pa.float32())
    lists = []
    for arrays in (tokens, runs):
        offsets = pa.array(np.cumsum([0, *map(len, arrays)], dtype=np.int64))
        values = np.concatenate([np.empty(0, dtype=np.int32), *arrays])
        lists.append(pa.LargeListArray.from_arrays(offsets, pa.array(values, type=pa.int32())))
    return pa.record_batch([*lists, rows, weights], schema=SCHEMA)


# --- opening them ----------------------------------------------------------------------------------------------------
def _open(plan: RowOrigin) -> Documents:
    path = plan.folder / "documents.arrow"
    try:
        manifest = parse_json((plan.folder / "manifest.json").read_bytes())
        if manifest["fingerprint"] != plan.fingerprint:
            raise _damaged(plan.folder, "fingerprint", manifest["fingerprint"], plan.fingerprint)
        if path.stat().st_size != manifest["size_bytes"]:
            raise _damaged(plan.folder, "size in bytes", path.stat().st_size, manifest["size_bytes"])
        if crc32(path) != manifest["crc32"]:
            raise _damaged(plan.folder, "checksum", crc32(path), manifest["crc32"])
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        counts = Counts(**manifest["counts"])
        if table.schema != SCHEMA or len(table) != counts.documents:
            raise _damaged(plan.folder, "documents", len(table), counts.documents)
    except StillroomError:
        raise
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise _damaged(plan.folder, "reading it", f"{type(error).__name__}: {error}", "no error") from None
    return Documents(table, counts, plan.fingerprint, plan.source.name)


def _damaged(folder: Path, what: str, found: object, expected: object) -> DataError:
    return DataError(
        f"the tokenized data in {folder} are damaged",
        {f"{what} found": found, "expected": expected},
        why="Something has changed the files since they were written.",
        fix=f"Delete the folder {folder}; it is made anew from the source.",
    )


class CountedDocuments(Documents):
    """The documents that ``prepare`` would give of the same settings, read and tokenized anew and kept in no cache.

    Its arguments are those of ``prepare``, and so are its errors.
    """

    def __init__(
        self,
        config: AnyData,
        tokenizer: PreTrainedTokenizerBase,
        *,
        template: str | None = None,
        report: Callable[[int], None] = lambda _: None,
    ) -> None:
        origin, counts = RowOrigin(config, tokenizer, template), Counts()
        encode = encoder(config, tokenizer, origin.template, count_bytes=True)
        self._num_bytes: list[np.ndarray | None] = []
        batches = []
        for documents in encode_all(origin.source, config, encode, counts):
            batches.append(_record_batch(documents))
            self._num_bytes += [document.num_bytes for _, document in documents]
            report(counts.rows)
        super().__init__(pa.Table.from_batches(batches, SCHEMA), counts, origin.fingerprint, origin.source.name)
        self.choose(config)

    def num_bytes(self, index: int) -> np.ndarray | None:
        """The bytes of the text that each of its tokens stands for, int32 [n]; None where the tokenizer drops some."""
        return self._num_bytes[self.place(index)]

    def first(self, index: int) -> int:
        """The place of a document's first token in its row, of which a long one may have been split into several."""
        before = int(np.searchsorted(self.source_rows, self.source_rows[index]))
        return int((self.lengths[before:index] - 1).sum())

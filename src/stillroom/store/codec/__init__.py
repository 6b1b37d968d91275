"""The codec of a store's signals: it turns the whole numbers of each position into few bytes, and back.

A row is one message of a range coder; a shard's tables hold every frequency, so that each row is read by itself. The
rows hold no length: a reader knows how many positions there are, and which token the teacher read at each. Position by
position:

1. the side numbers, each under the frequencies that belong to the one before;
2. the number of entries and of samples, as their distance from the most;
3. the levels: the first, then steps, under frequencies chosen by the entries left, the level and the last step;
4. the exact ids, the most likely first. The candidates are the next token of the row and the ids of two lists of the
   tables: those that are frequent after the token, and those beside the next token; after the first id, also beside
   that. Their scores add up (logs of how much likelier each list makes an id), and their distance from the best puts
   them into 31 classes. An id is its class and its place there, under frequencies by slot; it is then taken out. An id
   that is no candidate is its rank among all;
5. the samples, a set, so in the order of classes and places, which costs log2(n!) bits less than a sequence; and how
   often each was sampled.

Bytes of the tables: four uint32, little-endian (entries of lists, bytes of lists, most entries, most samples); the
lists, one message of the coder; a zlib stream of the ids' log counts (uint8 [v]), the classes' log weights (uint8 [9,
33]) and the frequencies (uint16 [contexts, 93], all low bytes before all high ones), each context's summing to 2**14.
All arithmetic is on integers, so that the bytes are the same everywhere.

The other modules here need numba, and are imported when something is encoded or decoded.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from stillroom.store.quantize import LogProbCodes

if TYPE_CHECKING:
    from stillroom.store.codec.model import Tables

LIMIT = 1 << 24
BLOCK_BYTES = 1 << 22
"""The size of the buffer into which rows are encoded together, unless one row needs more."""


class Codec:
    """The tables of one shard, by which its rows are written and read."""

    def __init__(self, tables: "Tables") -> None:
        self._tables = tables

    @classmethod
    def train(cls, tokens: np.ndarray, codes: LogProbCodes, vocab_size: int) -> "Codec":
        """Learns the tables of a shard from its data.

        Args:
            tokens: [p] int32, the token that the model read at each position, a document's positions in order.
            codes: the codes of these positions.
            vocab_size: at most 2**24.
        """
        from stillroom.store.codec.tables import learn_tables

        _check(tokens, codes, vocab_size)
        return cls(learn_tables(tokens, codes, vocab_size))

    def to_bytes(self) -> bytes:
        """The tables, compact."""
        from stillroom.store.codec.tables import tables_to_bytes

        return tables_to_bytes(self._tables)

    @classmethod
    def from_bytes(cls, data: bytes, vocab_size: int, num_side: int) -> "Codec":
        """Reads the tables; ``num_side`` is the number of side columns. ValueError where they are damaged."""
        from stillroom.store.codec.tables import tables_from_bytes

        if not 0 < vocab_size <= LIMIT or num_side < 0:
            raise ValueError(f"there are no tables for {vocab_size} columns and {num_side} side numbers")
        return cls(tables_from_bytes(bytes(data), vocab_size, num_side))

    def encode(self, tokens: np.ndarray, codes: LogProbCodes, offsets: np.ndarray) -> list[bytes]:
        """Writes rows of positions ``offsets[i]`` to ``offsets[i + 1]`` (int64, rising from 0 to p) as bytes each."""
        from stillroom.store.codec.coder import ENCODE
        from stillroom.store.codec.tables import make_scratch, run

        _check(tokens, codes, len(self._tables.ranked))
        offsets = _checked_offsets(offsets, tokens)
        if len(offsets) - 1 and offsets[-1] != len(codes):
            raise ValueError(f"the rows end at position {offsets[-1]}, the levels at {len(codes)}")
        most = 16 * (codes.counts.astype(np.int64) + codes.sample_counts) + 8 * (2 + codes.side.shape[1])
        needs = np.concatenate([[0], np.cumsum(most)])[offsets] + 16 * np.arange(len(offsets))  # bytes at the most
        scratch, rows, first = make_scratch(len(self._tables.ranked)), [], 0
        while first < len(offsets) - 1:
            stop = max(first + 1, int(np.searchsorted(needs, needs[first] + BLOCK_BYTES, side="right")) - 1)
            start, end = int(offsets[first]), int(offsets[stop])
            buffer, bounds = np.empty(int(needs[stop] - needs[first]), np.uint8), np.zeros(stop - first + 1, np.int64)
            inner, part = offsets[first : stop + 1] - start, codes.slice(start, end)
            damaged, _ = run(ENCODE, self._tables, scratch, tokens[start:end], inner, buffer, bounds, part)
            if damaged >= 0:
                raise ValueError(f"row {first + damaged} names an id twice within a position")
            written = buffer.tobytes()
            rows += [written[a:b] for a, b in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)]
            first = stop
        return rows

    def decode(self, rows: Sequence[bytes], tokens: np.ndarray, offsets: np.ndarray) -> LogProbCodes:
        """Reads what ``encode`` wrote of the same tokens. ValueError where a row is damaged, as far as can be seen."""
        from stillroom.store.codec.coder import DECODE, NUM_BRANCHES, SIDE
        from stillroom.store.codec.tables import make_scratch, run

        offsets, size = _checked_offsets(offsets, tokens), len(self._tables.ranked)
        if len(rows) != len(offsets) - 1:
            raise ValueError(f"there are {len(rows)} rows and {len(offsets) - 1} of offsets")
        if len(tokens) and not (int(np.min(tokens)) >= 0 and int(np.max(tokens)) < size):
            raise ValueError(f"a token lies beyond the {size} columns")
        bounds = np.concatenate([[0], np.cumsum([len(row) for row in rows], dtype=np.int64)])
        buffer, room = np.frombuffer(b"".join(rows), np.uint8).copy(), np.zeros(1024, np.int32)
        num_side = (len(self._tables.numbers) - SIDE) // NUM_BRANCHES
        counts = np.zeros(len(tokens), np.int32)
        blank = LogProbCodes(counts, room, room, counts, room, room, np.zeros((len(tokens), num_side), np.int32))
        damaged, codes = run(DECODE, self._tables, make_scratch(size), tokens, offsets, buffer, bounds, blank)
        if damaged >= 0:
            raise ValueError(f"row {damaged} of the signals is damaged")
        return codes


def _checked_offsets(offsets: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    offsets = np.array(offsets, np.int64)
    if len(offsets) == 0 or offsets[0] != 0 or offsets[-1] != len(tokens) or (np.diff(offsets) < 0).any():
        raise ValueError(f"the rows' offsets must rise from 0 to {len(tokens)}")
    return offsets


def _check(tokens: np.ndarray, codes: LogProbCodes, vocab_size: int) -> None:
    """Raises ValueError unless the codes are as ``LogProbCodes`` says."""
    if not 0 < vocab_size <= LIMIT:
        raise ValueError(f"there must be 1 to {LIMIT} columns, not {vocab_size}")
    p, e, d = len(codes.counts), len(codes.ids), len(codes.sample_ids)
    sizes = (len(tokens), len(codes.sample_counts), len(codes.side), len(codes.levels), len(codes.sample_repeats))
    if sizes != (p, p, p, e, d) or codes.side.ndim != 2:
        raise ValueError(f"arrays of {p} positions, {e} entries and {d} samples have the lengths {sizes}")
    bounds = {"tokens": vocab_size, "ids": vocab_size, "sample_ids": vocab_size}
    for name, values in {"tokens": tokens, **vars(codes)}.items():
        low, high = int(name == "sample_repeats"), bounds.get(name, LIMIT)
        if values.size and not low <= int(values.min()) <= int(values.max()) < high:
            raise ValueError(f"{name} must be {low} to {high - 1}, not {values.min()} to {values.max()}")
    if codes.counts.sum() != e or codes.sample_counts.sum() != d:
        raise ValueError(f"counts of {codes.counts.sum()} and {codes.sample_counts.sum()} do not fit {e} and {d} ids")
    first = np.zeros(e, bool)
    first[(np.cumsum(codes.counts) - codes.counts)[codes.counts > 0]] = True
    if e and (np.diff(codes.levels)[~first[1:]] < 0).any():
        raise ValueError("levels fall within a position")

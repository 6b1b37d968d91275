"""The codec's tables: learnt from a shard, and as bytes. Needs numba."""

import struct
import zlib

import numpy as np

from stillroom.store.codec.candidates import (
    CLASS_SHIFT,
    CODED,
    LIST_SIZES,
    MAX_CANDIDATES,
    NUM_CLASSES,
    Scratch,
    Tables,
)
from stillroom.store.codec.lists import EIGHTHS, NUM_LIST_TABLES, code_lists, learn_lists
from stillroom.store.codec.model import NUM_BRANCHES, NUM_SLOTS, SIDE, code_rows
from stillroom.store.codec.range_coder import DECODE, ENCODE, ESCAPE, NUM_SYMBOLS, TOTAL_BITS, TRAIN
from stillroom.store.quantize import LogProbCodes

Lists = tuple[np.ndarray, np.ndarray]

HEADER = struct.Struct("<IIII")

ENTRIES_PER_BYTE = 64
"""Tables of more list entries a byte are refused, so that few bytes cannot claim much memory; zeros make up for it."""

PRICES = (20, 30)
"""Bits that an entry of either list must save to be worth its place."""

SAMPLE_ROWS, SAMPLE_SIZE, SAMPLE_PASSES = 96, 128, 3

EIGHTH_POWERS = np.array([65536, 71468, 77936, 84990, 92682, 101070, 110218, 120194], np.int64)


def log2_of(counts: np.ndarray) -> np.ndarray:
    """[v] uint8: log2(1 + count) in half octaves, rounded down from eighths."""
    values = counts.astype(np.int64) + 1
    bits = np.zeros_like(values)
    for shift in (16, 8, 4, 2, 1):
        high = values >> (bits + shift) > 0
        bits += shift * high
    return ((8 * bits + EIGHTHS[(values << 8 >> bits) & 255]) >> 2).astype(np.uint8)


def ranking(log_counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[v] int32: the ids, most frequent first and lower ids first among equals; and the rank of each id."""
    ranked = np.argsort(np.uint8(255) - log_counts, kind="stable").astype(np.int32)
    ranks = np.empty_like(ranked)
    ranks[ranked] = np.arange(len(ranked), dtype=np.int32)
    return ranked, ranks


def make_tables(log_counts, lists: Lists, log_weights: np.ndarray, most, numbers: np.ndarray) -> Tables:
    """Tables as the model wants them: ids ranked by their count, and weights 2 ** (log / 8)."""
    ranked, ranks = ranking(log_counts)
    scores, logs = log_counts.astype(np.int32) * 4, log_weights.astype(np.int64)
    weights = EIGHTH_POWERS[logs & 7] << (logs >> 3) >> 16
    return Tables(lists[0], lists[1], scores, ranks, ranked, weights, np.array(most, np.int64), numbers)


def make_scratch(num_columns: int) -> Scratch:
    """Working memory for one pass over rows."""
    each, classes, slots = MAX_CANDIDATES, NUM_CLASSES + 1, (NUM_SLOTS, NUM_CLASSES)
    scratch = Scratch(
        base=np.zeros(1, np.int32),
        where=np.full(num_columns, -1, np.int32),
        ids=np.zeros(each, np.int32),
        scores=np.zeros(each, np.int32),
        classes=np.zeros(each, np.uint32),
        places=np.zeros(each, np.int32),
        order=np.zeros(each, np.int32),
        cursors=np.zeros((classes, 4), np.int64),
        firsts=np.zeros(classes, np.int64),
        sizes=np.zeros(classes, np.int64),
        observed=np.zeros(slots, np.int64),
        expected=np.zeros(slots, np.int64),
    )
    scratch.scores[MAX_CANDIDATES - 1] = CODED
    return scratch


def cumulative(frequencies: np.ndarray) -> np.ndarray:
    """[n, 94] int32: cumulative frequencies of [n, 93]."""
    return np.pad(np.cumsum(frequencies, axis=1), ((0, 0), (1, 0))).astype(np.int32)


def frequencies_of(histogram: np.ndarray) -> np.ndarray:
    """[n, 93]: counts scaled to a sum of 2**14, at least 1 where there are any and 1 or more for the escape."""
    counts = histogram[:, :NUM_SYMBOLS].astype(np.int64)
    total = (1 << TOTAL_BITS) - 1
    scaled = np.maximum(counts * total // np.maximum(counts.sum(1, keepdims=True), 1), counts > 0)
    rows, top_indices = np.arange(len(scaled)), scaled.argmax(1)
    used = counts.any(1)
    scaled[rows[used], top_indices[used]] += total - scaled.sum(1)[used]
    scaled[:, ESCAPE] += np.where(used, 1, total + 1)
    return scaled


def learn_all_lists(tokens: np.ndarray, levels: LogProbCodes, log_counts: np.ndarray, counts: np.ndarray):
    """The lists after each token and beside each: offsets [2 v + 1] and entries."""
    size = len(counts)
    ranks = make_tables(
        log_counts, (counts, counts), np.zeros((1, 1), np.uint8), (0, 0), np.zeros((1, 1), np.int32)
    ).ranks
    ids = np.array(levels.ids, np.int32)
    starts = np.concatenate([[0], np.cumsum(levels.counts, dtype=np.int64)])
    first = np.where(levels.counts > 0, np.append(levels.ids, 0)[starts[:-1]], size)
    offsets = np.zeros(2 * size + 1, np.int64)
    entries, filled = np.empty(1024, np.int32), 0
    for kind, key in enumerate((tokens, first)):
        order = np.argsort(key, kind="stable")
        bounds = np.searchsorted(key[order], np.arange(size + 1))
        part = offsets[kind * size : (kind + 1) * size + 1]
        entries, filled = learn_lists(
            order, bounds, starts, ids, counts, ranks, LIST_SIZES[kind], PRICES[kind], part, entries, filled
        )
    return offsets, entries[:filled].copy()


def learn_tables(tokens: np.ndarray, levels: LogProbCodes, num_columns: int) -> tuple[Tables, np.ndarray, np.ndarray]:
    """Learns tables; with them the logs of counts [v] and of weights [9, 33], from which they can be made again."""
    counts = np.bincount(levels.ids, minlength=num_columns) + np.bincount(levels.draw_ids, minlength=num_columns)
    log_counts = log2_of(counts)
    lists = learn_all_lists(tokens, levels, log_counts, np.maximum(counts, 1))
    slope = np.maximum(160 - (1 << CLASS_SHIFT) * np.arange(NUM_CLASSES), 0)
    log_weights = np.tile(slope, (NUM_SLOTS, 1)).astype(np.uint8)
    rows = sample_rows(len(tokens))
    most = [int(each.max(initial=0)) for each in (levels.counts, levels.draw_counts)]
    num_contexts = SIDE + levels.side.shape[1] * NUM_BRANCHES
    histogram = np.zeros((num_contexts, NUM_SYMBOLS + 1), np.int32)
    for _ in range(SAMPLE_PASSES):
        histogram[:] = 0
        scratch = make_scratch(num_columns)
        tables = make_tables(log_counts, lists, log_weights, most, histogram)
        for first, stop in rows:
            part = levels.slice(first, stop)
            offsets = np.array([0, stop - first], np.int64)
            run(TRAIN, tables, scratch, tokens[first:stop], offsets, np.empty(0, np.uint8), np.zeros(2, np.int64), part)
        log_weights = reweighted(log_weights, scratch)
    numbers = cumulative(frequencies_of(histogram))
    return make_tables(log_counts, lists, log_weights, most, numbers), log_counts, log_weights


def sample_rows(size: int) -> list[tuple[int, int]]:
    """Stretches of positions to learn frequencies from, evenly spread."""
    if size <= SAMPLE_ROWS * SAMPLE_SIZE:
        return [(0, size)]
    firsts = [size * i // SAMPLE_ROWS for i in range(SAMPLE_ROWS)]
    return [(first, first + SAMPLE_SIZE) for first in firsts]


def reweighted(log_weights: np.ndarray, scratch: Scratch) -> np.ndarray:
    """Weights times how often each class came, over how often they said it would."""
    change = log2_of(scratch.observed * 256).astype(np.int64) - log2_of(scratch.expected >> 8).astype(np.int64)
    seen = scratch.observed + (scratch.expected >> 16) > 0
    logs = log_weights.astype(np.int64) + np.where(seen, 4 * change, 0)
    return np.clip(logs, 0, 160).astype(np.uint8)


def run(mode: int, tables: Tables, scratch: Scratch, tokens, offsets, buffer, bounds, levels: LogProbCodes):
    """Passes over rows of copies of the levels; see ``code_rows``."""
    names = ("counts", "ids", "levels", "draw_counts", "draw_ids", "draw_times", "side")
    arrays = [np.array(getattr(levels, name), np.int32) for name in names]
    tokens = np.array(tokens, np.int32)
    result = code_rows(mode, tables, scratch, tokens, offsets, buffer, bounds, *arrays)
    damaged, e, d, ids, steps, draw_ids, times = result
    found = LogProbCodes(arrays[0], ids[:e], steps[:e], arrays[3], draw_ids[:d], times[:d], arrays[6])
    return damaged, found


def tables_to_bytes(tables: Tables, log_counts: np.ndarray, log_weights: np.ndarray) -> bytes:
    """The tables as bytes; see ``codec`` for the layout."""
    lists = (tables.offsets, tables.entries)
    histogram = np.zeros((NUM_LIST_TABLES, NUM_SYMBOLS + 1), np.int32)
    code_lists(TRAIN, np.empty(0, np.uint8), histogram, LIST_SIZES, tables.ranks, tables.ranked, *lists)
    frequencies = frequencies_of(histogram)
    buffer = np.empty(64 + 6 * len(tables.offsets) + 12 * len(tables.entries), np.uint8)
    _, size = code_lists(ENCODE, buffer, cumulative(frequencies), LIST_SIZES, tables.ranks, tables.ranked, *lists)
    every = np.concatenate([frequencies, np.diff(tables.numbers, axis=1)])
    planes = [every & 255, every >> 8]
    parts = [log_counts.tobytes(), log_weights.tobytes(), *(plane.astype(np.uint8).tobytes() for plane in planes)]
    body = zlib.compress(b"".join(parts), 9)
    found = HEADER.pack(len(tables.entries), size, *tables.most.tolist()) + buffer[:size].tobytes() + body
    return found.ljust(len(tables.entries) // ENTRIES_PER_BYTE, b"\0")


def tables_from_bytes(data: bytes, num_columns: int, num_side: int) -> tuple[Tables, np.ndarray, np.ndarray]:
    """Reads what ``tables_to_bytes`` wrote. ValueError where it cannot have."""
    if len(data) < HEADER.size:
        raise ValueError("the tables are cut short")
    num_entries, size, *most = HEADER.unpack_from(data)
    num_contexts = NUM_LIST_TABLES + SIDE + num_side * NUM_BRANCHES
    sizes = [num_columns, NUM_SLOTS * NUM_CLASSES, num_contexts * NUM_SYMBOLS, num_contexts * NUM_SYMBOLS]
    log_counts, log_weights, low, high = np.split(
        inflate(data[HEADER.size + size :], sum(sizes)), np.cumsum(sizes[:-1])
    )
    every = (low.astype(np.int64) | high.astype(np.int64) << 8).reshape(num_contexts, NUM_SYMBOLS)
    if (
        (every.sum(1) != 1 << TOTAL_BITS).any()
        or log_counts.max() > 60
        or log_weights.max() > 160
        or max(most) >= 1 << 24
    ):
        raise ValueError("the tables hold impossible frequencies")
    if num_entries > min(sum(LIST_SIZES) * num_columns, ENTRIES_PER_BYTE * (len(data) + 64)):
        raise ValueError(f"the tables claim {num_entries} entries in {len(data)} bytes")
    lists = np.zeros(2 * num_columns + 1, np.int64), np.zeros(num_entries, np.int32)
    log_weights = log_weights.reshape(NUM_SLOTS, NUM_CLASSES)
    tables = make_tables(log_counts, lists, log_weights, most, cumulative(every[NUM_LIST_TABLES:]))
    buffer = np.frombuffer(data, np.uint8, size, HEADER.size).copy()
    numbers = cumulative(every[:NUM_LIST_TABLES])
    damaged, _ = code_lists(DECODE, buffer, numbers, LIST_SIZES, tables.ranks, tables.ranked, *lists)
    if damaged:
        raise ValueError("the tables' lists are damaged")
    return tables, log_counts, log_weights


def inflate(data: bytes, size: int) -> np.ndarray:
    """The zlib stream's bytes, of which there must be ``size``."""
    stream = zlib.decompressobj()
    try:
        found = stream.decompress(data, size + 1)
    except zlib.error as error:
        raise ValueError(f"the tables are damaged: {error}") from None
    if len(found) != size or not stream.eof or stream.unused_data.strip(b"\0"):
        raise ValueError(f"the tables hold {len(found)} bytes or more where {size} are due, or are cut short")
    return np.frombuffer(found, np.uint8)

"""The codec's tables: learned from a shard, and as bytes. Needs numba."""

import struct
import zlib

import numpy as np
from numba import njit

from stillroom.store.codec.coder import (
    DAMAGED,
    DECODE,
    ENCODE,
    ESCAPE,
    NUM_BRANCHES,
    NUM_SYMBOLS,
    OPTIONS,
    PLACE,
    SIDE,
    TOTAL_BITS,
    TRAIN,
    finish,
    number,
    start,
    symbol_of,
)
from stillroom.store.codec.model import (
    CLASS_SHIFT,
    CODED,
    LIST_SIZES,
    MAX_CANDIDATES,
    NUM_CLASSES,
    NUM_SLOTS,
    Scratch,
    Tables,
    code_rows,
)
from stillroom.store.quantize import LogProbCodes

HEADER = struct.Struct("<IIII")
ENTRIES_PER_BYTE = 64
"""Tables of more list entries a byte are refused, so that few bytes cannot claim much memory; zeros make up for it."""
PRICES = (20, 30)
"""Bits that an entry of either list must save to be worth its place."""
SAMPLE_ROWS, SAMPLE_SIZE, SAMPLE_PASSES = 96, 128, 3
PRIOR = 30
"""The number of entries of its general share that an id is taken to have had in each list."""
EIGHTH_POWERS = np.array([65536, 71468, 77936, 84990, 92682, 101070, 110218, 120194], np.int64)
EIGHTHS = np.array([round(8 * np.log2(1 + i / 256)) for i in range(256)], np.int64)
LENGTH, GAP, GAIN = 0, 2, 2 + 2 * 24
NUM_LIST_TABLES = GAIN + 2 * 24
MAX_GAIN = 91


@njit(**OPTIONS)
def log2_eighths(x):
    """Eight times log2 of a whole number of at least 1, rounded."""
    bits = 0
    while x >> bits > 1:
        bits += 1
    mantissa = (x << 8 >> bits) & 255
    return 8 * bits + EIGHTHS[mantissa]


@njit(**OPTIONS)
def best_of(touched, seen, general, totals, ranks, size_limit, price):
    """The ids that are worth a place, as rank * 256 + gain by rank; forgets how often they were seen."""
    kept = 0
    for token in touched:
        times = np.int64(seen[token])
        seen[token] = 0
        if times < 2:
            continue
        gain = min((log2_eighths(times) + general - log2_eighths(np.int64(totals[token]))) >> 2, MAX_GAIN)
        if gain >= 2 and times * gain >= 2 * price:
            touched[kept] = min(times * gain, (1 << 30) - 1) << 32 | np.int64(ranks[token]) << 8 | gain
            kept += 1
    best = np.sort(touched[:kept])[max(0, kept - size_limit) :]
    return np.sort(best & ((np.int64(1) << 32) - 1))


@njit(**OPTIONS)
def learn_lists(order, bounds, starts, ids, totals, ranks, ranked, size_limit, price, offsets, entries, filled):
    """Learns one list a key, from the entries of the positions ``order[bounds[key] : bounds[key + 1]]``.

    An id is worth its place if it came at least twice and the bits that it saves there, ``times * log2(how much
    likelier)``, are ``price`` at the least; a list that is too long keeps those that save most. Fills ``offsets[1:]``;
    returns the entries, grown, and how many they are.
    """
    seen = np.zeros(len(totals), np.int32)
    touched = np.empty(len(totals), np.int64)
    general = log2_eighths(np.int64(max(1, len(ids)))) - log2_eighths(np.int64(PRIOR))
    for key in range(len(bounds) - 1):
        count = 0
        for k in range(bounds[key], bounds[key + 1]):
            for e in range(starts[order[k]], starts[order[k] + 1]):
                if ids[e] == key:
                    continue
                if seen[ids[e]] == 0:
                    touched[count] = ids[e]
                    count += 1
                seen[ids[e]] += 1
        best = best_of(touched[:count], seen, general, totals, ranks, size_limit, price)
        if filled + len(best) > len(entries):
            larger = np.empty(2 * len(entries) + len(best), np.int32)
            larger[:filled] = entries[:filled]
            entries = larger
        for i in range(len(best)):
            entries[filled + i] = ranked[best[i] >> 8] | (best[i] & 255) << 24
        filled += len(best)
        offsets[key + 1] = filled
    return entries, filled


@njit(**OPTIONS)
def code_lists(mode, buffer, numbers, size_limits, ranks, ranked, offsets, entries):
    """Codes the lists: of each its length, then each entry's step in rank and its gain. True if they are damaged."""
    coder = np.zeros(6, np.int64)
    size = len(ranked)
    start(coder, buffer, mode, 0, len(buffer))
    for key in range(2 * size):
        kind = key // size
        length = number(coder, buffer, mode, numbers, LENGTH + kind, offsets[key + 1] - offsets[key])
        if mode == DECODE:
            if length > size_limits[kind] or offsets[key] + length > len(entries):
                return True, 0
            offsets[key + 1] = offsets[key] + length
        branch = symbol_of(length) >> 2
        rank = np.int64(-1)
        for k in range(offsets[key], offsets[key + 1]):
            value = np.int64(0) if mode == DECODE else np.int64(ranks[entries[k] & 0xFFFFFF])
            gap = number(coder, buffer, mode, numbers, GAP + kind * 24 + branch, value - rank - 1)
            rank += 1 + gap
            if rank >= size or coder[DAMAGED]:
                return True, 0
            context = GAIN + kind * 24 + (symbol_of(rank) >> 2)
            gain = number(coder, buffer, mode, numbers, context, np.int64(entries[k] >> 24))
            if gain > MAX_GAIN:
                return True, 0
            entries[k] = ranked[rank] | gain << 24
    finish(coder, buffer, mode)
    return coder[DAMAGED] != 0 or offsets[2 * size] != len(entries), coder[PLACE]


def log2_of(counts: np.ndarray) -> np.ndarray:
    """[v] uint8: log2(1 + count) in half octaves, rounded down from eighths."""
    values = counts.astype(np.int64) + 1
    bits = np.minimum(np.frexp(values)[1], 32).astype(np.int64) - 1
    return ((8 * bits + EIGHTHS[(values << 8 >> bits) & 255]) >> 2).astype(np.uint8)


def ranking(log_counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[v] int32: the ids, most frequent first and lower ids first among equals; and the rank of each id."""
    ranked = np.argsort(np.uint8(255) - log_counts, kind="stable").astype(np.int32)
    ranks = np.empty_like(ranked)
    ranks[ranked] = np.arange(len(ranked), dtype=np.int32)
    return ranked, ranks


def make_tables(
    log_counts, lists: tuple[np.ndarray, np.ndarray], log_weights: np.ndarray, most, numbers: np.ndarray
) -> Tables:
    """Tables as the model wants them: ids ranked by their count, and weights 2 ** (log / 8)."""
    ranked, ranks = ranking(log_counts)
    scores, logs = log_counts.astype(np.int32) * 4, log_weights.astype(np.int64)
    weights = EIGHTH_POWERS[logs & 7] << (logs >> 3) >> 16
    log_weights = np.array(log_weights, np.uint8)  # bytes that were read cannot be written, which is another type
    return Tables(*lists, scores, ranks, ranked, log_weights, weights, np.array(most, np.int64), numbers)


def make_scratch(vocab_size: int) -> Scratch:
    """Working memory for one pass over rows."""
    base, where = np.zeros(1, np.int32), np.full(vocab_size, -1, np.int32)
    ids, scores, places, order = (np.zeros(MAX_CANDIDATES, np.int32) for _ in range(4))
    scores[MAX_CANDIDATES - 1] = CODED
    cursors, firsts, sizes = (np.zeros((NUM_CLASSES + 1, *shape), np.int64) for shape in ((4,), (), ()))
    observed, expected = (np.zeros((NUM_SLOTS, NUM_CLASSES), np.int64) for _ in range(2))
    classes = np.zeros(MAX_CANDIDATES, np.uint32)
    return Scratch(base, where, ids, scores, classes, places, order, cursors, firsts, sizes, observed, expected)


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


def learn_all_lists(tokens: np.ndarray, codes: LogProbCodes, log_counts: np.ndarray, counts: np.ndarray):
    """The lists after each token and beside each: offsets [2 v + 1] and entries."""
    size = len(counts)
    ranked, ranks = ranking(log_counts)
    ids = np.array(codes.ids, np.int32)
    starts = np.concatenate([[0], np.cumsum(codes.counts, dtype=np.int64)])
    first = np.where(codes.counts > 0, np.append(codes.ids, 0)[starts[:-1]], size)
    offsets = np.zeros(2 * size + 1, np.int64)
    entries, filled = np.empty(1024, np.int32), 0
    for kind, key in enumerate((tokens, first)):
        order = np.argsort(key, kind="stable")
        bounds = np.searchsorted(key[order], np.arange(size + 1))
        part = offsets[kind * size : (kind + 1) * size + 1]
        entries, filled = learn_lists(
            order, bounds, starts, ids, counts, ranks, ranked, LIST_SIZES[kind], PRICES[kind], part, entries, filled
        )
    return offsets, entries[:filled].copy()


def learn_tables(tokens: np.ndarray, codes: LogProbCodes, vocab_size: int) -> Tables:
    """Learns the tables of a shard."""
    counts = np.bincount(codes.ids, minlength=vocab_size) + np.bincount(codes.sample_ids, minlength=vocab_size)
    log_counts = log2_of(counts)
    lists = learn_all_lists(tokens, codes, log_counts, np.maximum(counts, 1))
    slope = np.maximum(160 - (1 << CLASS_SHIFT) * np.arange(NUM_CLASSES), 0)
    log_weights = np.tile(slope, (NUM_SLOTS, 1)).astype(np.uint8)
    rows = [(0, len(tokens))]  # or tiles of them, evenly spread
    if len(tokens) > SAMPLE_ROWS * SAMPLE_SIZE:
        firsts = [len(tokens) * i // SAMPLE_ROWS for i in range(SAMPLE_ROWS)]
        rows = [(first, first + SAMPLE_SIZE) for first in firsts]
    most = [int(each.max(initial=0)) for each in (codes.counts, codes.sample_counts)]
    num_contexts = SIDE + codes.side.shape[1] * NUM_BRANCHES
    histogram = np.zeros((num_contexts, NUM_SYMBOLS + 1), np.int32)
    for _ in range(SAMPLE_PASSES):
        histogram[:] = 0
        scratch = make_scratch(vocab_size)
        tables = make_tables(log_counts, lists, log_weights, most, histogram)
        for first, stop in rows:
            part = codes.slice(first, stop)
            offsets = np.array([0, stop - first], np.int64)
            run(TRAIN, tables, scratch, tokens[first:stop], offsets, np.empty(0, np.uint8), np.zeros(2, np.int64), part)
        # weights times how often each class came, over how often they said it would
        change = log2_of(scratch.observed * 256).astype(np.int64) - log2_of(scratch.expected >> 8).astype(np.int64)
        seen = scratch.observed + (scratch.expected >> 16) > 0
        logs = log_weights.astype(np.int64) + np.where(seen, 4 * change, 0)
        log_weights = np.clip(logs, 0, 160).astype(np.uint8)
    return make_tables(log_counts, lists, log_weights, most, cumulative(frequencies_of(histogram)))


def run(mode: int, tables: Tables, scratch: Scratch, tokens, offsets, buffer, bounds, codes: LogProbCodes):
    """Passes over rows of copies of the codes; see ``code_rows``."""
    arrays = [np.array(values, np.int32) for values in vars(codes).values()]
    tokens = np.array(tokens, np.int32)
    result = code_rows(mode, tables, scratch, tokens, offsets, buffer, bounds, *arrays)
    damaged, e, d, ids, levels, sample_ids, repeats = result
    return damaged, LogProbCodes(arrays[0], ids[:e], levels[:e], arrays[3], sample_ids[:d], repeats[:d], arrays[6])


def tables_to_bytes(tables: Tables) -> bytes:
    """The tables as bytes; see the package for the layout."""
    lists = (tables.offsets, tables.entries)
    histogram = np.zeros((NUM_LIST_TABLES, NUM_SYMBOLS + 1), np.int32)
    code_lists(TRAIN, np.empty(0, np.uint8), histogram, LIST_SIZES, tables.ranks, tables.ranked, *lists)
    frequencies = frequencies_of(histogram)
    buffer = np.empty(64 + 6 * len(tables.offsets) + 12 * len(tables.entries), np.uint8)
    _, size = code_lists(ENCODE, buffer, cumulative(frequencies), LIST_SIZES, tables.ranks, tables.ranked, *lists)
    every = np.concatenate([frequencies, np.diff(tables.numbers, axis=1)])
    parts = (tables.scores >> 2, tables.log_weights, every & 255, every >> 8)
    body = zlib.compress(b"".join(part.astype(np.uint8).tobytes() for part in parts), 9)
    found = HEADER.pack(len(tables.entries), size, *tables.most.tolist()) + buffer[:size].tobytes() + body
    return found.ljust(len(tables.entries) // ENTRIES_PER_BYTE, b"\0")


def tables_from_bytes(data: bytes, vocab_size: int, num_side: int) -> Tables:
    """Reads what ``tables_to_bytes`` wrote. ValueError where it cannot have."""
    if len(data) < HEADER.size:
        raise ValueError("the tables are cut short")
    num_entries, size, *most = HEADER.unpack_from(data)
    num_contexts = NUM_LIST_TABLES + SIDE + num_side * NUM_BRANCHES
    sizes = [vocab_size, NUM_SLOTS * NUM_CLASSES, num_contexts * NUM_SYMBOLS, num_contexts * NUM_SYMBOLS]
    stream = zlib.decompressobj()
    try:
        inflated = stream.decompress(data[HEADER.size + size :], sum(sizes) + 1)
    except zlib.error as error:
        raise ValueError(f"the tables are damaged: {error}") from None
    if len(inflated) != sum(sizes) or not stream.eof or stream.unused_data.strip(b"\0"):
        raise ValueError(f"the tables hold {len(inflated)} bytes or more where {sum(sizes)} are due, or are cut short")
    log_counts, log_weights, low, high = np.split(np.frombuffer(inflated, np.uint8), np.cumsum(sizes[:-1]))
    every = (low.astype(np.int64) | high.astype(np.int64) << 8).reshape(num_contexts, NUM_SYMBOLS)
    impossible = log_counts.max() > 60 or log_weights.max() > 160 or max(most) >= 1 << 24
    if impossible or (every.sum(1) != 1 << TOTAL_BITS).any():
        raise ValueError("the tables hold impossible frequencies")
    if num_entries > min(sum(LIST_SIZES) * vocab_size, ENTRIES_PER_BYTE * (len(data) + 64)):
        raise ValueError(f"the tables claim {num_entries} entries in {len(data)} bytes")
    lists = np.zeros(2 * vocab_size + 1, np.int64), np.zeros(num_entries, np.int32)
    log_weights = log_weights.reshape(NUM_SLOTS, NUM_CLASSES)
    tables = make_tables(log_counts, lists, log_weights, most, cumulative(every[NUM_LIST_TABLES:]))
    buffer = np.frombuffer(data, np.uint8, size, HEADER.size).copy()
    numbers = cumulative(every[:NUM_LIST_TABLES])
    damaged, _ = code_lists(DECODE, buffer, numbers, LIST_SIZES, tables.ranks, tables.ranked, *lists)
    if damaged:
        raise ValueError("the tables' lists are damaged")
    return tables

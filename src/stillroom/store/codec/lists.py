"""The lists of the codec: what the teacher tends to say after a token, learnt and as bytes. Needs numba."""

import numpy as np
from numba import njit

from stillroom.store.codec.range_coder import DAMAGED, DECODE, OPTIONS, PLACE, finish, number, start, symbol_of

PRIOR = 30
"""How many entries of its general share an id is taken to have had in each list."""

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
def learn_lists(order, bounds, starts, ids, totals, ranks, size_limit, price, offsets, entries, filled):
    """Learns one list a key, from the entries of the positions ``order[bounds[key] : bounds[key + 1]]``.

    An id is worth its place if it came at least twice and the bits that it saves there, ``times * log2(how much
    likelier)``, are ``price`` at the least; a list that is too long keeps those that save most. Fills ``offsets[1:]``;
    returns the entries, grown, and how many they are.
    """
    seen = np.zeros(len(totals), np.int32)
    touched = np.empty(len(totals), np.int64)
    general = log2_eighths(np.int64(max(1, len(ids)))) - log2_eighths(np.int64(PRIOR))
    by_rank = np.empty(len(totals), np.int32)
    for v in range(len(totals)):
        by_rank[ranks[v]] = v
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
            entries[filled + i] = by_rank[best[i] >> 8] | (best[i] & 255) << 24
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

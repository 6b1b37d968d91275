"""Rows: which documents share a row of a batch. Planning only, on lengths; deterministic."""

import hashlib
from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np
import torch

OPEN_ROWS = 64
"""How many rows wait for a document that fits, at any one time."""


@dataclass(frozen=True)
class Rows:
    """The documents of each row. Row r holds ``documents[offsets[r]:offsets[r + 1]]``, in that order."""

    offsets: np.ndarray
    """int64, shape [rows + 1]."""
    documents: np.ndarray
    """int64, shape [documents]: the number of each document."""
    num_positions: np.ndarray
    """int64, shape [rows]: the input positions of each row, padding not counted."""

    def __len__(self) -> int:
        return len(self.num_positions)

    def __getitem__(self, row: int) -> np.ndarray:
        return self.documents[self.offsets[row] : self.offsets[row + 1]]


def epoch_order(num: int, shuffle: bool, seed: int, epoch: int) -> np.ndarray:
    """The order of ``num`` documents in an epoch, int64 [num]: as they come, or a permutation by (seed, epoch)."""
    if not shuffle:
        return np.arange(num, dtype=np.int64)
    digest = hashlib.sha256(f"order {seed} {epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.randperm(num, generator=generator).numpy()


def plan_rows(lengths: np.ndarray, length: int, pack: bool, order: np.ndarray) -> Rows:
    """Puts each document of ``order`` into exactly one row of at most ``length`` input positions.

    A document of n tokens takes n - 1 positions, since its last token is only predicted. With ``pack``, each goes
    into the fullest open row that has room for it (best fit), else into a new row; at most 64 rows stay open, and the
    fullest is closed when there are more. Without, each has a row of its own. Rows come in the order of their begin.

    Raises:
        ValueError: a document has no position, or more than ``length``.
    """
    needs = np.asarray(lengths, dtype=np.int64)[order] - 1
    if len(needs) and (needs.min() < 1 or needs.max() > length):
        raise ValueError(f"documents take {needs.min()} to {needs.max()} positions; a row holds 1 to {length}")
    if not pack:
        return Rows(np.arange(len(order) + 1), np.asarray(order, dtype=np.int64), needs)
    row_of = _best_fit(needs.tolist(), length)
    by_row = np.argsort(row_of, kind="stable")
    num_rows = int(row_of.max(initial=-1)) + 1
    offsets = np.concatenate(([0], np.cumsum(np.bincount(row_of, minlength=num_rows)))).astype(np.int64)
    num_positions = np.bincount(row_of, weights=needs, minlength=num_rows).astype(np.int64)
    return Rows(offsets, np.asarray(order, dtype=np.int64)[by_row], num_positions)


def _best_fit(needs: list[int], length: int) -> np.ndarray:
    """The row of each document, int64. ``waiting`` is sorted: (room left, row), fullest first."""
    waiting: list[tuple[int, int]] = []
    row_of = np.empty(len(needs), dtype=np.int64)
    num_rows = 0
    for index, need in enumerate(needs):
        at = bisect_left(waiting, (need, -1))
        if at < len(waiting):
            room, row = waiting.pop(at)
        else:
            room, row = length, num_rows
            num_rows += 1
        row_of[index] = row
        if room > need:
            insort(waiting, (room - need, row))
            if len(waiting) > OPEN_ROWS:
                waiting.pop(0)
    return row_of

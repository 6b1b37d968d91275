"""Levels: what is stored of each position, as whole numbers."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Levels:
    """What is stored of ``p`` positions, as whole numbers below 2**24 (all int32)."""

    counts: np.ndarray
    """[p] the number of exact entries of each position."""
    ids: np.ndarray
    """[e] their token ids, likeliest first within a position, distinct."""
    levels: np.ndarray
    """[e] their -log p in steps of the grid, at least 0, never falling within a position."""
    draw_counts: np.ndarray
    """[p] the number of distinct drawn ids of each position."""
    draw_ids: np.ndarray
    """[d] the drawn ids, distinct within a position and not among its exact ids; their order has no meaning."""
    draw_times: np.ndarray
    """[d] how often each was drawn, at least 1."""
    side: np.ndarray
    """[p, s] further numbers of each position, at least 0."""

    def __len__(self) -> int:
        """The number of positions."""
        return len(self.counts)

    @staticmethod
    def concatenate(parts: Sequence["Levels"]) -> "Levels":
        """The positions of all the parts in turn: at least one part, all with as many side columns."""
        names = Levels.__dataclass_fields__
        return Levels(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})

    def slice(self, start: int, stop: int) -> "Levels":
        """Positions ``start`` to ``stop`` (excluded), with ``0 <= start <= stop <= p``."""
        entries = slice(int(self.counts[:start].sum()), int(self.counts[:stop].sum()))
        draws = slice(int(self.draw_counts[:start].sum()), int(self.draw_counts[:stop].sum()))
        return Levels(
            counts=self.counts[start:stop],
            ids=self.ids[entries],
            levels=self.levels[entries],
            draw_counts=self.draw_counts[start:stop],
            draw_ids=self.draw_ids[draws],
            draw_times=self.draw_times[draws],
            side=self.side[start:stop],
        )

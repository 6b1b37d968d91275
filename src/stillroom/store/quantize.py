"""Levels: what is stored of each position, as whole numbers."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from stillroom.kernels.selection import Selection
from stillroom.signals import Sparse, tempered
from stillroom.store.config import SAMPLED, HeadAndSample, QuantisedSignal, Sampled, known_temperatures, side_columns


@dataclass(frozen=True)
class LogProbCodes:
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
    def concatenate(parts: Sequence["LogProbCodes"]) -> "LogProbCodes":
        """The positions of all the parts in turn: at least one part, all with as many side columns."""
        names = LogProbCodes.__dataclass_fields__
        return LogProbCodes(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})

    def slice(self, start: int, stop: int) -> "LogProbCodes":
        """Positions ``start`` to ``stop`` (excluded), with ``0 <= start <= stop <= p``."""
        entries = slice(int(self.counts[:start].sum()), int(self.counts[:stop].sum()))
        draws = slice(int(self.draw_counts[:start].sum()), int(self.draw_counts[:stop].sum()))
        return LogProbCodes(
            counts=self.counts[start:stop],
            ids=self.ids[entries],
            levels=self.levels[entries],
            draw_counts=self.draw_counts[start:stop],
            draw_ids=self.draw_ids[draws],
            draw_times=self.draw_times[draws],
            side=self.side[start:stop],
        )


LABEL_STEP = 0.01
"""Nats between two levels of the label's log-probability."""

REST_STEP = 0.01
"""Nats between two levels of log(r / (1 − r)), r being the mass left out."""

LOWEST_REST = -16.64
"""What level 1 stands for: a mass of 2^−24, which is as little as float32 probabilities tell from none."""

HIGHEST_REST = 3329
"""The highest level of the mass left out, at which 2^−24 is kept."""

ENTROPY_STEP = 1 / 64
"""Nats between two levels of the entropy."""

HIGHEST = 2**20
"""The highest level: less likely than that is as good as impossible."""


def num_uniforms(signal: QuantisedSignal) -> int:
    """How many uniform random numbers a position takes: those of its draws first, then those of its rounding: of the
    entries, of what a draw weighs, and of the entropy."""
    if isinstance(signal, Sampled):
        return signal.draws + 1
    return signal.head + 3 if isinstance(signal, HeadAndSample) else 0


def quantize(selection: Selection, signal: QuantisedSignal, uniforms: np.ndarray) -> tuple[LogProbCodes, float]:
    """What is stored of a selection, and what storing it cost: Σ over positions of the (generalised) Kullback-Leibler
    divergence in nats between the entries as they were and as they will be read, at the worst temperature.

    Args:
        uniforms: float32 [n, num_uniforms(signal)], in [0, 1).
    """
    log_probs, ids = selection.log_probs.double().cpu().numpy(), selection.ids.cpu().numpy()
    there = np.isfinite(log_probs)
    step = signal.step
    exact = np.where(there, -log_probs, 0.0) / step
    if isinstance(signal, HeadAndSample):
        levels = _round_at_random(exact, step, uniforms[:, 1 : 1 + exact.shape[1]])
        order = np.argsort(np.where(there, levels, HIGHEST + 1), axis=1, kind="stable")
        levels, ids, there, log_probs = (np.take_along_axis(x, order, 1) for x in (levels, ids, there, log_probs))
    else:
        levels = np.rint(exact).clip(0, HIGHEST).astype(np.int32)
    draw_counts, draw_ids, draw_times = _times(selection)
    side = [_side(name, selection, signal, uniforms) for name in side_columns(signal)]
    if signal.kind in SAMPLED:
        weights = np.where(there, np.exp(levels * -step), 0)
        nats = _self_information(selection, np.where(there, log_probs, 0), weights, log_unit_of(side[0], signal))
        side[1] = np.floor(nats / ENTROPY_STEP + uniforms[:, -1]).clip(0, HIGHEST - 1)
    stored = LogProbCodes(
        counts=there.sum(1, dtype=np.int32),
        ids=ids[there].astype(np.int32),
        levels=levels[there],
        draw_counts=draw_counts,
        draw_ids=draw_ids,
        draw_times=draw_times,
        side=np.stack(side, 1).astype(np.int32) if side else np.zeros((len(ids), 0), np.int32),
    )
    if signal.kind in SAMPLED:
        return stored, _cost_of_sample(selection, log_probs, levels, there, stored, signal)
    return stored, _cost(selection, log_probs, stored, signal)


def _round_at_random(exact: np.ndarray, step: float, uniforms: np.ndarray) -> np.ndarray:
    """Levels next to the exact ones whose *probabilities* are right on average."""
    lower = np.floor(exact)
    share = -np.expm1(-step * (exact - lower)) / -np.expm1(-step)
    return (lower + (uniforms < share)).clip(0, HIGHEST).astype(np.int32)


def _times(selection: Selection) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of draws with repetitions: the number of different ids of each position, the ids, and how often each came."""
    if selection.draws is None:
        none = np.zeros(0, np.int32)
        return np.zeros(len(selection.ids), np.int32), none, none
    draws = np.sort(selection.draws.cpu().numpy(), axis=1)
    first = (draws >= 0) & np.concatenate([np.ones((len(draws), 1), bool), draws[:, 1:] != draws[:, :-1]], 1)
    flat, starts = draws[draws >= 0], first[draws >= 0]
    times = np.diff(np.flatnonzero(starts), append=len(flat))
    return first.sum(1, dtype=np.int32), flat[starts].astype(np.int32), times.astype(np.int32)


def _self_information(
    selection: Selection, log_probs: np.ndarray, weights: np.ndarray, log_unit: np.ndarray
) -> np.ndarray:
    """``−Σ w log t`` over the entries with the weights that will be read, whose mean is the entropy."""
    assert selection.draw_log_probs is not None
    of_draws = np.exp(log_unit) * selection.draw_log_probs.double().cpu().numpy().sum(1)
    return -(weights * log_probs).sum(1) - of_draws


def _base(signal: QuantisedSignal) -> float:
    """The log of the weight of a draw whose level is 0."""
    if isinstance(signal, Sampled):
        return -float(np.log(signal.draws))
    assert isinstance(signal, HeadAndSample)
    return float(np.log(signal.least)) if signal.least else 0.0


def _side(name: str, selection: Selection, signal: QuantisedSignal, uniforms: np.ndarray) -> np.ndarray:
    if name == "unit":
        assert selection.log_unit is not None
        log_unit = selection.log_unit.double().cpu().numpy()
        if isinstance(signal, Sampled):
            return np.zeros(len(log_unit), np.int32)
        assert isinstance(signal, HeadAndSample)
        if not signal.least:  # levels count downwards from a weight of 1
            return _round_at_random(-log_unit / signal.step, signal.step, uniforms[:, -2])
        above = (log_unit - _base(signal)).clip(min=0) / signal.step  # and else upwards from the least weight
        upper = np.ceil(above - 1e-9)
        return (upper - _round_at_random(upper - above, signal.step, uniforms[:, -2])).astype(np.int32)
    if name == "entropy":
        if selection.entropy is None:
            return np.zeros(len(selection.ids), np.int32)  # of a sample it is made of the weights
        return _finely(selection.entropy, ENTROPY_STEP)
    if name == "label":
        assert selection.label_log_probs is not None
        return _finely(-selection.label_log_probs, LABEL_STEP)
    return _rest_level(selection.log_rests[float(name.removeprefix("rest@"))].double().cpu().numpy())


def _rest_level(log_rest: np.ndarray) -> np.ndarray:
    log_rest = np.minimum(log_rest, 0)
    with np.errstate(divide="ignore"):
        log_odds = log_rest - np.log(-np.expm1(log_rest))
    level = 1 + np.rint((log_odds - LOWEST_REST) / REST_STEP).clip(0, HIGHEST_REST - 1)
    return np.where(np.isneginf(log_rest), 0, level).astype(np.int32)


def _log_rest_of(level: np.ndarray) -> np.ndarray:
    log_odds = LOWEST_REST + (level - 1) * REST_STEP
    return np.where(level, -np.logaddexp(0, -log_odds), -np.inf)


def _finely(values: torch.Tensor, step: float) -> np.ndarray:
    return np.rint(values.double().cpu().numpy() / step).clip(0, HIGHEST - 1).astype(np.int32)


def _cost(selection: Selection, log_probs: np.ndarray, stored: LogProbCodes, signal: QuantisedSignal) -> float:
    """Σ t (log t − log t̂) − t + t̂ over entries and bucket, of all positions, each at the temperature, of those that are
    stored, where it is the most."""
    read, log_probs = to_sparse(stored, signal), np.where(np.isfinite(log_probs), log_probs, -np.inf)
    costs = [_cost_at(t, log_probs, selection.log_rests[t], read) for t in known_temperatures(signal)]
    return float(np.max(costs, axis=0).sum())


def _cost_of_sample(
    selection: Selection,
    log_probs: np.ndarray,
    levels: np.ndarray,
    there: np.ndarray,
    stored: LogProbCodes,
    signal: QuantisedSignal,
) -> float:
    """The same sum over the exact entries, and over the draws by what they weigh."""
    assert selection.log_unit is not None
    of_entries = _divergence(log_probs[there], levels[there] * -signal.step)
    times = np.add.reduceat(np.append(stored.draw_times, 0), np.cumsum(stored.draw_counts) - stored.draw_counts)
    times = np.where(stored.draw_counts > 0, times, 0)
    unit = selection.log_unit.double().cpu().numpy()
    of_draws = times * _divergence(unit, log_unit_of(stored.side[:, 0], signal))
    return float(of_entries.sum() + of_draws.sum())


def _cost_at(temperature: float, log_probs: np.ndarray, log_rest: torch.Tensor, read: Sparse) -> np.ndarray:
    """Of each position of a truncated signal, float64 [n]."""
    log_rest = log_rest.double().cpu()
    if temperature != 1.0:
        log_probs = tempered(torch.from_numpy(log_probs), log_rest, temperature).numpy()
    targets, rest = read.log_targets(temperature)
    return _cost_of_entries(log_probs, targets) + _divergence(log_rest.numpy(), rest.double().numpy())


def _cost_of_entries(log_probs: np.ndarray, log_read: torch.Tensor) -> np.ndarray:
    """Of each position's exact entries, float64 [n]; they are the first of those that are read."""
    same = np.full(log_probs.shape, -np.inf)
    width = min(log_probs.shape[1], log_read.shape[1])
    same[:, :width] = log_read[:, :width].double().numpy()
    return _divergence(log_probs, np.where(np.isfinite(log_probs), same, -np.inf)).sum(1)


def _divergence(log_t: np.ndarray, log_read: np.ndarray) -> np.ndarray:
    t = np.exp(log_t)
    gap = np.where(t > 0, np.where(t > 0, log_t, 0) - np.where(np.isfinite(log_read), log_read, -700.0), 0)
    return t * gap - t + np.exp(log_read)


def log_unit_of(level: np.ndarray, signal: QuantisedSignal) -> np.ndarray:
    """log of what a draw weighs, from the side column "unit"."""
    assert isinstance(signal, Sampled | HeadAndSample)
    downwards = isinstance(signal, HeadAndSample) and not signal.least
    return _base(signal) + (-level if downwards else level) * signal.step


def to_sparse(stored: LogProbCodes, signal: QuantisedSignal, num_columns: int | None = None) -> Sparse:
    """The signal that was stored, as float32 tensors on the CPU."""
    names, n = side_columns(signal), len(stored)
    draw_counts = stored.draw_counts
    totals = stored.counts + draw_counts
    width = max(1, int(totals.max(initial=1)))
    ids, log_probs = np.zeros((n, width), np.int64), np.full((n, width), -np.inf, np.float32)
    _fill(ids, stored.counts, 0, stored.ids)
    _fill(log_probs, stored.counts, 0, (stored.levels * -signal.step).astype(np.float32))
    if len(stored.draw_ids):
        weights = np.log(stored.draw_times) + np.repeat(log_unit_of(stored.side[:, 0], signal), draw_counts)
        _fill(ids, draw_counts, stored.counts, stored.draw_ids)
        _fill(log_probs, draw_counts, stored.counts, weights.astype(np.float32))
    ids = np.where(np.isneginf(log_probs), ids[:, :1], ids)

    def column(name: str, size: float) -> torch.Tensor | None:
        return (
            torch.from_numpy((stored.side[:, names.index(name)] * size).astype(np.float32)) if name in names else None
        )

    label = column("label", -LABEL_STEP)
    rests = {}
    for temperature in known_temperatures(signal):
        level = stored.side[:, names.index(f"rest@{temperature}")]
        rests[temperature] = torch.from_numpy(_log_rest_of(level).astype(np.float32))
    return Sparse(
        ids=torch.from_numpy(ids),
        log_probs=torch.from_numpy(log_probs),
        log_rests=rests,
        entropy=column("entropy", ENTROPY_STEP),
        label_log_probs=label,
        sampled=signal.kind in SAMPLED,
        vocab_size=num_columns,
    )


def _fill(table: np.ndarray, counts: np.ndarray, start: np.ndarray | int, values: np.ndarray) -> None:
    """Writes each row's ``counts`` values into it, from column ``start`` on."""
    starts = np.broadcast_to(np.asarray(start, np.int64), counts.shape)
    ends = np.cumsum(counts, dtype=np.int64)
    place = np.arange(len(values)) - np.repeat(ends - counts, counts)
    table[np.repeat(np.arange(len(counts)), counts), place + np.repeat(starts, counts)] = values

"""The stored form of each position: log-probabilities as whole numbers, hidden states as bytes; and both back.

A row's hidden states are one block a layer, in the order of a model. ``int8``: the scale of each position, float32,
then whole numbers, ``[kept, width]``; a state is number · scale, and scale = max |state| / 127. ``bfloat16``: the
states, ``[kept, width]``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from stillroom.kernels.selection import Selection
from stillroom.layers import Layer
from stillroom.signals import Sparse, tempered
from stillroom.store.config import (
    SAMPLED,
    HeadAndSample,
    HiddenStatesConfig,
    QuantizedSignal,
    Sampled,
    known_temperatures,
    side_columns,
)


@dataclass(frozen=True)
class LogProbCodes:
    """The stored numbers of ``p`` positions, whole and below 2**24 (all int32)."""

    counts: np.ndarray
    """[p] the number of exact entries of each position."""
    ids: np.ndarray
    """[e] their token ids, the most likely first within a position, distinct."""
    levels: np.ndarray
    """[e] their -log p in steps of the grid, at least 0, never falling within a position."""
    sample_counts: np.ndarray
    """[p] the number of distinct sampled ids of each position."""
    sample_ids: np.ndarray
    """[d] the sampled ids, distinct within a position and not among its exact ids; their order has no meaning."""
    sample_repeats: np.ndarray
    """[d] how often each was sampled, at least 1."""
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
        entries, samples = (
            slice(int(counts[:start].sum()), int(counts[:stop].sum())) for counts in (self.counts, self.sample_counts)
        )
        places = {"ids": entries, "levels": entries, "sample_ids": samples, "sample_repeats": samples}
        return LogProbCodes(**{k: values[places.get(k, slice(start, stop))] for k, values in vars(self).items()})


LABEL_STEP = 0.01
"""Nats between two levels of the label's log-probability."""
ENTROPY_STEP = 1 / 64
"""Nats between two levels of the entropy."""
RESIDUAL_STEP = 0.01
"""Nats between two levels of log(r / (1 − r)), r being the residual mass."""
MIN_RESIDUAL_LOG_ODDS = -16.64
"""The log-odds of level 1, a mass of 2^−24, which is as little as float32 probabilities tell from none."""
MAX_RESIDUAL_LEVEL = 3329
"""The highest level of the residual mass, at which 2^−24 is kept."""
MAX_LEVEL = 2**20
"""The highest level: less likely than that is as good as impossible."""
MAX_STATE = torch.finfo(torch.bfloat16).max
"""The largest size of a channel that can be kept: what bfloat16 holds."""
MIN_SCALE = torch.finfo(torch.float32).tiny
"""A state whose scale would be less, so that no channel reaches 1.5e-36, is kept as zeros."""


def num_uniforms(signal: QuantizedSignal) -> int:
    """The number of uniform random numbers that a position takes: first those of its samples, then those of its
    rounding: of the entries, of the weight of a sample, and of the entropy."""
    if isinstance(signal, Sampled):
        return signal.draws + 1
    return signal.head + 3 if isinstance(signal, HeadAndSample) else 0


def quantize(selection: Selection, signal: QuantizedSignal, uniforms: np.ndarray) -> tuple[LogProbCodes, float]:
    """The codes of a selection, and the cost of storing it: Σ over positions of the (generalized) Kullback-Leibler
    divergence in nats between the entries as they were and as they will be read, at the worst temperature.

    Args:
        uniforms: float32 [n, num_uniforms(signal)], in [0, 1).
    """
    log_probs, ids = selection.log_probs.double().cpu().numpy(), selection.ids.cpu().numpy()
    present = np.isfinite(log_probs)
    step = signal.step
    exact = np.where(present, -log_probs, 0.0) / step
    if isinstance(signal, HeadAndSample):
        levels = _round_at_random(exact, step, uniforms[:, 1 : 1 + exact.shape[1]])
        order = np.argsort(np.where(present, levels, MAX_LEVEL + 1), axis=1, kind="stable")
        levels, ids, present, log_probs = (np.take_along_axis(x, order, 1) for x in (levels, ids, present, log_probs))
    else:
        levels = np.rint(exact).clip(0, MAX_LEVEL).astype(np.int32)
    side = [_side_levels(name, selection, signal, uniforms) for name in side_columns(signal)]
    if signal.kind in SAMPLED:  # the entropy is the mean of Σ −w log t, with the weights w that will be read
        assert selection.draw_log_probs is not None
        weights = np.where(present, np.exp(levels * -step), 0)
        of_samples = np.exp(log_unit_of(side[0], signal)) * selection.draw_log_probs.double().cpu().numpy().sum(1)
        nats = -(weights * np.where(present, log_probs, 0)).sum(1) - of_samples
        side[1] = np.floor(nats / ENTROPY_STEP + uniforms[:, -1]).clip(0, MAX_LEVEL - 1)
    codes = LogProbCodes(
        present.sum(1, dtype=np.int32),
        ids[present].astype(np.int32),
        levels[present],
        *_count_samples(selection),
        np.stack(side, 1).astype(np.int32) if side else np.zeros((len(ids), 0), np.int32),
    )
    return codes, _cost(selection, log_probs, codes, signal)


def _round_at_random(exact: np.ndarray, step: float, uniforms: np.ndarray) -> np.ndarray:
    """Levels next to the exact ones whose *probabilities* are right on average."""
    lower = np.floor(exact)
    share = -np.expm1(-step * (exact - lower)) / -np.expm1(-step)
    return (lower + (uniforms < share)).clip(0, MAX_LEVEL).astype(np.int32)


def _count_samples(selection: Selection) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The number of different sampled ids of each position, the ids, and how often each was sampled."""
    if selection.draws is None:
        none = np.zeros(0, np.int32)
        return np.zeros(len(selection.ids), np.int32), none, none
    samples = np.sort(selection.draws.cpu().numpy(), axis=1)
    first = (samples >= 0) & np.concatenate([np.ones((len(samples), 1), bool), samples[:, 1:] != samples[:, :-1]], 1)
    flat, starts = samples[samples >= 0], first[samples >= 0]
    repeats = np.diff(np.flatnonzero(starts), append=len(flat))
    return first.sum(1, dtype=np.int32), flat[starts].astype(np.int32), repeats.astype(np.int32)


def _base(signal: QuantizedSignal) -> float:
    """The log of the weight of a sample whose level is 0."""
    if isinstance(signal, Sampled):
        return -float(np.log(signal.draws))
    assert isinstance(signal, HeadAndSample)
    return float(np.log(signal.least)) if signal.least else 0.0


def _side_levels(name: str, selection: Selection, signal: QuantizedSignal, uniforms: np.ndarray) -> np.ndarray:
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
    plain = {"entropy": (selection.entropy, ENTROPY_STEP), "label": (selection.label_log_probs, -LABEL_STEP)}
    if name in plain:
        values, step = plain[name]
        if values is None:
            assert name == "entropy"  # that of a sample is made of the weights
            return np.zeros(len(selection.ids), np.int32)
        return np.rint(values.double().cpu().numpy() / step).clip(0, MAX_LEVEL - 1).astype(np.int32)
    log_residual = np.minimum(selection.log_rests[float(name.removeprefix("rest@"))].double().cpu().numpy(), 0)
    with np.errstate(divide="ignore"):
        log_odds = log_residual - np.log(-np.expm1(log_residual))
    level = 1 + np.rint((log_odds - MIN_RESIDUAL_LOG_ODDS) / RESIDUAL_STEP).clip(0, MAX_RESIDUAL_LEVEL - 1)
    return np.where(np.isneginf(log_residual), 0, level).astype(np.int32)


def _cost(selection: Selection, log_probs: np.ndarray, codes: LogProbCodes, signal: QuantizedSignal) -> float:
    """Σ t (log t − log t̂) − t + t̂ of all positions: over entries and residual mass, each position at the stored
    temperature at which it is the most; of a sampled signal over the entries, and the samples by their weight."""
    present = np.isfinite(log_probs)
    if signal.kind in SAMPLED:
        assert selection.log_unit is not None
        of_entries = _divergence(log_probs[present], codes.levels * -signal.step)
        firsts = np.cumsum(codes.sample_counts) - codes.sample_counts
        times = np.where(codes.sample_counts > 0, np.add.reduceat(np.append(codes.sample_repeats, 0), firsts), 0)
        unit = selection.log_unit.double().cpu().numpy()
        return float(of_entries.sum() + (times * _divergence(unit, log_unit_of(codes.side[:, 0], signal))).sum())
    read, log_probs = to_sparse(codes, signal), np.where(present, log_probs, -np.inf)
    costs = []
    for t in known_temperatures(signal):
        log_residual = selection.log_rests[t].double().cpu()
        logs = log_probs if t == 1.0 else tempered(torch.from_numpy(log_probs), log_residual, t).numpy()
        targets, residual = read.log_targets(t)
        same = np.full(logs.shape, -np.inf)  # the exact entries are the first of those that are read
        width = min(logs.shape[1], targets.shape[1])
        same[:, :width] = targets[:, :width].double().numpy()
        of_entries = _divergence(logs, np.where(np.isfinite(logs), same, -np.inf)).sum(1)
        costs.append(of_entries + _divergence(log_residual.numpy(), residual.double().numpy()))
    return float(np.max(costs, axis=0).sum())


def _divergence(log_t: np.ndarray, log_read: np.ndarray) -> np.ndarray:
    t = np.exp(log_t)
    gap = np.where(t > 0, np.where(t > 0, log_t, 0) - np.where(np.isfinite(log_read), log_read, -700.0), 0)
    return t * gap - t + np.exp(log_read)


def log_unit_of(level: np.ndarray, signal: QuantizedSignal) -> np.ndarray:
    """The log of the weight of a sample, from the side column "unit"."""
    assert isinstance(signal, Sampled | HeadAndSample)
    downwards = isinstance(signal, HeadAndSample) and not signal.least
    return _base(signal) + (-level if downwards else level) * signal.step


def to_sparse(codes: LogProbCodes, signal: QuantizedSignal, vocab_size: int | None = None) -> Sparse:
    """The signal that was stored, as float32 tensors on the CPU."""
    names, n = side_columns(signal), len(codes)
    width = max(1, int((codes.counts + codes.sample_counts).max(initial=1)))
    ids, log_probs = np.zeros((n, width), np.int64), np.full((n, width), -np.inf, np.float32)
    _fill(ids, codes.counts, 0, codes.ids)
    _fill(log_probs, codes.counts, 0, (codes.levels * -signal.step).astype(np.float32))
    if len(codes.sample_ids):
        units = np.repeat(log_unit_of(codes.side[:, 0], signal), codes.sample_counts)
        _fill(ids, codes.sample_counts, codes.counts, codes.sample_ids)
        log_weights = (np.log(codes.sample_repeats) + units).astype(np.float32)
        _fill(log_probs, codes.sample_counts, codes.counts, log_weights)
    ids = np.where(np.isneginf(log_probs), ids[:, :1], ids)

    def column(name: str, size: float) -> Tensor | None:
        if name not in names:
            return None
        return torch.from_numpy((codes.side[:, names.index(name)] * size).astype(np.float32))

    log_residuals = {}
    for temperature in known_temperatures(signal):
        level = codes.side[:, names.index(f"rest@{temperature}")]
        log_odds = MIN_RESIDUAL_LOG_ODDS + (level - 1) * RESIDUAL_STEP
        residual = np.where(level, -np.logaddexp(0, -log_odds), -np.inf)
        log_residuals[temperature] = torch.from_numpy(residual.astype(np.float32))
    return Sparse(
        ids=torch.from_numpy(ids),
        log_probs=torch.from_numpy(log_probs),
        log_rests=log_residuals,
        entropy=column("entropy", ENTROPY_STEP),
        label_log_probs=column("label", -LABEL_STEP),
        sampled=signal.kind in SAMPLED,
        vocab_size=vocab_size,
    )


def _fill(table: np.ndarray, counts: np.ndarray, start: np.ndarray | int, values: np.ndarray) -> None:
    """Writes each row's ``counts`` values into it, from column ``start`` on."""
    starts = np.broadcast_to(np.asarray(start, np.int64), counts.shape)
    ends = np.cumsum(counts, dtype=np.int64)
    place = np.arange(len(values)) - np.repeat(ends - counts, counts)
    table[np.repeat(np.arange(len(counts)), counts), place + np.repeat(starts, counts)] = values


def hidden_bytes_per_position(config: HiddenStatesConfig, width: int) -> int:
    """The exact size of the stored states of one position."""
    return len(config.layers) * (4 + width if config.format == "int8" else 2 * width)


def encode_hidden(states: Float[Tensor, "layers kept width"], config: HiddenStatesConfig) -> bytes:
    """A row of float32 states, which are all finite and none larger than ``MAX_STATE``, as bytes."""
    assert len(states) == len(config.layers)
    if config.format == "bfloat16":
        return states.to(torch.bfloat16).view(torch.int16).cpu().contiguous().numpy().astype("<i2").tobytes()
    scales = states.abs().amax(-1) / 127
    scales = torch.where(scales < MIN_SCALE, 0.0, scales)
    numbers = (states / torch.where(scales > 0, scales, torch.inf).unsqueeze(-1)).round().to(torch.int8)
    blocks = zip(scales.cpu().numpy().astype("<f4"), numbers.cpu().numpy(), strict=True)
    return b"".join(scale.tobytes() + number.tobytes() for scale, number in blocks)


def decode_hidden(
    data: bytes | memoryview, config: HiddenStatesConfig, width: int, kept: int, into: Mapping[Layer, np.ndarray]
) -> None:
    """Writes the states of some of a row's layers into arrays, float32 [kept, width].

    Raises:
        ValueError: the bytes are not as many as such a row has, or hold what is no state.
    """
    size = kept * hidden_bytes_per_position(config, width)
    if len(data) != size:
        raise ValueError(f"{len(data)} bytes of hidden states where {size} are expected")
    block = size // len(config.layers)
    for layer, out in into.items() if kept else ():
        start = block * config.layers.index(layer)
        part = data[start : start + block]
        if config.format == "bfloat16":
            bits = np.frombuffer(part, "<u2").astype(np.uint32) << 16
            out[:] = bits.view(np.float32).reshape(out.shape)
            if not np.isfinite(out).all():
                raise ValueError("a hidden state is not finite")
            continue
        scales = np.frombuffer(part, "<f4", kept)
        if not ((scales >= 0) & (scales <= np.float32(MAX_STATE) / np.float32(127)) & ~np.signbit(scales)).all():
            raise ValueError("a scale of hidden states is negative, too large or not a number")
        numbers = np.frombuffer(part, "i1", offset=4 * kept).reshape(out.shape)
        if numbers.min(initial=0) < -127:
            raise ValueError("a number of hidden states is -128")
        np.multiply(numbers, scales[:, None], out=out, dtype=np.float32)

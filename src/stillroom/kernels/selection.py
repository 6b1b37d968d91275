"""Selection of the entries of the teacher's distribution that are kept; tensors in, tensors out, on any device."""

import math
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass
class Selection:
    """The entries that are kept of ``n`` positions, not yet quantized."""

    ids: Int[Tensor, "n k"]
    """The exact entries, most probable first. Where ``log_probs`` is −inf there is none."""
    log_probs: Float[Tensor, "n k"]
    log_rests: dict[float, Float[Tensor, " n"]] = field(default_factory=dict)
    """The log of the mass that the exact entries leave out, by temperature; summed, and so exact however small."""
    draws: Int[Tensor, "n m"] | None = None
    """Drawn ids, with repetitions; −1 where there is none."""
    draw_log_probs: Float[Tensor, "n m"] | None = None
    """log of each drawn id's own probability; 0 where there is none."""
    log_unit: Float[Tensor, " n"] | None = None
    """log of the weight of each draw."""
    entropy: Float[Tensor, " n"] | None = None
    label_log_probs: Float[Tensor, " n"] | None = None

    def is_defined(self) -> bool:
        """Whether there was a distribution at every position: no logit was NaN or +∞, and not all were −∞."""
        kept = (self.log_probs, self.draw_log_probs, self.log_unit)
        return not any(x is not None and bool(x.isnan().any()) for x in kept)


def top_indices(values: Float[Tensor, "n v"], k: int) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """The k largest of each row and their columns, largest first.

    The k blocks with the largest maxima hold them all, so only those are searched: one cheap pass over the row instead
    of a selection from all of it.
    """
    n, v = values.shape
    if _on_cpu(values) and k > 0:
        from stillroom.kernels.numba_math import over_rows
        from stillroom.kernels.numba_selection import largest_of_rows

        ids, largest = torch.zeros(n, min(k, v), dtype=torch.long), torch.empty(n, min(k, v))
        over_rows(largest_of_rows, values, ids, largest)
        return largest, ids
    size = 1 << round(math.log2(v) / 2)
    num_blocks = v // size
    if num_blocks * size != v or num_blocks < 2 * k:
        return values.topk(min(k, v))
    blocks = values.view(n, num_blocks, size)
    which = blocks.amax(-1).topk(k).indices
    inside = blocks.gather(1, which.unsqueeze(-1).expand(-1, -1, size)).view(n, k * size)
    largest, places = inside.topk(k)
    return largest, which.gather(1, places // size) * size + places % size


def top_k(logits: Float[Tensor, "n v"], k: int, temperatures: tuple[float, ...] = (1.0,)) -> Selection:
    """The top k entries, and the mass left out at each temperature. The logits are changed."""
    values, ids = top_indices(logits, k)
    total = logits.logsumexp(-1)
    kept = values - total.unsqueeze(-1)
    logits.scatter_(-1, ids, -torch.inf)
    return Selection(ids, kept, _log_residuals(logits, values, temperatures))


def top_p(logits: Float[Tensor, "n v"], mass: float, most: int, temperatures: tuple[float, ...] = (1.0,)) -> Selection:
    """The top entries until they hold ``mass``, ``most`` at the most. The logits are changed."""
    values, ids = top_indices(logits, most)
    kept = values - logits.logsumexp(-1).unsqueeze(-1)
    before = kept.exp().cumsum(-1).roll(1, -1)
    before[:, 0] = 0
    kept = kept.masked_fill(before >= mass, -torch.inf)
    defined = kept > -torch.inf
    logits.scatter_(-1, torch.where(defined, ids, ids[:, :1]), -torch.inf)
    return Selection(ids, kept, _log_residuals(logits, values.masked_fill(~defined, -torch.inf), temperatures))


def _log_residuals(
    others: Float[Tensor, "n v"], kept: Float[Tensor, "n k"], temperatures: tuple[float, ...]
) -> dict[float, Tensor]:
    """log(mass of the others / mass of all) at each temperature, exact however little is left out."""
    residuals = {}
    for temperature in temperatures:
        residual = (others / temperature if temperature != 1.0 else others).logsumexp(-1)
        residuals[temperature] = torch.nn.functional.logsigmoid(residual - (kept / temperature).logsumexp(-1))
    return residuals


def sampled(logits: Float[Tensor, "n v"], uniforms: Float[Tensor, "n m"]) -> Selection:
    """One independent draw for each uniform number, each of weight 1 / m."""
    num_draws = uniforms.shape[1]
    probabilities = torch.softmax(logits, -1)
    points = uniforms * _blocks(probabilities).sum((-1, -2)).unsqueeze(-1)
    draws = _inverse_cdf(probabilities, points)
    none = probabilities.new_zeros(len(logits), 0)
    unit = probabilities.new_full((len(logits),), -math.log(num_draws))
    return Selection(none.long(), none, draws=draws, draw_log_probs=probabilities.gather(1, draws).log(), log_unit=unit)


def head_and_sample(
    logits: Float[Tensor, "n v"], head: int, most_draws: int, least: float, uniforms: Float[Tensor, " n"]
) -> Selection:
    """The top ``head`` entries that are at least ``least``, exactly, and draws from the tail. Changes the logits.

    The draws are systematic: in a tail of mass r, points ``(u + 0) w, (u + 1) w, …`` below r fall on the tail's
    cumulative distribution, with one uniform number u and weight ``w = max(least, r / most_draws)``. So a tail token of
    probability p is drawn ``p / w`` times in expectation (and never a whole time more or less), for an expected weight
    of exactly p.
    """
    n = len(logits)
    if _on_cpu(logits) and head > 0:
        from stillroom.kernels.numba_math import over_rows
        from stillroom.kernels.numba_selection import head_and_draws

        size = n, min(head, logits.shape[1])
        ids, values = torch.zeros(size, dtype=torch.long), torch.zeros(size)
        tails, units, lowest = torch.empty(n), torch.empty(n), torch.full((n,), least)
        draws, of_draws = torch.full((n, most_draws), -1), torch.ones(n, most_draws)
        over_rows(head_and_draws, logits, lowest, uniforms.float(), ids, values, tails, units, draws, of_draws)
        return Selection(ids, values.log_(), {1.0: tails.log()}, draws, of_draws.log_(), units.log())
    probabilities = torch.softmax(logits, -1, out=logits)
    values, ids = top_indices(probabilities, head)
    defined = values >= least
    defined[:, 0] = True
    probabilities.scatter_(-1, torch.where(defined, ids, ids[:, :1]), 0)
    tail = _blocks(probabilities).sum((-1, -2))
    unit = (tail / most_draws).clamp(min=max(least, 1e-30))
    steps = torch.arange(most_draws, device=logits.device)
    points = (uniforms.unsqueeze(-1) + steps) * unit.unsqueeze(-1)
    beyond = points >= tail.unsqueeze(-1)
    draws = _inverse_cdf(probabilities, points)
    draw_log_probs = probabilities.gather(1, draws).log_().masked_fill_(beyond, 0)
    draws.masked_fill_(beyond, -1)
    kept = values.log().masked_fill_(~defined, -torch.inf)
    return Selection(ids, kept, {1.0: tail.log()}, draws, draw_log_probs, unit.log())


def subtracted_rests(log_probs: Float[Tensor, "n k"], vocab_size: int) -> Float[Tensor, " n"]:
    """log of the mass that entries leave out, where it cannot be summed: ``log(1 − Σ p)``, −inf where all are kept.

    Float32 log-probabilities do not distinguish a mass below ``k · 2⁻²⁴`` from 0, so entries that leave ids out leave
    out at least that much: with 0, any mass of the student on other ids would cost infinitely much.
    """
    log_probs = log_probs.double()
    counts = (log_probs > -torch.inf).sum(-1)
    rests = (1 - log_probs.exp().sum(-1)).maximum(counts * 2.0**-24)
    return torch.where(counts < vocab_size, rests, 0).log()


def _on_cpu(values: Float[Tensor, "n v"]) -> bool:
    return values.device.type == "cpu" and values.dtype == torch.float32 and values.shape[1] > 0


def entropy(logits: Float[Tensor, "n v"]) -> Float[Tensor, " n"]:
    """The entropy of each row's distribution, in nats."""
    return torch.special.entr(torch.softmax(logits, -1)).sum(-1)


def _blocks(rows: Float[Tensor, "n v"]) -> Float[Tensor, "n b s"]:
    """Splits each row into blocks of about √v, padded with zeros."""
    n, v = rows.shape
    size = 1 << round(math.log2(v) / 2)
    if v % size:
        rows = torch.nn.functional.pad(rows, (0, -v % size))
    return rows.view(n, rows.shape[1] // size, size)


def _inverse_cdf(probabilities: Float[Tensor, "n v"], points: Float[Tensor, "n m"]) -> Int[Tensor, "n m"]:
    """The column of each point in the cumulative sum: first the block, then the place in it.

    A column of probability 0 is never returned, unless the whole row is 0.
    """
    blocks = _blocks(probabilities)
    size = blocks.shape[2]
    sums = blocks.sum(-1).cumsum(-1)
    almost = 1 - 4 * torch.finfo(points.dtype).eps
    points = torch.minimum(points, sums[:, -1:] * almost)
    which = torch.searchsorted(sums, points, right=True).clamp_(max=sums.shape[1] - 1)
    before = torch.where(which > 0, sums.gather(1, (which - 1).clamp_(min=0)), 0)
    inside = blocks.gather(1, which.unsqueeze(-1).expand(-1, -1, size)).cumsum(-1)
    left = torch.minimum(points - before, inside[:, :, -1] * almost)
    place = (inside <= left.unsqueeze(-1)).sum(-1)
    return (which * size + place).view(points.shape).clamp_(max=probabilities.shape[1] - 1)

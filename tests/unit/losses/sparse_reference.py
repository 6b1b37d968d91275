"""Sparse signals as the textbook has them, in float64: their making, and their divergences, outcome by outcome."""

from collections.abc import Sequence

import torch
from reference import adaptive_kl, alpha_beta, jensen_shannon, kl, skew_kl, skew_reverse_kl, softmax, total_variation
from torch import Tensor

from stillroom.losses import config
from stillroom.losses.block import LogitBlock
from stillroom.signals import Sparse

STORED = (1.0, 2.0)
"""Temperatures at which the test's signals know what they leave out."""
OF_OUTCOMES = {
    "forward_kl": kl,
    "reverse_kl": lambda t, s: kl(s, t),
    "jensen_shannon": jensen_shannon,
    "skew_kl": skew_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "adaptive_kl": adaptive_kl,
    "alpha_beta": alpha_beta,
    "total_variation": total_variation,
}
"""The divergences as functions of teacher's and student's probabilities."""
TRUNCATED = tuple(OF_OUTCOMES)
"""The losses of a truncated signal."""


def truncated(teacher: Tensor, k: int, temperatures: Sequence[float] = STORED, vocab_size: int | None = None) -> Sparse:
    """The k likeliest of teacher's logits [n, v] and what they leave out, computed in float64."""
    wide = teacher.double()
    ids = wide.topk(k, -1).indices
    off = torch.zeros_like(wide, dtype=torch.bool).scatter(-1, ids, value=True)
    rests = {
        t: (wide / t).log_softmax(-1).masked_fill(off, -torch.inf).logsumexp(-1).to(teacher.dtype) for t in temperatures
    }
    return Sparse(ids, wide.log_softmax(-1).gather(-1, ids).to(teacher.dtype), rests, vocab_size=vocab_size)


def outcomes(logits: Tensor, ids: Tensor, temperature: float) -> Tensor:
    """One position's probabilities of the distinct ``ids``, and last of all others together: k + 1 of them."""
    probabilities = softmax(logits, temperature)
    others = torch.ones_like(probabilities).index_fill(0, ids, 0)
    return torch.cat([probabilities[ids], (probabilities * others).sum().unsqueeze(0)])


def naive_truncated(name: str, student: Tensor, teacher: Tensor, ids: Tensor, temperature: float = 1.0) -> Tensor:
    """The value in nats at each position, differentiable, from student's and teacher's logits [n, v]."""
    values = []
    for s, t, kept in zip(student.double(), teacher.double(), ids, strict=True):
        p, q = outcomes(t, kept, temperature), outcomes(s, kept, temperature)
        values.append(temperature**2 * OF_OUTCOMES[name](p, q))
    return torch.stack(values)


def sample(teacher: Tensor, draws: int, generator: torch.Generator) -> Sparse:
    """``draws`` tokens drawn with replacement: each id that came, its share w of them, and −Σ w log t."""
    probabilities = teacher.double().softmax(-1)
    drawn = torch.multinomial(probabilities, draws, replacement=True, generator=generator)
    times = torch.zeros_like(probabilities).scatter_add_(-1, drawn, torch.ones_like(drawn, dtype=torch.float64))
    most = int((times > 0).sum(-1).max())
    times, ids = times.topk(most, -1)
    ids = torch.where(times > 0, ids, ids[:, :1])
    entropy = -(times / draws * probabilities.gather(-1, ids).log()).sum(-1)
    return Sparse(ids, (times / draws).log().to(teacher.dtype), entropy=entropy.to(teacher.dtype), sampled=True)


def naive_sampled(student: Tensor, signal: Sparse) -> Tensor:
    """``Σ w (log t − log s)`` at each position, differentiable."""
    assert signal.entropy is not None
    values = []
    rows = zip(student.double(), signal.ids, signal.log_probs.double(), signal.entropy.double(), strict=True)
    for s, ids, log_weights, entropy in rows:
        weights = torch.zeros_like(s).index_add(0, ids, log_weights.exp())
        values.append(-entropy - (weights * softmax(s, 1.0).log()).sum())
    return torch.stack(values)


def value_and_gradient(name: str, student: Tensor, signal: Sparse, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """What the package says of student's logits [n, v], which it may change: so it gets a copy."""
    labels = torch.zeros(len(student), dtype=torch.long)
    return config.LOSSES[name].load()(LogitBlock(student.clone(), None, labels, signal), temperature=temperature)


def random_logits(n: int = 5, v: int = 9, seed: int = 0, spread: float = 3.0) -> tuple[Tensor, Tensor]:
    """Student's and teacher's, float64."""
    student, teacher = torch.randn(2, n, v, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * spread
    return student, teacher

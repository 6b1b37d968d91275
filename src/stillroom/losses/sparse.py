"""Divergences from a sparse signal: a few entries of the teacher's distribution, truncated with a bucket, or sampled.

Truncated, both distributions are seen through k + 1 outcomes: each kept id, and the bucket of all the others, whose
mass the teacher's signal tells exactly and the student's softmax gives. By the data-processing inequality these
divergences never exceed those of the full distributions, and they reach them as k grows.

Sampled, the entries are weights ``w`` with ``E[w] = t``, and only losses that are linear in the target are unbiased:
of the Kullback-Leibler divergences, the forward one (arXiv 2503.16870).
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stillroom.errors import MismatchError
from stillroom.losses.block import Block
from stillroom.signals import Sparse, untempered

NEEDS_NO_TEACHER = ("cross_entropy",)
UNBIASED_FROM_SAMPLES = ("forward_kl",)


def check_sparse(
    loss: str, temperature: float, *, sampled: bool, temperatures: tuple[float, ...], name: str = "the stored signal"
) -> None:
    """Returns where a loss can be taken from a sparse signal without bias.

    Args:
        temperatures: those at which the mass left out is known.

    Raises:
        MismatchError: it cannot, with the reason.
    """
    if loss in NEEDS_NO_TEACHER:
        return
    if sampled and loss not in UNBIASED_FROM_SAMPLES:
        raise MismatchError(
            f"{loss} cannot be learnt from sampled targets",
            {"objective": loss, name: "sampled"},
            why="A sample is right on average only where the loss is linear in the target, and this one is not: its "
            "gradient would be biased, at every number of draws.",
            fix="Use forward_kl, or capture with signal.kind=top_k, whose bucket makes other divergences exact bounds.",
        )
    if temperature != 1.0 and (sampled or temperature not in temperatures):
        raise untempered(temperature, "1.0, sampled" if sampled else ", ".join(map(str, temperatures)))


class _Seen(NamedTuple):
    """Student and teacher through the outcomes of a truncated signal."""

    ids: Int[Tensor, "r k"]
    there: Float[Tensor, "r k"]
    """1 where an entry is one, 0 where a position has fewer."""
    log_t: Float[Tensor, "r k"]
    log_s: Float[Tensor, "r k"]
    t: Float[Tensor, "r k"]
    s: Float[Tensor, "r k"]
    log_rest: Float[Tensor, " r"]
    rest: Float[Tensor, " r"]
    others: Float[Tensor, "r v"]
    """The student's probabilities of the other ids; 0 on the kept ones. Of its own: may be changed."""


def _see(block: Block, signal: Sparse, temperature: float) -> _Seen:
    log_student = block.student(temperature)
    targets, log_rest = (x.to(log_student.dtype) for x in signal.log_targets(temperature))
    finite = targets > -torch.inf
    log_t, log_s = targets.masked_fill(~finite, 0), log_student.gather(-1, signal.ids).masked_fill(~finite, 0)
    there = finite.to(log_student.dtype)
    others = block.student_probabilities(temperature).scatter(-1, signal.ids, 0)
    return _Seen(
        signal.ids, there, log_t, log_s, log_t.exp() * there, log_s.exp() * there, log_rest, log_rest.exp(), others
    )


def _log_of_others(seen: _Seen) -> Float[Tensor, " r"]:
    """log of the student's mass on the other ids, summed over them and so right however small it is."""
    return seen.others.sum(-1).clamp_(min=torch.finfo(seen.others.dtype).tiny).log()


def forward_kl(block: Block, signal: Sparse, temperature: float) -> tuple[Float[Tensor, " r"], Float[Tensor, "r v"]]:
    """Truncated: ``T² (Σ t (log t − log s) + r (log r − log R))`` with the masses ``r`` and ``R`` that teacher and
    student give to all other ids; gradient ``T (s − t)`` on kept ids and ``T s (1 − r / R)`` on the others.

    Sampled: ``Σ w (log t − log s)``; gradient ``s Σ w − w``. Right in expectation; a single position's value may be
    negative.
    """
    if signal.sampled:
        return _from_samples(block, signal, temperature)
    seen = _see(block, signal, temperature)
    log_others = _log_of_others(seen)
    there = seen.log_rest > -torch.inf
    gap = torch.where(there, seen.log_rest - log_others, 0)
    # As in the dense loss, s − t is added to each outcome's summand, which sums to zero.
    nats = torch.addcmul(seen.s - seen.t, seen.t, seen.log_t - seen.log_s).sum(-1)
    nats = (nats + seen.rest * gap + log_others.exp() - seen.rest).clamp_(min=0)
    share = torch.where(there, gap.exp(), 0)
    gradient = seen.others.mul_((1 - share).unsqueeze(-1))
    gradient.scatter_add_(-1, seen.ids, seen.s - seen.t)
    return _scaled(nats, gradient, temperature)


def reverse_kl(block: Block, signal: Sparse, temperature: float) -> tuple[Float[Tensor, " r"], Float[Tensor, "r v"]]:
    """Truncated: ``T² (Σ s (log s − log t) + R (log R − log r))``; gradient ``T s_j (g_j − KL)``, where ``g_j`` is the
    log ratio of the outcome that j belongs to.

    Raises:
        MismatchError: the signal is sampled, or keeps everything but says that something else has mass 0.
    """
    check_sparse("reverse_kl", temperature, sampled=signal.sampled, temperatures=tuple(signal.log_rests))
    seen = _see(block, signal, temperature)
    log_others = _log_of_others(seen)
    ratio = seen.log_s - seen.log_t
    lowest = torch.finfo(log_others.dtype).min / 1e8
    gap = log_others - seen.log_rest.clamp(min=lowest)
    gap = torch.where(seen.others.sum(-1) > 0, gap, 0)
    others = log_others.exp()
    plain = (seen.s * ratio).sum(-1) + others * gap
    nats = (torch.addcmul(seen.t - seen.s, seen.s, ratio).sum(-1) + others * gap - others + seen.rest).clamp_(min=0)
    gradient = seen.others.mul_((gap - plain).unsqueeze(-1))
    gradient.scatter_add_(-1, seen.ids, seen.s * (ratio - plain.unsqueeze(-1)))
    return _scaled(nats, gradient, temperature)


def _from_samples(block: Block, signal: Sparse, temperature: float) -> tuple[Tensor, Tensor]:
    check_sparse("forward_kl", temperature, sampled=True, temperatures=())
    if signal.entropy is None:
        raise MismatchError(
            "a sampled signal comes without the teacher's entropy",
            {"entropy": "none", "needed by": "forward_kl"},
            why="The divergence is the cross-entropy less the teacher's entropy, which a sample does not tell.",
            fix="Give `Sparse.entropy`.",
        )
    log_student = block.student()
    weights = signal.log_probs.to(log_student.dtype).exp()
    log_s = log_student.gather(-1, signal.ids)
    nats = -(weights * log_s).sum(-1) - signal.entropy.to(log_student.dtype)
    gradient = block.student_probabilities() * weights.sum(-1, keepdim=True)
    gradient.scatter_add_(-1, signal.ids, -weights)
    return nats, gradient


def _scaled(nats: Tensor, gradient: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    if temperature == 1.0:
        return nats, gradient
    return nats.mul_(temperature**2), gradient.mul_(temperature)

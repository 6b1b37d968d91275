"""Adaptive KL: forward and reverse KL in the proportion in which head and tail of the distribution are wrong."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from stillroom.losses.block import Block
from stillroom.losses.kl import of_student, of_teacher
from stillroom.losses.pointwise import Outcomes, between, diverge

HALVINGS = 10
"""After so many, what the head's border lies between is a factor of at most 2 ** (log2(2 v) / 1024)."""


def adaptive_kl(
    block: Block, *, temperature: float = 1.0, mu: float = 0.5
) -> tuple[Float[Tensor, " r"], Float[Tensor, "r v"]]:
    """``T² (g KL(t ‖ s) + (1 − g) KL(s ‖ t))`` with ``g = Σ_head |t − s| / Σ |t − s|``; gradient that of the two with g
    held fixed.

    The head is the teacher's likeliest tokens, as few as hold the mass μ. Forward KL mends the head first and reverse
    KL the tail; each position takes more of what it needs (arXiv 2404.02657). Of a truncated signal, what was left out
    is one outcome.

    Raises:
        ConfigError: mu is not strictly between 0 and 1.
    """
    between("mu", mu, "reverse_kl", "forward_kl")

    def divergence(o: Outcomes) -> tuple[Tensor, Tensor]:
        gap = (o.t - o.s).abs_()
        total = gap.sum(-1, keepdim=True)
        of_head = gap.mul_(head_of(o.t, mu)).sum(-1, keepdim=True)
        share = torch.where(total > 0, of_head / total.clamp(min=torch.finfo(total.dtype).tiny), 0.5).clamp_(max=1)
        summands, pulls = of_teacher(o)
        others, other_pulls = of_student(o)
        return torch.lerp(others, summands, share), torch.lerp(other_pulls, pulls, share)

    return diverge(block, divergence, temperature)


def head_of(t: Float[Tensor, "r m"], mass: float) -> Bool[Tensor, "r m"]:
    """The likeliest outcomes of each row, as few as hold ``mass``; of equals at the border the first ones.

    The border's probability is between the largest and ``(1 − mass) / 2m`` (what is less likely than that holds too
    little to matter). It is halved in on, and only what is left between is sorted.
    """
    high = t.amax(-1, keepdim=True)
    low = torch.minimum(high, torch.full_like(high, (1 - mass) / (2 * t.shape[1])))
    high = high * (1 + 1e-6)
    for _ in range(HALVINGS):
        middle = (low * high).sqrt_()
        enough = torch.where(t >= middle, t, 0).sum(-1, keepdim=True) >= mass
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    sure = t >= high
    left = mass - torch.where(sure, t, 0).sum(-1, keepdim=True)
    open_ = (t >= low).logical_and_(~sure)
    width = max(1, int(open_.sum(-1).amax()))
    candidates = torch.where(open_, t, -1).topk(width).values.clamp_(min=0)
    before = candidates.cumsum(-1) - candidates
    number = ((before < left) & (candidates > 0)).sum(-1, keepdim=True)
    border = candidates.gather(-1, (number - 1).clamp_(min=0))
    equal = open_ & (t == border)
    of_equals = number - (candidates > border).sum(-1, keepdim=True)
    return sure | (open_ & (t > border)) | (equal & (equal.cumsum(-1) <= of_equals))

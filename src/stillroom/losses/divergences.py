"""Divergences of student and teacher over the vocabulary, in nats per position, with their gradients."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from stillroom.errors import ConfigError
from stillroom.losses import sparse
from stillroom.losses.block import LogitBlock
from stillroom.losses.sparse import Missing


class Outcomes(NamedTuple):
    """Teacher ``t`` and student ``s`` over the same outcomes. An outcome that is impossible for both has t = s = 0."""

    log_t: Float[Tensor, "r m"]
    log_s: Float[Tensor, "r m"]
    t: Float[Tensor, "r m"]
    s: Float[Tensor, "r m"]


Pointwise = Callable[[Outcomes], tuple[Tensor, Tensor]]
"""``D(t ‖ s) = Σ_j φ(t_j, s_j)`` as a pure function of the outcomes.

It returns the summands φ_j and the *logit gradient terms* ``w_j = s_j ∂φ/∂s_j``, new tensors [r, m]. Multiples of s − t
or s, whose sums are constant, may be added to either, so that summands are at least 0 and both exactly 0 where t = s.
"""


def diverge(
    block: LogitBlock, divergence: Pointwise, temperature: float
) -> tuple[Float[Tensor, " r"], Float[Tensor, "r v"]]:
    """``T² · D`` of the distributions at temperature T, and its gradient ``T (w − s Σ w)`` in the student's logits.

    The outcomes of a truncated sparse signal are its entries and, as one further outcome, all the others together; an
    id among these has its share of that outcome's w, in proportion to its probability. So an f-divergence is at most
    the full one (data-processing inequality), and reaches it as entries are added. The α-β divergence with α + β other
    than 1 and the adaptive KL are no f-divergences, and may be larger.
    """
    if block.sparse is not None:
        seen = sparse.see(block, block.sparse, temperature)
        summands, grad_terms = divergence(Outcomes(seen.log_t, seen.log_s, seen.t, seen.s))
        nats, total = summands.sum(-1), grad_terms.sum(-1, keepdim=True)
        residual = seen.s[:, -1:].clamp(min=torch.finfo(seen.s.dtype).tiny)
        gradient = seen.others.mul_(grad_terms[:, -1:] / residual - total)
        gradient.scatter_add_(-1, seen.ids, (grad_terms - seen.s * total)[:, :-1])
    else:
        outcomes = Outcomes(
            block.teacher(temperature),
            block.student(temperature),
            block.teacher_probabilities(temperature),
            block.student_probabilities(temperature),
        )
        summands, gradient = divergence(outcomes)
        nats = summands.sum(-1)
        gradient.addcmul_(outcomes.s, gradient.sum(-1, keepdim=True), value=-1)
    nats.clamp_(min=0)
    return (nats, gradient) if temperature == 1.0 else (nats.mul_(temperature**2), gradient.mul_(temperature))


def between(name: str, value: float, low: str, high: str) -> None:
    """Raises ConfigError unless 0 < value < 1; ``low`` and ``high`` are the losses at the ends."""
    if not 0 < value < 1:
        raise ConfigError(
            f"{name} must lie strictly between 0 and 1",
            {name: value, "allowed": "0 < … < 1"},
            why=f"At 0 the loss is {low}, at 1 {high}.",
            fix="Choose a value between them, or name the loss that is meant.",
        )


def forward_kl(
    block: LogitBlock, *, temperature: float = 1.0, missing: Missing = "bucket"
) -> tuple[Float[Tensor, " r"], Float[Tensor, "r v"]]:
    """``T² · KL(t ‖ s) = T² · Σ t (log t − log s)`` at temperature T; gradient ``T (s − t)``.

    It is mass-covering. From a sampled signal it is right in expectation.

    Args:
        missing: the target that is assumed for everything that a truncated signal left out: see
            :func:`sparse.completed`.
    """
    if block.sparse is not None and (block.sparse.sampled or missing != "bucket"):
        return sparse.forward_kl(block, block.sparse, temperature, missing)
    return diverge(block, of_teacher, temperature)


def reverse_kl(block: LogitBlock, *, temperature: float = 1.0) -> tuple[Float[Tensor, " r"], Float[Tensor, "r v"]]:
    """``T² · KL(s ‖ t) = T² · Σ s (log s − log t)`` at temperature T; gradient ``T · s (log s − log t − KL(s ‖ t))``.

    It is mode-seeking.
    """
    return diverge(block, of_student, temperature)


def of_teacher(o: Outcomes) -> tuple[Tensor, Tensor]:
    """KL(t ‖ s). Each summand includes ``s − t``, so it is at least 0, and the rounding of the normalizers cancels."""
    grad_terms = o.s - o.t
    return torch.addcmul(grad_terms, o.t, o.log_t - o.log_s), grad_terms


def of_student(o: Outcomes) -> tuple[Tensor, Tensor]:
    """KL(s ‖ t); each summand includes ``t − s``."""
    grad_terms = (o.log_s - o.log_t).mul_(o.s)
    return (grad_terms - o.s).add_(o.t), grad_terms


def jensen_shannon(
    block: LogitBlock, *, temperature: float = 1.0, beta: float = 0.5
) -> tuple[Float[Tensor, " r"], Float[Tensor, "r v"]]:
    """Generalised Jensen-Shannon: ``T² (β KL(t ‖ m) + (1 − β) KL(s ‖ m))`` with ``m = β t + (1 − β) s``.

    Gradient ``T (w − s Σ w)`` with ``w = (1 − β) s log(s / m)``. Divided by β it tends to forward KL as β → 0, divided
    by 1 − β to reverse KL as β → 1 (arXiv 2306.13649).

    Raises:
        ConfigError: beta is not strictly between 0 and 1.
    """
    between("beta", beta, "forward_kl", "reverse_kl")

    def divergence(o: Outcomes) -> tuple[Tensor, Tensor]:
        log_t, log_s = over_mixture(o, beta)
        grad_terms = log_s.mul_(o.s).mul_(1 - beta)
        return log_t.mul_(o.t).mul_(beta).add_(grad_terms), grad_terms

    return diverge(block, divergence, temperature)


def skew_kl(
    block: LogitBlock, *, temperature: float = 1.0, alpha: float = 0.1
) -> tuple[Float[Tensor, " r"], Float[Tensor, "r v"]]:
    """``T² · KL(t ‖ m)`` with ``m = α t + (1 − α) s``; gradient ``T (w − s Σ w)`` with ``w = (1 − α) s (1 − t / m)``.

    Forward KL whose ratio never passes 1 / α (DistiLLM, arXiv 2402.03898).

    Raises:
        ConfigError: alpha is not strictly between 0 and 1.
    """
    between("alpha", alpha, "forward_kl", "0 everywhere")

    def divergence(o: Outcomes) -> tuple[Tensor, Tensor]:
        log_t, _ = over_mixture(o, alpha)
        summands = (log_t * o.t).add_(o.s - o.t, alpha=1 - alpha)
        return summands, log_t.expm1_().mul_(o.s).mul_(alpha - 1)

    return diverge(block, divergence, temperature)


def skew_reverse_kl(
    block: LogitBlock, *, temperature: float = 1.0, alpha: float = 0.1
) -> tuple[Float[Tensor, " r"], Float[Tensor, "r v"]]:
    """``T² · KL(s ‖ m)`` with ``m = α s + (1 − α) t``; gradient ``T (w − s Σ w)`` with
    ``w = s (log(s / m) + α (1 − s / m))``.

    Reverse KL that stays finite where a token is impossible for the teacher (DistiLLM, arXiv 2402.03898).

    Raises:
        ConfigError: alpha is not strictly between 0 and 1.
    """
    between("alpha", alpha, "reverse_kl", "0 everywhere")

    def divergence(o: Outcomes) -> tuple[Tensor, Tensor]:
        _, log_s = over_mixture(o, 1 - alpha)
        summands = (log_s * o.s).add_(o.t - o.s, alpha=1 - alpha)
        return summands, log_s.sub_(log_s.expm1(), alpha=alpha).mul_(o.s)

    return diverge(block, divergence, temperature)


def over_mixture(o: Outcomes, share_of_teacher: float) -> tuple[Float[Tensor, "r m"], Float[Tensor, "r m"]]:
    """``log(t / m)`` and ``log(s / m)`` of each outcome."""
    gap = o.log_t - o.log_s
    smaller = (gap > 0).to(gap.dtype).mul_(1 - 2 * share_of_teacher).add_(share_of_teacher)
    down = gap.abs().neg_().expm1_().mul_(smaller).log1p_().neg_()
    return down + gap.clamp(max=0), down.sub_(gap.clamp_(min=0))


def total_variation(block: LogitBlock, *, temperature: float = 1.0) -> tuple[Float[Tensor, " r"], Float[Tensor, "r v"]]:
    """``T² · ½ Σ |t − s|``; gradient ``T (w − s Σ w)`` with ``w = ½ s sign(s − t)``.

    At T = 1 it is 1 less the mass that speculative decoding accepts (arXiv 2310.08461). A symmetric and bounded
    distance; it has no unit.
    """

    def divergence(o: Outcomes) -> tuple[Tensor, Tensor]:
        gap = o.s - o.t
        return gap.abs().div_(2), gap.sign_().mul_(o.s).div_(2)

    return diverge(block, divergence, temperature)


def alpha_beta(
    block: LogitBlock, *, temperature: float = 1.0, alpha: float = 0.5, beta: float = 0.5
) -> tuple[Float[Tensor, " r"], Float[Tensor, "r v"]]:
    """``T² / (α β) · Σ [α / c · t^c + β / c · s^c − t^α s^β]`` with ``c = α + β``; gradient ``T (w − s Σ w)`` with
    ``w = (s^c − t^α s^β) / α``.

    A larger α emphasizes where the teacher is confident, a larger β where the student is. It tends to forward KL for
    α = 1, β → 0, to reverse KL for α → 0, β = 1, and is four times the squared Hellinger distance for α = β = ½ (ABKD,
    arXiv 2505.04560).

    Raises:
        ConfigError: alpha or beta is not above 0.
    """
    if not (alpha > 0 and beta > 0):
        raise ConfigError(
            "alpha and beta must be above 0",
            {"alpha": alpha, "beta": beta},
            why="At alpha = 1, beta = 0 the loss is forward_kl, at alpha = 0, beta = 1 it is reverse_kl; the formula "
            "itself is 0 / 0 there.",
            fix="Name forward_kl or reverse_kl, or choose both above 0.",
        )

    def divergence(o: Outcomes) -> tuple[Tensor, Tensor]:
        of_t, of_s = o.log_t * alpha, o.log_s * beta
        cross = (of_t + of_s).exp_()
        from_student = torch.add(o.log_s * alpha, of_s).exp_().sub_(cross)
        from_teacher = of_t.add_(o.log_t * beta).exp_().sub_(cross)
        total = alpha + beta
        summands = from_teacher.div_(beta * total).add_(from_student, alpha=1 / (alpha * total))
        return summands, from_student.div_(alpha)

    return diverge(block, divergence, temperature)


HALVINGS = 10
"""After so many halvings, the bounds of the head's border differ by a factor of at most 2 ** (log2(2 v) / 1024)."""


def adaptive_kl(
    block: LogitBlock, *, temperature: float = 1.0, mu: float = 0.5
) -> tuple[Float[Tensor, " r"], Float[Tensor, "r v"]]:
    """``T² (g KL(t ‖ s) + (1 − g) KL(s ‖ t))`` with ``g = Σ_head |t − s| / Σ |t − s|``; gradient that of the two with g
    held fixed.

    The head is the smallest set of the teacher's top tokens that holds the mass μ. Forward KL corrects the head first
    and reverse KL the tail; each position takes more of what it needs (arXiv 2404.02657). Everything that a truncated
    signal left out is one outcome.

    Raises:
        ConfigError: mu is not strictly between 0 and 1.
    """
    between("mu", mu, "reverse_kl", "forward_kl")

    def divergence(o: Outcomes) -> tuple[Tensor, Tensor]:
        gap = (o.t - o.s).abs_()
        total = gap.sum(-1, keepdim=True)
        of_head = gap.mul_(head_of(o.t, mu)).sum(-1, keepdim=True)
        share = torch.where(total > 0, of_head / total.clamp(min=torch.finfo(total.dtype).tiny), 0.5).clamp_(max=1)
        summands, grad_terms = of_teacher(o)
        others, other_terms = of_student(o)
        return torch.lerp(others, summands, share), torch.lerp(other_terms, grad_terms, share)

    return diverge(block, divergence, temperature)


def head_of(t: Float[Tensor, "r m"], mass: float) -> Bool[Tensor, "r m"]:
    """Marks the smallest set of each row's top outcomes that holds ``mass``; of equals at the border, the first ones.

    The border's probability is between the largest and ``(1 − mass) / 2m`` (all outcomes below that hold too little to
    matter). It is found by bisection, and only the outcomes that are left between the bounds are sorted.
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

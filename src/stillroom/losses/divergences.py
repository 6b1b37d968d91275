"""Divergences of student and teacher over the vocabulary, in nats per position, with their gradients."""

import inspect
from collections.abc import Callable
from functools import wraps

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from stillroom.losses.block import LogitBlock, Loss, NatsAndGradient, Outcomes
from stillroom.losses.config import LOSSES, Missing

Pointwise = tuple[Tensor, Tensor]
"""The value of a pure function of the outcomes, for ``D(t ‖ s) = Σ_j φ(t_j, s_j)``: the summands φ_j and the *logit
gradient terms* ``w_j = s_j ∂φ/∂s_j``, new tensors [r, m].

Multiples of s − t or s, whose sums are constant, may be added to either, so that summands are at least 0 and both
exactly 0 where t = s.
"""


def divergence(pointwise: Callable[..., Pointwise]) -> Loss:
    """Makes the loss ``(block, *, temperature=1.0, …)`` of a pointwise divergence ``(outcomes, *, …)``.

    It is ``T² · D`` of the distributions at temperature T, and its gradient ``T (w − s Σ w)`` in the student's logits.
    It raises ConfigError where it is given numbers that a recipe may not have.

    The outcomes of a truncated sparse signal are its entries and, as one further outcome, all the others together; an
    id among these has its share of that outcome's w, in proportion to its probability. So an f-divergence is at most
    the full one (data-processing inequality), and reaches it as entries are added. The α-β divergence with α + β other
    than 1 and the adaptive KL are no f-divergences, and may be larger.
    """

    @wraps(pointwise)
    def loss(block: LogitBlock, *, temperature: float = 1.0, **numbers: float) -> NatsAndGradient:
        if numbers:
            LOSSES[pointwise.__name__].checked(numbers)
        o = block.outcomes(temperature)
        summands, gradient = pointwise(o, **numbers)
        nats, total = summands.sum(-1).clamp_(min=0), gradient.sum(-1, keepdim=True)
        if block.sparse is None or o.others is None:
            gradient.addcmul_(o.s, total, value=-1)
        else:
            of_entries = (gradient - o.s * total)[:, :-1]
            residual = o.s[:, -1:].clamp(min=torch.finfo(o.s.dtype).tiny)
            gradient = o.others.mul_(gradient[:, -1:] / residual - total)
            gradient.scatter_add_(-1, block.sparse.ids, of_entries)
        return (nats, gradient) if temperature == 1.0 else (nats.mul_(temperature**2), gradient.mul_(temperature))

    own, kind = list(inspect.signature(pointwise).parameters.values())[1:], inspect.Parameter
    block = kind("block", kind.POSITIONAL_OR_KEYWORD, annotation=LogitBlock)
    temperature = kind("temperature", kind.KEYWORD_ONLY, default=1.0, annotation=float)
    vars(loss)["__signature__"] = inspect.Signature([block, temperature, *own], return_annotation=NatsAndGradient)
    return loss


def of_teacher(o: Outcomes) -> Pointwise:
    """KL(t ‖ s). Each summand includes ``s − t``, so it is at least 0, and the rounding of the normalizers cancels."""
    grad_terms = o.s - o.t
    return torch.addcmul(grad_terms, o.t, o.log_t - o.log_s), grad_terms


def of_student(o: Outcomes) -> Pointwise:
    """KL(s ‖ t); each summand includes ``t − s``."""
    grad_terms = (o.log_s - o.log_t).mul_(o.s)
    return (grad_terms - o.s).add_(o.t), grad_terms


kl_over_outcomes = divergence(of_teacher)


def forward_kl(block: LogitBlock, *, temperature: float = 1.0, missing: Missing = "bucket") -> NatsAndGradient:
    """``T² · KL(t ‖ s) = T² · Σ t (log t − log s)`` at temperature T; gradient ``T (s − t)``.

    It is mass-covering. From a sampled signal it is right in expectation: a single position's value may be negative,
    and so it may be with ``missing="zero"``.

    Args:
        missing: the target that is assumed for everything that a truncated signal left out: see
            :meth:`LogitBlock.targets`.
    """
    if block.sparse is None or not (block.sparse.sampled or missing != "bucket"):
        return kl_over_outcomes(block, temperature=temperature)
    ids, y, entropy = block.targets(temperature, missing)
    nats = -(y * block.log_probs("student", temperature).gather(-1, ids)).sum(-1) - entropy
    gradient = block.probs("student", temperature) * y.sum(-1, keepdim=True)
    gradient.scatter_add_(-1, ids, -y)
    return (nats, gradient) if temperature == 1.0 else (nats * temperature**2, gradient.mul_(temperature))


@divergence
def reverse_kl(o: Outcomes) -> Pointwise:
    """``T² · KL(s ‖ t) = T² · Σ s (log s − log t)`` at temperature T; gradient ``T · s (log s − log t − KL(s ‖ t))``.

    It is mode-seeking.
    """
    return of_student(o)


@divergence
def jensen_shannon(o: Outcomes, *, beta: float = 0.5) -> Pointwise:
    """Generalized Jensen-Shannon: ``T² (β KL(t ‖ m) + (1 − β) KL(s ‖ m))`` with ``m = β t + (1 − β) s``.

    Gradient ``T (w − s Σ w)`` with ``w = (1 − β) s log(s / m)``. Divided by β it tends to forward KL as β → 0, divided
    by 1 − β to reverse KL as β → 1 (arXiv 2306.13649).
    """
    log_t, log_s = over_mixture(o, beta)
    grad_terms = log_s.mul_(o.s).mul_(1 - beta)
    return log_t.mul_(o.t).mul_(beta).add_(grad_terms), grad_terms


@divergence
def skew_kl(o: Outcomes, *, alpha: float = 0.1) -> Pointwise:
    """``T² · KL(t ‖ m)`` with ``m = α t + (1 − α) s``; gradient ``T (w − s Σ w)`` with ``w = (1 − α) s (1 − t / m)``.

    Forward KL whose ratio never passes 1 / α (DistiLLM, arXiv 2402.03898).
    """
    log_t, _ = over_mixture(o, alpha)
    summands = (log_t * o.t).add_(o.s - o.t, alpha=1 - alpha)
    return summands, log_t.expm1_().mul_(o.s).mul_(alpha - 1)


@divergence
def skew_reverse_kl(o: Outcomes, *, alpha: float = 0.1) -> Pointwise:
    """``T² · KL(s ‖ m)`` with ``m = α s + (1 − α) t``; gradient ``T (w − s Σ w)`` with
    ``w = s (log(s / m) + α (1 − s / m))``.

    Reverse KL that stays finite where a token is impossible for the teacher (DistiLLM, arXiv 2402.03898).
    """
    _, log_s = over_mixture(o, 1 - alpha)
    summands = (log_s * o.s).add_(o.t - o.s, alpha=1 - alpha)
    return summands, log_s.sub_(log_s.expm1(), alpha=alpha).mul_(o.s)


def over_mixture(o: Outcomes, share_of_teacher: float) -> tuple[Float[Tensor, "r m"], Float[Tensor, "r m"]]:
    """``log(t / m)`` and ``log(s / m)`` of each outcome."""
    gap = o.log_t - o.log_s
    smaller = (gap > 0).to(gap.dtype).mul_(1 - 2 * share_of_teacher).add_(share_of_teacher)
    down = gap.abs().neg_().expm1_().mul_(smaller).log1p_().neg_()
    return down + gap.clamp(max=0), down.sub_(gap.clamp_(min=0))


@divergence
def total_variation(o: Outcomes) -> Pointwise:
    """``T² · ½ Σ |t − s|``; gradient ``T (w − s Σ w)`` with ``w = ½ s sign(s − t)``.

    At T = 1 it is 1 less the mass that speculative decoding accepts (arXiv 2310.08461). A symmetric and bounded
    distance; it has no unit.
    """
    gap = o.s - o.t
    return gap.abs().div_(2), gap.sign_().mul_(o.s).div_(2)


@divergence
def alpha_beta(o: Outcomes, *, alpha: float = 0.5, beta: float = 0.5) -> Pointwise:
    """``T² / (α β) · Σ [α / c · t^c + β / c · s^c − t^α s^β]`` with ``c = α + β``; gradient ``T (w − s Σ w)`` with
    ``w = (s^c − t^α s^β) / α``.

    A larger α emphasizes where the teacher is confident, a larger β where the student is. It tends to forward KL for
    α = 1, β → 0, to reverse KL for α → 0, β = 1, and is four times the squared Hellinger distance for α = β = ½ (ABKD,
    arXiv 2505.04560).
    """
    of_t, of_s = o.log_t * alpha, o.log_s * beta
    cross = (of_t + of_s).exp_()
    from_student = torch.add(o.log_s * alpha, of_s).exp_().sub_(cross)
    from_teacher = of_t.add_(o.log_t * beta).exp_().sub_(cross)
    total = alpha + beta
    summands = from_teacher.div_(beta * total).add_(from_student, alpha=1 / (alpha * total))
    return summands, from_student.div_(alpha)


HALVINGS = 10
"""After so many halvings, the bounds of the head's border differ by a factor of at most 2 ** (log2(2 v) / 1024)."""


@divergence
def adaptive_kl(o: Outcomes, *, mu: float = 0.5) -> Pointwise:
    """``T² (g KL(t ‖ s) + (1 − g) KL(s ‖ t))`` with ``g = Σ_head |t − s| / Σ |t − s|``; gradient that of the two with g
    held fixed.

    The head is the smallest set of the teacher's top tokens that holds the mass μ. Forward KL corrects the head first
    and reverse KL the tail; each position takes more of what it needs (arXiv 2404.02657). Everything that a truncated
    signal left out is one outcome.
    """
    gap = (o.t - o.s).abs_()
    total = gap.sum(-1, keepdim=True)
    of_head = gap.mul_(head_of(o.t, mu)).sum(-1, keepdim=True)
    share = torch.where(total > 0, of_head / total.clamp(min=torch.finfo(total.dtype).tiny), 0.5).clamp_(max=1)
    summands, grad_terms = of_teacher(o)
    others, other_terms = of_student(o)
    return torch.lerp(others, summands, share), torch.lerp(other_terms, grad_terms, share)


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

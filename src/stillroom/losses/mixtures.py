"""Divergences from a mixture of teacher ``t`` and student ``s``: bounded, also where one holds a token impossible.

With ``δ = log t − log s`` and their mixture m, ``log(m / larger) = log1p(κ expm1(−|δ|))`` where κ is the share that the
smaller of the two has in m: exact where they are equal, and never out of range.
"""

from jaxtyping import Float
from torch import Tensor

from stillroom.losses.block import Block
from stillroom.losses.pointwise import Outcomes, between, diverge


def jensen_shannon(
    block: Block, *, temperature: float = 1.0, beta: float = 0.5
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
        pulls = log_s.mul_(o.s).mul_(1 - beta)
        return log_t.mul_(o.t).mul_(beta).add_(pulls), pulls

    return diverge(block, divergence, temperature)


def skew_kl(
    block: Block, *, temperature: float = 1.0, alpha: float = 0.1
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
    block: Block, *, temperature: float = 1.0, alpha: float = 0.1
) -> tuple[Float[Tensor, " r"], Float[Tensor, "r v"]]:
    """``T² · KL(s ‖ m)`` with ``m = α s + (1 − α) t``; gradient ``T (w − s Σ w)`` with
    ``w = s (log(s / m) + α (1 − s / m))``.

    Reverse KL that stays finite where the teacher holds a token impossible (DistiLLM, arXiv 2402.03898).

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

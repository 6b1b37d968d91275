"""Total variation between teacher ``t`` and student ``s``."""

from jaxtyping import Float
from torch import Tensor

from stillroom.losses.block import Block
from stillroom.losses.pointwise import Outcomes, diverge


def total_variation(block: Block, *, temperature: float = 1.0) -> tuple[Float[Tensor, " r"], Float[Tensor, "r v"]]:
    """``T² · ½ Σ |t − s|``; gradient ``T (w − s Σ w)`` with ``w = ½ s sign(s − t)``.

    At T = 1 it is 1 less the mass that speculative decoding accepts (arXiv 2310.08461). A symmetric and bounded
    distance; it has no unit.
    """
    return diverge(block, variation, temperature)


def variation(o: Outcomes) -> tuple[Tensor, Tensor]:
    gap = o.s - o.t
    return gap.abs().div_(2), gap.sign_().mul_(o.s).div_(2)

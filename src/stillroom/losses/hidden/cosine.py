"""Cosine distance between states."""

from jaxtyping import Float
from torch import Tensor

from stillroom.losses.hidden.pair import EPS, Pair, mean_square


def cosine(pair: Pair) -> Float[Tensor, " n"]:
    """``1 − cos(s, t)``, as ``½ ‖s/‖s‖ − t/‖t‖‖²``: never negative, and exact where the two are near.

    A state whose mean square is below ``EPS`` is divided as if it were ``EPS``; so one of zeros has length 0 rather
    than 1, and counts ½ beside any other.
    """
    student, teacher = (
        states / (mean_square(states).clamp(min=EPS) * states.shape[1]).sqrt() for states in pair.states()
    )
    return (student - teacher).square().sum(-1) / 2

"""Normalised states: each position's brought to one size before they are compared."""

from typing import Literal

from jaxtyping import Float
from torch import Tensor

from stillroom.head import accumulator
from stillroom.losses.hidden.pair import EPS, mean_square

Normalise = Literal["rms", "layer_norm"]


def normalised(states: Float[Tensor, "n d"], by: Normalise) -> Float[Tensor, "n d"]:
    """Each row divided by its RMS over channels (``rms``), or centred and divided by its standard deviation
    (``layer_norm``), as models' norms do it: ``EPS`` is added to the mean square, so a row of zeros stays one.

    In float32, or float64 where the states are.
    """
    states = states.to(accumulator(states.dtype))
    if by == "layer_norm":
        states = states - states.mean(-1, keepdim=True)
    return states * (mean_square(states) + EPS).rsqrt()

"""Distances between hidden states of student and teacher: one value per position. One family a file."""

from stillroom.losses.hidden.channel_kl import channel_kl
from stillroom.losses.hidden.cka import linear_cka
from stillroom.losses.hidden.cosine import cosine
from stillroom.losses.hidden.mse import channel_scale, channel_scaled_mse, mse, normalized_mse
from stillroom.losses.hidden.normalise import Normalise, normalised
from stillroom.losses.hidden.pair import Distance, Pair
from stillroom.losses.hidden.relation import attention_relation

DISTANCES: dict[str, Distance] = {
    distance.__name__: distance
    for distance in (
        mse,
        normalized_mse,
        channel_scaled_mse,
        cosine,
        channel_kl,
        linear_cka,
        attention_relation,
    )
}
"""Every distance by its name in a recipe."""

__all__ = [
    "DISTANCES",
    "Distance",
    "Normalise",
    "Pair",
    "attention_relation",
    "channel_kl",
    "channel_scale",
    "channel_scaled_mse",
    "cosine",
    "linear_cka",
    "mse",
    "normalised",
    "normalized_mse",
]

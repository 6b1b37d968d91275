"""The settings of the hidden-state objective: which layers are compared, through what, and by which distance."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from stillroom.config import AboveZero, Config, Positive
from stillroom.layers import Layer


# --- which layers ----------------------------------------------------------------------------------------------------
class Auto(Config):
    """What suits student and teacher."""

    kind: Literal["auto"]


class Uniform(Config):
    """Spread over the whole depth: the student's layer i is compared with the teacher's round(i·(Lt−1)/(Ls−1))."""

    kind: Literal["uniform"]
    one_in: Positive = 1
    """Take one in so many of the student's layers, counted back from the last."""


class Last(Config):
    """The last layers of both."""

    kind: Literal["last"]
    count: Positive
    """How many."""


class Every(Config):
    """The student's layer i with the teacher's step·(i+1)−1, as far as there are such."""

    kind: Literal["every"]
    step: Positive
    """The teacher's layers to one of the student's."""


class Kept(Config):
    """For a student cut from this teacher: each of its layers with the one that it was."""

    kind: Literal["kept"]


class Pairs(Config):
    """Pairs by name."""

    kind: Literal["pairs"]
    pairs: Annotated[tuple[Annotated[tuple[Layer, Layer], Field(strict=False)], ...], Field(strict=False, min_length=1)]
    """The student's layer and the teacher's, of each."""


def _named(value: object) -> object:
    """``uniform`` for {kind: uniform}, {last: 3} for {kind: last, count: 3}, and a list for {kind: pairs, pairs: …}."""
    if isinstance(value, list | tuple):
        return {"kind": "pairs", "pairs": value}
    if isinstance(value, dict) and len(value) == 1:
        ((name, number),) = value.items()
        setting = {"last": "count", "every": "step"}.get(name)
        return value if setting is None else {"kind": name, setting: number}
    return _by_name(value)


def _by_name(value: object) -> object:
    return {"kind": value} if isinstance(value, str) else value


LayerMap = Annotated[
    Annotated[Auto | Uniform | Last | Every | Kept | Pairs, Field(discriminator="kind")], BeforeValidator(_named)
]


# --- through what ----------------------------------------------------------------------------------------------------
class Linear(Config):
    """A matrix from the student's width to the teacher's, trained with the student and not exported."""

    kind: Literal["linear"]
    shared: bool = False
    """One for all pairs of layers, and not one for each."""
    start: Literal["orthogonal", "identity", "least_squares"] = "orthogonal"
    """What it starts from: random and orthogonal; the student's channels in the teacher's first places (for a student
    cut from this teacher, in the places that they had); or what fits the states of the first step best."""


Projector = Annotated[Annotated[Auto | Linear, Field(discriminator="kind")] | None, BeforeValidator(_by_name)]


# --- by which distance -----------------------------------------------------------------------------------------------
class MSE(Config):
    """Mean squared difference over the channels."""

    kind: Literal["mse"]


class NormalizedMSE(Config):
    """Mean squared difference over the teacher's mean square, token by token."""

    kind: Literal["normalized_mse"]


class ChannelScaledMSE(Config):
    """Mean squared difference, each channel in units of the teacher's own in the first step: no channel dominates."""

    kind: Literal["channel_scaled_mse"]


class Cosine(Config):
    """1 less the cosine of the angle between them."""

    kind: Literal["cosine"]


class ChannelKL(Config):
    """KL between the softmaxes over the channels."""

    kind: Literal["channel_kl"]
    temperature: AboveZero = 1.0
    """Both sides' states are divided by it, and the distance multiplied by its square."""


class LinearCKA(Config):
    """1 less the linear centred kernel alignment within each document; needs no projector."""

    kind: Literal["linear_cka"]


class AttentionRelation(Config):
    """KL of how queries, keys and values relate to each other among the positions of a document (MiniLMv2)."""

    kind: Literal["attention_relation"]
    heads: Positive | Literal["auto"] = "auto"
    """Relation heads, which need not be those of either model; auto is the most, up to the student's attention heads,
    that divide the widths of all queries, keys and values."""


Distance = Annotated[
    Annotated[
        MSE | NormalizedMSE | ChannelScaledMSE | Cosine | ChannelKL | LinearCKA | AttentionRelation,
        Field(discriminator="kind"),
    ],
    BeforeValidator(_by_name),
]

PROJECTION_FREE = ("linear_cka", "attention_relation")


class HiddenSettings(Config):
    """What the hidden objective has besides a weight."""

    distance: Distance = NormalizedMSE(kind="normalized_mse")
    """How far apart two states are; by name alone, or with its settings."""
    layers: LayerMap = Auto(kind="auto")
    """Which layers are compared: auto, uniform, kept, {last: 3}, {every: 2}; or pairs of the student's and the
    teacher's, counted from 0, such as [[0, 1], [2, 5], [final_norm, final_norm]]; `embeddings` is what the first layer
    reads, `final_norm` what the head reads. auto is kept where the student was cut from this teacher, and else
    uniform."""
    projector: Projector = Auto(kind="auto")
    """What takes the student's states to the teacher's width: linear, or null for nothing; auto is linear where the
    widths differ and the distance needs them to agree."""
    normalise: Literal["rms", "layer_norm"] | None = None
    """Before they are compared, each state is divided by its own root mean square; or centred and scaled to a variance
    of 1."""
    weights_by_layer: Annotated[tuple[Annotated[float, Field(ge=0)], ...], Field(strict=False)] | None = None
    """What each pair counts, in the map's order; null is their mean."""

    @model_validator(mode="after")
    def _hidden_fits_together(self) -> Any:
        name = self.distance.kind
        if name in PROJECTION_FREE and isinstance(self.projector, Linear):
            raise ValueError(f"distance {name} compares relations between positions, and takes no projector")
        if name == "attention_relation" and self.normalise is not None:
            raise ValueError("distance attention_relation scales its queries, keys and values itself: no `normalise`")
        return self

"""The settings of every objective, and the tables LOSSES and DISTANCES. It imports no torch.

A table names each function by a string, so that a recipe is read, and explained, before torch is loaded.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, model_validator

from stillroom.config import COLDEST, HOTTEST, Config, NotNegative, Positive, Temperature
from stillroom.layers import Layer
from stillroom.schema import explain_error

Missing = Literal["bucket", "renormalise", "zero", "label"]
"""The target that is assumed for everything that a truncated signal left out."""
Normalize = Literal["rms", "layer_norm"]


@dataclass(frozen=True)
class LossEntry:
    """Everything that other code has to know of a loss, or of a distance of hidden states."""

    function: str
    """Its module in ``stillroom.losses`` and its name, as ``module:name``; it is ``kind`` in a recipe."""
    settings: type[Config]
    """Its settings in a recipe; besides weights they are the function's keyword arguments, with the same defaults."""
    formula: str
    """Its value at one position, as docs/guide/losses.md and hidden.md have it."""
    kernel_numbers: tuple[str, ...] | None = None
    """The arguments that are the numbers of its kernel term, at most two; None where no kernel knows it."""
    unit: str = "nats"
    """The unit of its value, in which the name of its column in metrics.jsonl ends; "loss" where it has none."""
    signal: Literal["none", "sampled", "truncated", "dense"] = "truncated"
    """The least that it is taken from without bias: labels alone, sampled entries, exact ones, or all logits."""

    def load(self) -> Callable[..., Any]:
        """Imports the function, and torch with it."""
        module, _, name = self.function.partition(":")
        return getattr(import_module(f"stillroom.losses.{module}"), name)

    def checked(self, arguments: Mapping[str, Any]) -> Any:
        """The settings with these values in the place of defaults.

        Raises:
            ConfigError: a recipe could not have them.
        """
        kind = self.function.partition(":")[2]
        try:
            return self.settings.model_validate({"kind": kind, **arguments})
        except ValidationError as error:
            raise explain_error(self.settings, error, lambda _: f"the arguments of {kind}") from None


def _table(*entries: LossEntry) -> dict[str, LossEntry]:
    return {entry.function.partition(":")[2]: entry for entry in entries}


def _above_zero(at_zero: str, at_one: str | None = None) -> AfterValidator:
    """A number above 0, and below 1 where there is an ``at_one``; at each end the loss would be another one."""

    def check(value: float) -> float:
        if at_one is None and value <= 0:
            raise ValueError(f"it must be above 0: at 0 the loss is {at_zero}")
        if at_one is not None and not 0 < value < 1:
            raise ValueError(f"it must lie strictly between 0 and 1: at 0 the loss is {at_zero}, at 1 {at_one}")
        return value

    return AfterValidator(check)


class Schedule(Config):
    """A number that changes over the run; one that does not is written as the number itself."""

    kind: Literal["linear", "cosine"]
    """The change is a straight line, or slow at both ends."""
    start: NotNegative
    """At the first step."""
    stop: NotNegative
    """At the end of the change, and from then on."""
    over: Annotated[float, Field(gt=0, le=1)] = 1.0
    """The share of the run's steps that the change takes."""


class ByEntropy(Config):
    """A token weight that is linear in the entropy of the teacher or the student (at temperature 1)."""

    kind: Literal["teacher_entropy", "student_entropy"]
    certain: NotNegative = 0.0
    """The weight of a token where the entropy is 0."""
    uncertain: NotNegative = 1.0
    """The weight of a token where the entropy is log(vocabulary size), which is a uniform distribution."""


class ByColumn(Config):
    """A token weight that data.weight gives to each row."""

    kind: Literal["data"]


class LogitObjective(Config):
    """An objective that compares next-token distributions: what all of them can be told."""

    if TYPE_CHECKING:
        kind: Any  # each has its own, behind the settings above

    weight: NotNegative | Schedule = 1.0
    """Its share in the sum of objectives; or how the share changes over the run."""
    token_weight: Annotated[ByEntropy | ByColumn, Field(discriminator="kind")] | None = None
    """The weight of each token in it; null weights all alike. Reported values are without it."""

    @property
    def needs_teacher(self) -> bool:
        """Whether a signal is needed: to compare with, or to weigh the tokens."""
        weighs = isinstance(self.token_weight, ByEntropy) and self.token_weight.kind == "teacher_entropy"
        return weighs or not isinstance(self, CrossEntropy)

    @property
    def temperatures(self) -> tuple[float, ...]:
        """The temperatures at which the signal must be known; for a schedule, its two ends."""
        temperature = getattr(self, "temperature", 1.0)
        return (temperature.start, temperature.stop) if isinstance(temperature, Schedule) else (temperature,)


class _Tempered(LogitObjective):
    temperature: Temperature | Schedule = 1.0
    """Both sides' logits are divided by it, and the loss multiplied by its square; or how it changes over the run."""

    @model_validator(mode="after")
    def _is_bounded(self) -> "_Tempered":
        if not all(COLDEST <= temperature <= HOTTEST for temperature in self.temperatures):
            raise ValueError(f"a temperature must stay between {COLDEST} and {HOTTEST:g}")
        return self


class ForwardKL(_Tempered):
    """KL(teacher ‖ student): mass-covering."""

    kind: Literal["forward_kl"]
    missing: Missing = "bucket"
    """The target for everything that a truncated store left out: it is one outcome of known mass (exact, a lower bound
    of the whole); its mass is distributed over the entries (biased, as most tools do), dropped, or put on the data's
    next token."""


class ReverseKL(_Tempered):
    """KL(student ‖ teacher): mode-seeking."""

    kind: Literal["reverse_kl"]


class JensenShannon(_Tempered):
    """Generalized Jensen-Shannon: both KLs from the mixture of teacher and student."""

    kind: Literal["jensen_shannon"]
    beta: Annotated[float, _above_zero("forward_kl", "reverse_kl")] = 0.5
    """The teacher's share in the mixture: near 0 it acts as forward KL, near 1 as reverse KL."""


class SkewKL(_Tempered):
    """KL(teacher ‖ mixture): forward KL whose ratio is bounded."""

    kind: Literal["skew_kl"]
    alpha: Annotated[float, _above_zero("forward_kl", "0 everywhere")] = 0.1
    """The teacher's share in the mixture."""


class SkewReverseKL(_Tempered):
    """KL(student ‖ mixture): reverse KL that is bounded."""

    kind: Literal["skew_reverse_kl"]
    alpha: Annotated[float, _above_zero("reverse_kl", "0 everywhere")] = 0.1
    """The student's share in the mixture."""


class AdaptiveKL(_Tempered):
    """Forward and reverse KL, at each position in the proportion in which head and tail are wrong."""

    kind: Literal["adaptive_kl"]
    mu: Annotated[float, _above_zero("reverse_kl", "forward_kl")] = 0.5
    """The head is the smallest set of the teacher's top tokens that holds this mass."""


class AlphaBeta(_Tempered):
    """The α-β divergence: between forward KL (1, 0), Hellinger (½, ½) and reverse KL (0, 1)."""

    kind: Literal["alpha_beta"]
    alpha: Annotated[float, _above_zero("reverse_kl, where beta is 1")] = 0.5
    """Power of the teacher's probabilities: a larger one emphasizes where the teacher is sure."""
    beta: Annotated[float, _above_zero("forward_kl, where alpha is 1")] = 0.5
    """Power of the student's probabilities: a larger one emphasizes where the student is sure."""


class TotalVariation(_Tempered):
    """Half the summed difference of the probabilities: 1 less the mass that speculative decoding accepts."""

    kind: Literal["total_variation"]


class LogitMSE(LogitObjective):
    """Mean squared difference of the logits, each side less its mean."""

    kind: Literal["logit_mse"]


class _Ranking(LogitObjective):
    k: Annotated[int, Field(ge=2)] = 16
    """The number of the teacher's top tokens that are put in order."""


class HingeRanking(_Ranking):
    """Keep the order of the teacher's top tokens, with a margin."""

    kind: Literal["hinge_ranking"]
    margin: Annotated[float, Field(gt=0)] = 1.0
    """The distance in logits between each of them and those behind it."""


class LogisticRanking(_Ranking):
    """Keep the order of the teacher's top tokens, smoothly."""

    kind: Literal["logistic_ranking"]


class CrossEntropy(_Tempered):
    """Cross-entropy with the data's own next tokens ("hard labels")."""

    kind: Literal["cross_entropy"]
    smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Label smoothing: this share of the target is spread over all tokens."""


LOSSES = _table(
    LossEntry("divergences:forward_kl", ForwardKL, "T² KL(t‖s) = T² Σ t (log t − log s)", (), signal="sampled"),
    LossEntry("divergences:reverse_kl", ReverseKL, "T² KL(s‖t) = T² Σ s (log s − log t)", ()),
    LossEntry("divergences:jensen_shannon", JensenShannon,
              "T² (β KL(t‖m) + (1 − β) KL(s‖m)), m = β t + (1 − β) s", ("beta",)),
    LossEntry("divergences:skew_kl", SkewKL, "T² KL(t‖m), m = α t + (1 − α) s", ("alpha",)),
    LossEntry("divergences:skew_reverse_kl", SkewReverseKL, "T² KL(s‖m), m = α s + (1 − α) t", ("alpha",)),
    LossEntry("divergences:adaptive_kl", AdaptiveKL,
              "T² (g KL(t‖s) + (1 − g) KL(s‖t)), g the head's share of Σ abs(t − s)", ("mu",)),
    LossEntry("divergences:alpha_beta", AlphaBeta,
              "T²/(αβ) Σ [α/c t^c + β/c s^c − t^α s^β], c = α + β", ("alpha", "beta")),
    LossEntry("divergences:total_variation", TotalVariation, "T² ½ Σ abs(t − s)", (), unit="loss"),
    LossEntry("logits:logit_mse", LogitMSE, "1/v Σ (a − b)², each less its mean", (), "loss", "dense"),
    LossEntry("logits:hinge_ranking", HingeRanking,
              "mean over pairs i before j of the teacher's k likeliest: max(0, margin − (a_i − a_j))", unit="loss"),
    LossEntry("logits:logistic_ranking", LogisticRanking, "mean over the same pairs: log(1 + exp(a_j − a_i))",
              unit="loss"),
    LossEntry("logits:cross_entropy", CrossEntropy,
              "−T² Σ y log s; smoothed by ε, y is 1 − ε on the next token and ε/v more on each column", ("smoothing",),
              signal="none"),
)  # fmt: skip
"""Every loss of next-token distributions by its ``kind`` in a recipe."""


class Auto(Config):
    """A choice by student and teacher."""

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
    """The number of layers."""


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


class Linear(Config):
    """A matrix from the student's width to the teacher's, trained with the student and not exported."""

    kind: Literal["linear"]
    shared: bool = False
    """One for all pairs of layers, and not one for each."""
    start: Literal["orthogonal", "identity", "least_squares"] = "orthogonal"
    """Its start: random and orthogonal; the student's channels in the teacher's first places (for a student
    cut from this teacher, in the places that they had); or what fits the states of the first step best."""


Projector = Annotated[Annotated[Auto | Linear, Field(discriminator="kind")] | None, BeforeValidator(_by_name)]


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
    temperature: Temperature = 1.0
    """Both sides' states are divided by it, and the distance multiplied by its square."""


class LinearCKA(Config):
    """1 less the linear centered kernel alignment within each document; needs no projector."""

    kind: Literal["linear_cka"]


class AttentionRelation(Config):
    """KL of how queries, keys and values relate to each other among the positions of a document (MiniLMv2)."""

    kind: Literal["attention_relation"]
    heads: Positive | Literal["auto"] = "auto"
    """Relation heads, which need not be those of either model; auto is the most, up to the student's attention heads,
    that divide the widths of all queries, keys and values."""


DISTANCES = _table(
    LossEntry("hidden:mse", MSE, "Σ (s − t)² / d"),
    LossEntry("hidden:normalized_mse", NormalizedMSE, "Σ (s − t)² / Σ t²"),
    LossEntry("hidden:channel_scaled_mse", ChannelScaledMSE,
              "Σ ((s − t)/σ)² / d, σ the channel's own size in the teacher's first step"),
    LossEntry("hidden:cosine", Cosine, "1 − cos(s, t)"),
    LossEntry("hidden:channel_kl", ChannelKL, "T² KL(softmax(t/T) ‖ softmax(s/T)) over the channels"),
    LossEntry("hidden:linear_cka", LinearCKA,
              "1 − ‖XᵀY‖² / (‖XᵀX‖ ‖YᵀY‖), X and Y the states of a document, centered (arXiv 1905.00414)"),
    LossEntry("hidden:attention_relation", AttentionRelation,
              "Σ over queries, keys, values of the mean over heads of KL(teacher's ‖ student's softmax of xᵢ·xⱼ/√w "
              "over the document's kept positions j ≤ i) (MiniLMv2, arXiv 2012.15828)"),
)  # fmt: skip
"""Every distance of hidden states by its name in a recipe."""
PROJECTION_FREE = ("linear_cka", "attention_relation")

if TYPE_CHECKING:
    Distance = MSE | NormalizedMSE | ChannelScaledMSE | Cosine | ChannelKL | LinearCKA | AttentionRelation
else:
    Distance = Annotated[
        Annotated[Union[tuple(e.settings for e in DISTANCES.values())], Field(discriminator="kind")],  # noqa: UP007
        BeforeValidator(_by_name),
    ]


class HiddenObjective(Config):
    """The teacher's hidden states, layer by layer."""

    distance: Distance = NormalizedMSE(kind="normalized_mse")
    """The distance between two states; by name alone, or with its settings."""
    layers: LayerMap = Auto(kind="auto")
    """The layers that are compared: auto, uniform, kept, {last: 3}, {every: 2}; or pairs of the student's and the
    teacher's, counted from 0, such as [[0, 1], [2, 5], [final_norm, final_norm]]; `embeddings` is what the first layer
    reads, `final_norm` what the head reads. auto is kept where the student was cut from this teacher, and else
    uniform."""
    projector: Projector = Auto(kind="auto")
    """The map of the student's states to the teacher's width: linear, or null for nothing; auto is linear where the
    widths differ and the distance needs them to agree."""
    normalise: Normalize | None = None
    """Before they are compared, each state is divided by its own root mean square; or centered and scaled to a variance
    of 1."""
    weights_by_layer: Annotated[tuple[Annotated[float, Field(ge=0)], ...], Field(strict=False)] | None = None
    """The weight of each pair, in the map's order; null is their mean."""
    kind: Literal["hidden"]
    weight: NotNegative | Schedule = 1.0
    """Its share in the sum of objectives; or how the share changes over the run."""
    token_weight: ByColumn | None = None
    """The weight of each token in it, by data.weight; null weights all alike. Reported values are without it."""

    @model_validator(mode="after")
    def _hidden_fits_together(self) -> Any:
        name = self.distance.kind
        if name in PROJECTION_FREE and isinstance(self.projector, Linear):
            raise ValueError(f"distance {name} compares relations between positions, and takes no projector")
        if name == "attention_relation" and self.normalise is not None:
            raise ValueError("distance attention_relation scales its queries, keys and values itself: no `normalise`")
        return self

    @property
    def needs_teacher(self) -> bool:
        return True


if TYPE_CHECKING:
    ObjectiveConfig = LogitObjective | HiddenObjective
else:
    ObjectiveConfig = Annotated[
        Union[(*(e.settings for e in LOSSES.values()), HiddenObjective)], Field(discriminator="kind")
    ]

"""The objectives of `stillroom distill`: each loss with its weight, its schedule and what each token counts."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from stillroom.config import AboveZero, Config, NotNegative
from stillroom.distill.hidden_config import HiddenSettings


def between(at_zero: str, at_one: str) -> AfterValidator:
    """A share strictly between 0 and 1, at whose ends the loss would be another."""

    def check(value: float) -> float:
        if not 0 < value < 1:
            raise ValueError(f"it must lie strictly between 0 and 1: at 0 the loss is {at_zero}, at 1 {at_one}")
        return value

    return AfterValidator(check)


class Schedule(Config):
    """A number that changes over the run; one that does not is written as the number itself."""

    kind: Literal["linear", "cosine"]
    """In a straight line, or slowly at both ends."""
    start: NotNegative
    """At the first step."""
    stop: NotNegative
    """At the end of the change, and from then on."""
    over: Annotated[float, Field(gt=0, le=1)] = 1.0
    """The share of the run's steps that the change takes."""


class ByEntropy(Config):
    """Each token counts by how unsure teacher or student is of it (at temperature 1), in a straight line."""

    kind: Literal["teacher_entropy", "student_entropy"]
    certain: NotNegative = 0.0
    """What a token counts where the entropy is 0."""
    uncertain: NotNegative = 1.0
    """What a token would count where it is log(columns), which is all columns alike."""


class ByColumn(Config):
    """Each token counts what data.weight says of its row."""

    kind: Literal["data"]


class _Objective(Config):
    weight: NotNegative | Schedule = 1.0
    """Its share in the sum of objectives; or how the share changes over the run."""
    token_weight: Annotated[ByEntropy | ByColumn, Field(discriminator="kind")] | None = None
    """What each token counts in it; null counts all alike. What is reported is without it."""

    @property
    def needs_teacher(self) -> bool:
        """Whether a signal is needed: to compare with, or to weigh the tokens."""
        weighs = isinstance(self.token_weight, ByEntropy) and self.token_weight.kind == "teacher_entropy"
        return weighs or not isinstance(self, CrossEntropy)

    @property
    def temperatures(self) -> tuple[float, ...]:
        """Those at which the signal must be known; the ends of a schedule stand for all between."""
        temperature = getattr(self, "temperature", 1.0)
        return (temperature.start, temperature.stop) if isinstance(temperature, Schedule) else (temperature,)


class _Tempered(_Objective):
    temperature: AboveZero | Schedule = 1.0
    """Both sides' logits are divided by it, and the loss multiplied by its square; or how it changes over the run."""

    @model_validator(mode="after")
    def _above_zero(self) -> "_Tempered":
        if not all(temperature > 0 for temperature in self.temperatures):
            raise ValueError("a temperature must stay above 0")
        return self


class ForwardKL(_Tempered):
    """KL(teacher ‖ student): cover all that the teacher may say."""

    kind: Literal["forward_kl"]
    missing: Literal["bucket", "renormalise", "zero", "label"] = "bucket"
    """Of a truncated store, what the teacher is taken to say of all that was left out: it is one outcome of known mass
    (exact, a lower bound of the whole); it is shared out among the entries (biased, as most tools do); nothing; or the
    data's next token."""


class ReverseKL(_Tempered):
    """KL(student ‖ teacher): seek what the teacher is likely to say."""

    kind: Literal["reverse_kl"]


class JensenShannon(_Tempered):
    """Generalised Jensen-Shannon: both KLs from the mixture of teacher and student."""

    kind: Literal["jensen_shannon"]
    beta: Annotated[float, between("forward_kl", "reverse_kl")] = 0.5
    """The teacher's share in the mixture: near 0 it acts as forward KL, near 1 as reverse KL."""


class SkewKL(_Tempered):
    """KL(teacher ‖ mixture): forward KL whose ratio is bounded."""

    kind: Literal["skew_kl"]
    alpha: Annotated[float, between("forward_kl", "0 everywhere")] = 0.1
    """The teacher's share in the mixture."""


class SkewReverseKL(_Tempered):
    """KL(student ‖ mixture): reverse KL that is bounded."""

    kind: Literal["skew_reverse_kl"]
    alpha: Annotated[float, between("reverse_kl", "0 everywhere")] = 0.1
    """The student's share in the mixture."""


class AdaptiveKL(_Tempered):
    """Forward and reverse KL, at each position in the proportion in which head and tail are wrong."""

    kind: Literal["adaptive_kl"]
    mu: Annotated[float, between("reverse_kl", "forward_kl")] = 0.5
    """The head is the teacher's likeliest tokens that hold this mass."""


class AlphaBeta(_Tempered):
    """The α-β divergence: between forward KL (1, 0), Hellinger (½, ½) and reverse KL (0, 1)."""

    kind: Literal["alpha_beta"]
    alpha: AboveZero = 0.5
    """Power of the teacher's probabilities: more weighs where the teacher is sure."""
    beta: AboveZero = 0.5
    """Power of the student's probabilities: more weighs where the student is sure."""


class TotalVariation(_Tempered):
    """Half the summed difference of the probabilities: 1 less what speculative decoding accepts."""

    kind: Literal["total_variation"]


class LogitMSE(_Objective):
    """Mean squared difference of the logits, each side less its mean."""

    kind: Literal["logit_mse"]


class HingeRanking(_Objective):
    """Keep the order of the teacher's likeliest tokens, with a margin."""

    kind: Literal["hinge_ranking"]
    k: Annotated[int, Field(ge=2)] = 16
    """How many of the teacher's likeliest tokens are put in order."""
    margin: Annotated[float, Field(gt=0)] = 1.0
    """How far, in logits, each is to be before those behind it."""


class LogisticRanking(_Objective):
    """Keep the order of the teacher's likeliest tokens, smoothly."""

    kind: Literal["logistic_ranking"]
    k: Annotated[int, Field(ge=2)] = 16
    """How many of the teacher's likeliest tokens are put in order."""


class CrossEntropy(_Tempered):
    """Cross-entropy with the data's own next tokens ("hard labels")."""

    kind: Literal["cross_entropy"]
    smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Label smoothing: this share of the target is spread over all columns."""


class HiddenObjective(HiddenSettings):
    """The teacher's inner states, layer by layer."""

    kind: Literal["hidden"]
    weight: NotNegative | Schedule = 1.0
    """Its share in the sum of objectives; or how the share changes over the run."""
    token_weight: ByColumn | None = None
    """What each token counts in it, by data.weight; null counts all alike. What is reported is without it."""

    @property
    def needs_teacher(self) -> bool:
        return True


LogitObjective = (
    ForwardKL
    | ReverseKL
    | JensenShannon
    | SkewKL
    | SkewReverseKL
    | AdaptiveKL
    | AlphaBeta
    | TotalVariation
    | LogitMSE
    | HingeRanking
    | LogisticRanking
    | CrossEntropy
)
"""What is compared in the distribution of the next token."""

ObjectiveConfig = Annotated[LogitObjective | HiddenObjective, Field(discriminator="kind")]

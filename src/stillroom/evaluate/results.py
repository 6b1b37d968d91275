"""Results: everything that an evaluation found, as results.json holds it. The report is made of this file alone."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Role = Literal["teacher", "distilled", "baseline", "other"]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Number(_Part):
    """A measured number with what is known of its error."""

    value: float
    error: float | None = None
    """Its standard error."""
    low: float | None = None
    """The 95 % interval."""
    high: float | None = None


class ModelFacts(_Part):
    """A model that was evaluated."""

    name: str
    """The name in the command: teacher, distilled, baseline or any other."""
    role: Role
    model: str
    """Its folder, hub name or address."""
    fingerprint: str
    tokenizer: str | None
    """The fingerprint of its tokenizer; None for a server."""
    num_parameters: int | None
    size_bytes: int | None
    """The size of its weight files."""
    tokens_per_s: float | None = None
    """Scored in the pass over the held-out text."""
    peak_memory_bytes: int | None = None


class Text(_Part):
    """The held-out text."""

    name: str
    fingerprint: str
    num_documents: int
    num_tokens: int
    """Predicted tokens, in the teacher's tokens."""
    num_bytes: int | None
    """UTF-8 bytes of them; None where the tokenizer drops some of the text."""


class Difference(_Part):
    """Two models on the same items."""

    what: str
    """The metric, or task and metric."""
    a: str
    b: str
    value: float
    """a less b."""
    low: float
    high: float
    """The 95 % interval by paired bootstrap."""
    num_items: int
    p_value: float | None = None
    """McNemar's, for scores of 0 and 1."""
    sentence: str
    """The difference in words; no winner is named where the interval spans zero."""


class TaskResult(_Part):
    """One benchmark."""

    name: str
    source: Literal["local", "lm-eval"]
    version: str
    shots: int
    num_items: int
    metric: str
    """The metric that is shown first."""
    higher_is_better: bool = True
    scores: dict[str, dict[str, Number]] = Field(default_factory=dict)
    """The numbers by model and metric, in the units of the metric (shares of 1, not per cent)."""
    normalised: dict[str, Number] = Field(default_factory=dict)
    """The score by model that is 0 at chance and 1 at perfect, where there is an official normalization or a
    known chance level."""
    differences: tuple[Difference, ...] = ()
    fingerprint: str | None = None
    """The fingerprint of a local task: of its questions and of the answers that count as right."""
    items: str | None = None
    """The file of per-item results, beside results.json."""
    failed: str | None = None
    """The reason why it was not run for the models that have no scores."""


class Breakdown(_Part):
    """The mean KL of a model to the teacher in bins of tokens."""

    by: Literal["token_frequency", "position", "teacher_entropy"]
    labels: tuple[str, ...]
    """The labels of the bins, in order."""
    num_tokens: tuple[int, ...]
    forward_kl_nats: dict[str, tuple[float | None, ...]]
    """The mean of each bin by model; None where a bin is empty."""


class Passage(_Part):
    """A passage of the text in which a model is far from the teacher."""

    document: str
    first: int
    """The place of its first token in the document."""
    mean_kl_nats: float
    tokens: tuple[str, ...]
    kl_nats: tuple[float, ...]
    """The KL of the prediction of each token."""


class Results(_Part):
    """Everything that the report shows."""

    format: Literal[1] = 1
    models: tuple[ModelFacts, ...]
    text: Text | None = None
    metrics: dict[str, dict[str, Number]] = Field(default_factory=dict)
    """The numbers by model and metric: cross_entropy_nats, perplexity, bits_per_byte, forward_kl_nats,
    forward_kl_p95_nats, reverse_kl_nats, reverse_kl_p95_nats, top1_agreement, top10_overlap, accepted_mass,
    speculative_tokens (expected tokens a step at γ = 4), entropy_nats, entropy_ratio, calibration_error,
    recovered_gap."""
    refused: dict[str, dict[str, str]] = Field(default_factory=dict)
    """The reason by model and metric why it was not measured."""
    differences: tuple[Difference, ...] = ()
    """The differences of the metrics."""
    tasks: tuple[TaskResult, ...] = ()
    breakdowns: tuple[Breakdown, ...] = ()
    worst: dict[str, tuple[Passage, ...]] = Field(default_factory=dict)
    """The passages by model in which it is furthest from the teacher."""
    runs: dict[str, str] = Field(default_factory=dict)
    """The folder by model of the run that made it, whose metrics.jsonl are drawn, where it is known."""
    command: str
    """The command that repeats the evaluation."""
    versions: dict[str, str] = Field(default_factory=dict)
    machine: dict[str, str | int] = Field(default_factory=dict)

"""Settings of the signals that are kept: distributions, hidden states, and those that are imported."""

from typing import Annotated, Literal

from pydantic import Field, field_validator

from stillroom.config import Config, PathText
from stillroom.layers import Layer, in_order

SHARD_POSITIONS = 2**20
"""The default size of a shard, in positions."""

Entries = Annotated[int, Field(gt=0, le=65536)]

Step = Annotated[float, Field(ge=0.001, le=1)]

Temperatures = Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(strict=False)]


class _Quantized(Config):
    step: Step = 0.1
    """Log-probabilities are kept as whole multiples of this many nats; it costs about step²/24 nats."""
    label: bool = False
    """Keep the log-probability of the data's own next token too, by which the teacher's cross-entropy is known."""


class _Truncated(_Quantized):
    entropy: bool = False
    """Keep the entropy of the whole distribution too."""
    temperatures: Temperatures = ()
    """Temperatures besides 1 at which it will be used; the mass left out is kept at each."""


class TopK(_Truncated):
    """The k likeliest tokens, and the mass of all others as one (the bucket)."""

    kind: Literal["top_k"]
    k: Entries = 50
    """The number of tokens."""


class TopP(_Truncated):
    """The likeliest tokens up to a share of the mass (the nucleus), and the bucket."""

    kind: Literal["top_p"]
    mass: Annotated[float, Field(gt=0, lt=1)] = 0.98
    """The share that the tokens hold together; no more are kept than it takes."""
    most: Entries = 100
    """But no more than these."""


class Sampled(_Quantized):
    """Tokens drawn with replacement, with how often each came: unbiased for forward KL (arXiv 2503.16870)."""

    kind: Literal["sampled"]
    draws: Entries = 50
    """The number of draws; each weighs 1 / draws."""


class HeadAndSample(_Quantized):
    """The likeliest tokens exactly and draws from the tail: unbiased for forward KL, with much less noise."""

    kind: Literal["head_and_sample"]
    head: Entries = 12
    """Exact entries at the most."""
    draws: Entries = 8
    """Draws from the tail at the most; each weighs the same, in all as much as the tail."""
    least: Annotated[float, Field(ge=0, lt=1)] = 0.002
    """A token less likely than this is left to the draws, and a draw weighs at least this much, so that confident
    positions take few entries; 0 takes `head` entries and `draws` draws at every position."""


class Full(Config):
    """Every logit in float32: only for tests and tiny vocabularies."""

    kind: Literal["full"]


SignalConfig = Annotated[TopK | TopP | Sampled | HeadAndSample | Full, Field(discriminator="kind")]

QuantizedSignal = TopK | TopP | Sampled | HeadAndSample

AnySignal = QuantizedSignal | Full

SAMPLED = ("sampled", "head_and_sample")


class HiddenStatesConfig(Config):
    """States of some of the teacher's layers at each position."""

    layers: Annotated[tuple[Layer, ...], Field(strict=False, min_length=1)]
    """The layers, each once: blocks by their number from 0, meaning their output; `embeddings`; `final_norm`."""
    format: Literal["int8", "bfloat16"] = "int8"
    """int8 keeps whole numbers from -127 to 127, with a scale for each position and layer: half the bytes."""

    @field_validator("layers")
    @classmethod
    def _each_once(cls, layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
        if len(set(layers)) < len(layers):
            raise ValueError("a layer is named twice")
        return in_order(layers)


def side_columns(signal: AnySignal) -> list[str]:
    """The further numbers that are kept of each position, by name and in their order."""
    if isinstance(signal, Full):
        return []
    names = ["unit", "entropy"] if signal.kind in SAMPLED else [f"rest@{t}" for t in known_temperatures(signal)]
    if isinstance(signal, TopK | TopP) and signal.entropy:
        names.append("entropy")
    return names + ["label"] * signal.label


def known_temperatures(signal: AnySignal) -> tuple[float, ...]:
    """The temperatures at which a truncated signal knows the mass that it leaves out; empty for the others."""
    if not isinstance(signal, TopK | TopP):
        return ()
    return (1.0, *sorted({float(t) for t in signal.temperatures} - {1.0}))


class ImportConfig(Config):
    """`stillroom store import FILE…`: make a store of top-k log-probabilities that something else wrote."""

    out: PathText
    """The store's folder, which must not exist yet."""
    tokenizer: PathText
    """Hub name or folder of the tokenizer that the token ids are of. It goes into the store."""
    layout: Literal["auto", "plain", "distillkit"] = "auto"
    """plain: columns of tokens, ids and log-probabilities, as `stillroom store export` writes them. distillkit: the
    compressed columns of DistillKit. auto tells them apart by the names of the columns."""
    num_columns: Annotated[int, Field(gt=0, lt=2**24)] | Literal["auto"] = "auto"
    """The columns over which the teacher's softmax was taken; auto is those that the tokenizer has tokens for."""
    compression: PathText | Literal["auto"] = "auto"
    """For distillkit, the YAML file of its compression settings; auto is compression_config.yaml beside the first
    file."""
    invalid: Literal["refuse", "drop"] = "refuse"
    """A position whose log-probabilities cannot be a distribution (not a number, rising, of a mass above 1) is an
    error, or is left without a signal and counted. An id that cannot be is always an error."""
    tolerance: Annotated[float, Field(ge=0, le=0.5)] = 0.01
    """The most by which the mass of a position may exceed 1, for entries that were rounded."""
    step: Step = 0.1
    """Log-probabilities are kept as whole multiples of this many nats; it costs about step²/24 nats."""
    teacher: str | None = None
    """The name of the teacher; null takes the one that the files state, or else "unknown"."""
    data: str | None = None
    """The name of the data; null takes the one that the files state, or else the first file's name."""

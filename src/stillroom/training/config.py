"""Settings of training: the student, its batches, optimizer and checkpoints."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from stillroom.config import BATCH_TOKENS, Attention, Config, Fraction, PathText, Positive
from stillroom.pruning.config import PruningConfig


class NewStudentConfig(Config):
    """A new student with random weights."""

    kind: Literal["config"]
    like: PathText | None = None
    """The model whose config is the pattern; null is the teacher."""
    family: str | None = None
    """Instead of a pattern: a family's name in `transformers`, such as llama or qwen3, with its default settings."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """The settings that differ, by the names of the family's config.json: hidden_size, num_hidden_layers, …"""


class PrunedStudentConfig(PruningConfig):
    """A student that starts as a part of its teacher."""

    kind: Literal["from_teacher"]
    model: PathText | None = None
    """The model that it is cut from; null is the live teacher. Where the teacher is a store, the model that was
    asked."""


class LoraConfig(Config):
    """Train low-rank adapters and leave the student's own weights as they are (arXiv 2106.09685)."""

    rank: Positive = 16
    """Rank of each adapter."""
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """The adapter's output is multiplied by alpha / rank."""
    dropout: Fraction = 0.0
    """Share of an adapter's inputs set to zero in training."""
    targets: Annotated[tuple[str, ...], Field(strict=False)] | Literal["all-linear"] = "all-linear"
    """Names of the layers that get an adapter; all-linear is every linear layer but the head."""
    export: Literal["merged", "adapter"] = "merged"
    """Write an ordinary model with the adapters merged in, or the adapters alone."""


class StudentConfig(Config):
    """The model that is trained: an existing one, or a new one."""

    model: PathText | None = None
    """Hub name or folder."""
    init: Annotated[NewStudentConfig | PrunedStudentConfig, Field(discriminator="kind")] | None = None
    """Build a new student instead: with random weights, or as a part of its teacher."""
    tokenizer: PathText | None = None
    """Hub name or folder of the tokenizer, where it is not the student's own (a new student: the teacher's)."""
    lora: LoraConfig | None = None
    """Low-rank adapters instead of all parameters."""
    freeze: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Parameters that are not trained, as patterns over their names: ["*embed_tokens*", "model.layers.0.*"]."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    compile: bool = False
    """Compile each of its blocks (`torch.compile`): the first step takes minutes, the others less time."""
    attention: Attention = "auto"
    """The attention kernel; auto is what `transformers` takes."""
    revision: str | None = None
    """Commit or tag on the hub."""
    trust_remote_code: bool = False
    """Run code that comes with the model."""

    @model_validator(mode="after")
    def _one_origin(self) -> "StudentConfig":
        if (self.model is None) == (self.init is None):
            raise ValueError("the student needs either `model` (an existing one) or `init` (a new one), and not both")
        if self.init is not None and self.lora is not None and self.lora.export == "adapter":
            raise ValueError("the adapters of a new student cannot be written alone: nothing holds the rest of it")
        return self


class BatchConfig(Config):
    """The number of tokens in a step."""

    tokens: Positive
    """Tokens (positions that the student reads) in an optimizer step, at the most."""
    micro_tokens: Positive | Literal["auto"] = "auto"
    """Tokens that go through the student at once, with padding; it changes memory and speed and never the result. auto
    is the length of a row or 16384, whichever is more."""

    def micro_tokens_of(self, length: int) -> int:
        """Returns ``micro_tokens`` where a row has ``length`` tokens: what is asked for, and by default no more than a
        step."""
        return min(self.tokens, max(length, BATCH_TOKENS)) if self.micro_tokens == "auto" else self.micro_tokens


class AdamWConfig(Config):
    """Adam with decoupled weight decay (arXiv 1711.05101)."""

    kind: Literal["adamw"] = "adamw"
    learning_rate: Annotated[float, Field(gt=0)]
    """The highest learning rate, reached after the warm-up."""
    warmup: Fraction = 0.0
    """Share of all steps over which the learning rate rises from 0."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """The way in which the learning rate falls after the warm-up, to 0 at the last step."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """The decay of matrices and embeddings; norms and biases have none."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of the first moment."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay of the second moment."""
    epsilon: Annotated[float, Field(gt=0)] = 1e-8
    """Added to the root of the second moment."""
    clip: Annotated[float, Field(gt=0)] | None = 1.0
    """The longest that the gradient of all parameters together may be; null is no limit."""


class ExportConfig(Config):
    """The form in which the trained student is written."""

    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = "auto"
    """The type of the exported weights, to which the trained ones are rounded. auto is that of the student's own
    checkpoint (a pruned student: of the model that it was cut from; a new one: what the config that it is built like
    says, else float32), and float64 where the precision is float64."""


class CheckpointConfig(Config):
    """The states that a run can be resumed from."""

    every: Positive | None = 500
    """Steps between checkpoints. One is also written when a run is interrupted, and at its end."""
    keep: Positive = 2
    """The number of the latest that stay on disk."""
    background: bool | Literal["auto"] = "auto"
    """Write them from a copy in the CPU's memory while training goes on; auto does so on a GPU."""
    best: bool = False
    """Keep the one with the lowest held-out objective too, and export that model."""

"""The settings of `stillroom prune`: model -> smaller model."""

from typing import ClassVar, Literal

from pydantic import model_validator

from stillroom.config import Config, PathText, Positive
from stillroom.data.config import AnyData, DataConfig, HeldOutText
from stillroom.pruning.config import PruningConfig


class _Model(Config):
    model: PathText
    """Hub name or folder of the model that a smaller one is cut out of."""
    revision: str | None = None
    """Commit or tag on the hub."""
    trust_remote_code: bool = False
    """Run code that comes with the model."""


class PruneConfig(PruningConfig, _Model):
    """`stillroom prune`: cut a smaller model out of a bigger one, with no training."""

    verb: ClassVar[str | None] = "prune"

    data: DataConfig | None = None
    """The text on which it is measured what matters, where `layers` or `width` need that; and how `held_out` is
    read."""
    held_out: HeldOutText | None = None
    """The text that the cross-entropy of both models is measured on; null measures none."""
    batch_tokens: Positive | Literal["auto"] = "auto"
    """Tokens that go through the model at once, with padding; auto is the length of a row or 4096, whichever is more.
    Block influence holds what each layer gives out of so many tokens."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """The type of the weights, while measuring and in the smaller model; auto is what the model's config.json says, or
    else what they are stored in."""
    device: str = "auto"
    """cpu, cuda, cuda:1; auto takes a CUDA device where there is one, and else the CPU."""
    out: PathText
    """The run's folder, which must not exist yet; the smaller model is OUT/model."""

    @model_validator(mode="after")
    def _fits_together(self) -> "PruneConfig":
        if self.layers is None and self.width is None:
            raise ValueError("give `layers`, `width` or both: with neither nothing is cut")
        if self.data is None:
            if self.held_out is not None:
                raise ValueError("held_out is read as `data` is: give `data` too, with its format and length")
            return self
        if self.data.weight is not None:
            raise ValueError("data.weight: each token counts alike when a model is measured")
        if getattr(self.data, "template", "auto") != "auto":
            raise ValueError("data.template: there is one model here, whose own template is taken")
        if self.batch_tokens != "auto" and self.batch_tokens < self.data.length:
            raise ValueError(f"batch_tokens ({self.batch_tokens}) is less than a row, data.length ({self.data.length})")
        if self.held_out is not None:
            self.held_out.of(self.data)
        return self

    @property
    def held_out_data(self) -> AnyData | None:
        """The text that is held out, with all settings that it is read by."""
        return None if self.held_out is None or self.data is None else self.held_out.of(self.data)

"""The settings of `stillroom store import`: files of another layout -> store."""

from typing import Annotated, Literal

from pydantic import Field

from stillroom.config import Config, PathText
from stillroom.store.config import Step


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
    """By how much the mass of a position may exceed 1, for entries that were rounded."""
    step: Step = 0.1
    """Log-probabilities are kept as whole multiples of this many nats; it costs about step²/24 nats."""
    teacher: str | None = None
    """What the teacher is called; null takes what the files say of it, or else "unknown"."""
    data: str | None = None
    """What the data are called; null takes what the files say of them, or else the first file's name."""

"""Settings of teachers: a live model, one behind a server, or a store."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from stillroom.config import Attention, Config, PathText, Positive, Quantization

MOST_OPENAI = 20
"""Tokens of a position that OpenAI's interface tells at the most."""


class LiveTeacherConfig(Config):
    """A teacher that runs beside the student ("online")."""

    kind: Literal["model"]
    model: PathText
    """Hub name or folder."""
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    """The type of its weights and arithmetic; auto is bfloat16 on a GPU and float32 on a CPU. float64 is
    for checks."""
    quantization: Quantization | None = None
    """The weights of its linear layers in 8 or 4 bits, made as they are read; the head, embeddings and experts stay in
    `dtype`, in which it also computes. int8 and fp8 take a byte a weight, nf4 half a byte. Its placement is whole."""
    placement: Literal["auto", "whole", "sharded", "offloaded"] = "auto"
    """Its layout on its processes: whole in each; a part of each layer in each, put together when it is needed; or
    such parts in the CPU's memory. auto is as the student lies, and whole where it is quantized."""
    ranks: Positive | None = None
    """Run it on so many processes of its own, the last ones, which send its hidden states ahead; null has it beside the
    student."""
    columns: Positive | Literal["auto"] = "auto"
    """The columns of both heads that are compared; auto is all of them where the heads are equally wide, and else those
    that the tokenizer has tokens for."""
    attention: Attention = "auto"
    """The attention kernel; auto is what `transformers` takes."""
    revision: str | None = None
    """Commit or tag on the hub."""
    trust_remote_code: bool = False
    """Run code that comes with the model."""

    @model_validator(mode="after")
    def _one_precision(self) -> "LiveTeacherConfig":
        if self.quantization is not None and self.dtype == "float64":
            raise ValueError(f"dtype=float64 is for checks, and quantization={self.quantization} rounds what it checks")
        return self


class ServerTeacherConfig(Config):
    """A teacher behind an OpenAI-compatible server, asked while the student trains for its top tokens at each
    position. No teacher is loaded; over several passes or students a store asks it once."""

    kind: Literal["server"]
    model: str
    """The name that it is served under."""
    url: str
    """Its address, with the version: http://127.0.0.1:8000/v1."""
    dialect: Literal["vllm", "openai"] = "vllm"
    """vLLM, which takes and gives token ids; or any other server that echoes a text with log-probabilities."""
    tokenizer: PathText | None = None
    """Hub name or folder of its tokenizer; null takes the student's for it."""
    top: Positive = 20
    """The tokens that it gives at each position; the residual mass is one further outcome."""
    concurrency: Annotated[int, Field(gt=0, le=1024)] = 8
    """Requests under way at a time."""
    retries: Annotated[int, Field(ge=0)] = 6
    """The number of times that a request is tried again, with longer and longer waits."""
    timeout_s: Annotated[float, Field(gt=0)] = 120.0
    """The longest that an answer may take, in seconds."""
    key_variable: str | None = None
    """The environment variable that holds the server's key."""


class StoreTeacherConfig(Config):
    """A teacher's signals, captured once and read from a store ("offline"). No teacher is loaded."""

    kind: Literal["store"]
    path: PathText
    """The store: a folder that `stillroom capture` wrote, or an address such as s3://bucket/store."""

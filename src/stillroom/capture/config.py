"""The settings of `stillroom capture`: teacher + text -> store."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from stillroom.config import Config, PathText, Positive, Quantization
from stillroom.data.config import DataConfig, TextData, TokensData
from stillroom.store.config import SHARD_POSITIONS, HeadAndSample, HiddenStatesConfig, SignalConfig, TopK, TopP
from stillroom.teachers.config import MOST_OPENAI

Attention = Literal["auto", "eager", "sdpa", "flash_attention_2", "flex_attention"]

FREE_TO_CHANGE = (
    "out", "data.cache", "shard_positions", "teacher.engine.device", "teacher.engine.batch_tokens",
    "teacher.engine.logits_bytes", "teacher.engine.concurrency", "teacher.engine.retries", "teacher.engine.timeout_s",
    "teacher.engine.url", "teacher.engine.key_variable", "teacher.engine.prompt_price",
    "teacher.engine.completion_price",
)  # fmt: skip
"""Settings that change nothing of the teacher's output, but for rounding, so a resumed capture may have others."""

DECIDES_ANSWERS = ("teacher.engine.batch_tokens", "teacher.engine.device")
"""Those of them that decide which random numbers an answer takes."""


class Transformers(Config):
    """The teacher runs in this process."""

    kind: Literal["transformers"]
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """The type of its weights and arithmetic; auto is bfloat16 on a GPU and float32 on a CPU."""
    quantization: Quantization | None = None
    """The weights of its linear layers in 8 or 4 bits, made as they are read; the head, embeddings and experts stay in
    `dtype`, in which it also computes. int8 and fp8 take a byte a weight, nf4 half a byte."""
    device: str = "auto"
    """cpu, cuda, cuda:1; auto takes a CUDA device where there is one, that of LOCAL_RANK among several, and else the
    CPU."""
    attention: Attention = "auto"
    """The attention kernel; auto is what `transformers` takes."""
    batch_tokens: Positive | Literal["auto"] = "auto"
    """Tokens that go through the teacher at once, with padding; auto is the length of a row or 16384, whichever is
    more. It changes memory and speed."""
    logits_bytes: Positive | Literal["auto"] = "auto"
    """Budget for the logits that are held at a time; auto is 8 MiB on a CPU, for its cache, and 256 MiB on a GPU."""


class _Server(Config):
    url: str
    """Its address, with the version: http://127.0.0.1:8000/v1."""
    concurrency: Annotated[int, Field(gt=0, le=1024)] = 8
    """Requests under way at a time."""
    retries: Annotated[int, Field(ge=0, le=100)] = 6
    """The number of times that a request that failed is tried again, with longer and longer waits."""
    timeout_s: Annotated[float, Field(gt=0)] = 120.0
    """Seconds after which a request counts as failed."""
    key_variable: str | None = None
    """The name of the environment variable that holds the server's key. The key itself is never written down."""
    prompt_price: Annotated[float, Field(ge=0)] = 0.0
    """The price of a million tokens read, for the running count of the cost."""
    completion_price: Annotated[float, Field(ge=0)] = 0.0
    """The price of a million tokens written."""


class VLLM(_Server):
    """A vLLM server, which gives the log-probabilities of any text that it is sent."""

    kind: Literal["vllm"]


class OpenAI(_Server):
    """Any OpenAI-compatible server: log-probabilities of the tokens that it writes itself, or of a text it echoes."""

    kind: Literal["openai"]


EngineConfig = Annotated[Transformers | VLLM | OpenAI, Field(discriminator="kind")]


class TeacherConfig(Config):
    """The model that is asked."""

    model: PathText
    """Hub name or folder; for a server the name that it is served under."""
    engine: EngineConfig = Transformers(kind="transformers")
    """The engine that runs it."""
    tokenizer: PathText | None = None
    """Hub name or folder of its tokenizer; null is the model's own. One that makes other ids than that is refused."""
    columns: Positive | Literal["auto"] = "auto"
    """The columns of its head that make up its distribution; auto is those that the tokenizer has tokens for."""
    revision: str | None = None
    """Commit or tag on the hub."""
    trust_remote_code: bool = False
    """Run code that comes with the model."""


class Generate(Config):
    """Let the teacher answer first, and store its signals for its own answers.

    A document's prompt is all that stands before its last targets, so the answer of a conversation, or the
    completion of a pair, is replaced by the teacher's.
    """

    max_tokens: Positive = 512
    """The longest answer."""
    temperature: Annotated[float, Field(ge=0)] = 1.0
    """The temperature of sampling; 0 takes the top token each time."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample from the top tokens that hold this share of the mass."""
    answers: Annotated[int, Field(gt=0, le=1000)] = 1
    """Answers to each prompt."""
    prompt_tokens: Positive | None = None
    """For plain text, which has no answer: take its first so many tokens as the prompt."""


class Part(Config):
    """The share of one worker of several, who need not know of each other."""

    index: Annotated[int, Field(ge=0)]
    """The worker's number, from 0."""
    of: Annotated[int, Field(gt=0, le=2**20)]
    """The number of workers."""

    def __str__(self) -> str:
        return f"part {self.index} of {self.of}"

    @property
    def folder(self) -> str:
        """The name of its folder in that of all."""
        return f"part-{self.index:04d}-of-{self.of:04d}"


class CaptureConfig(Config):
    """`stillroom capture`: run the teacher once, and store its signals; any number of students learn from them."""

    verb: ClassVar[str | None] = "capture"

    teacher: TeacherConfig
    """The model that is asked."""
    data: DataConfig
    """The text that it reads."""
    signal: SignalConfig = HeadAndSample(kind="head_and_sample")
    """The part of each of its distributions that is kept."""
    hidden: HiddenStatesConfig | None = None
    """Keep states of its layers too, for objectives of kind hidden; null keeps none. --dry-run tells the bytes."""
    generate: Generate | None = None
    """Let it answer the prompts of the data first; null takes the data as they are."""
    part: Part | Literal["auto"] | None = "auto"
    """Capture one part of the data only, into a folder of its own, OUT/part-0002-of-0008; `stillroom store join OUT`
    joins them. auto is that of this worker where RANK and WORLD_SIZE tell it, as torchrun sets them, and else null: all
    of the data."""
    shard_positions: Positive = SHARD_POSITIONS
    """Positions in a shard. Whole shards survive anything; a shard is held in memory until it is written."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """The seed of the draws and of the answers."""
    out: PathText
    """The run's folder, which must not exist yet; the store is OUT/store. Parts of one capture have the same."""

    @model_validator(mode="after")
    def _fits_together(self) -> "CaptureConfig":
        engine, signal, data, generate = self.teacher.engine, self.signal, self.data, self.generate
        if getattr(data, "template", "auto") == "student":
            raise ValueError("data.template=student: a capture has no student; the teacher's template is taken")
        if data.weight is not None:
            raise ValueError("data.weight: a store holds what the teacher said, and no weights of the data's own")
        if generate is not None and generate.answers > 1 and not generate.temperature:
            raise ValueError("generate.temperature=0 gives the same answer each time, so generate.answers must be 1")
        if generate is not None and isinstance(data, TextData | TokensData) and data.overlong == "split":
            raise ValueError(
                "generate with data.overlong=split would take each piece of a long text for a prompt: set "
                "data.overlong=cut, or drop"
            )
        if generate is not None and (data.format == "text") == (generate.prompt_tokens is None):
            raise ValueError("generate.prompt_tokens says where the prompt of plain text ends, and is for text alone")
        if generate is not None and generate.max_tokens >= data.length:
            sizes = f"generate.max_tokens ({generate.max_tokens})", f"data.length ({data.length})"
            raise ValueError(f"{sizes[0]} leaves no room for a prompt in {sizes[1]}")
        if isinstance(part := self.part, Part) and part.index >= part.of:
            raise ValueError(f"part.index ({part.index}) counts from 0, so it is less than part.of ({part.of})")
        if isinstance(engine, Transformers):
            return self
        if self.hidden is not None:
            raise ValueError(
                "hidden needs the teacher in this process, since no server tells its hidden states: use "
                "teacher.engine.kind=transformers, or leave it out"
            )
        if not isinstance(signal, TopK | TopP):
            raise ValueError(
                f"signal.kind={signal.kind} needs the whole distribution, and a server tells its likeliest tokens "
                "alone: use top_k or top_p"
            )
        if signal.temperatures or signal.entropy:
            raise ValueError("a server does not tell the entropy, or the mass left out at other temperatures")
        most = signal.k if isinstance(signal, TopK) else signal.most
        if isinstance(engine, OpenAI) and most > MOST_OPENAI:
            raise ValueError(
                f"an OpenAI-compatible server tells {MOST_OPENAI} tokens a position at the most, not {most}"
            )
        return self

    @property
    def folder(self) -> Path:
        """The folder that this run writes, once ``part`` is resolved: ``out``, or the folder of its part in it."""
        return Path(self.out, self.part.folder) if isinstance(self.part, Part) else Path(self.out)

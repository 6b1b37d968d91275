"""The settings of `stillroom distill`: student + (live teacher or none) + data -> model."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from stillroom.config import Config, PathText
from stillroom.costs.quantized import Quantization
from stillroom.cut.config import CutConfig
from stillroom.data.config import ChatData, PromptCompletionData, TextData
from stillroom.distill.objective_config import ByColumn, ObjectiveConfig
from stillroom.distill.parallel_config import Auto, ParallelConfig

Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Attention = Literal["auto", "eager", "sdpa", "flash_attention_2", "flex_attention"]


class FromConfig(Config):
    """A new student with random weights."""

    kind: Literal["config"]
    like: PathText | None = None
    """The model whose config is the pattern; null is the teacher."""
    family: str | None = None
    """Instead of a pattern: a family's name in `transformers`, such as llama or qwen3, with its default settings."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """What differs, by the names of the family's config.json: hidden_size, num_hidden_layers, …"""


class FromTeacher(CutConfig):
    """A student that starts as a part of its teacher."""

    kind: Literal["from_teacher"]
    model: PathText | None = None
    """The model that it is cut from; null is the live teacher. Where the teacher is a store, the model that was
    asked."""


class Lora(Config):
    """Train low-rank adapters and leave the student's own weights as they are (arXiv 2106.09685)."""

    rank: Positive = 16
    """Rank of each adapter."""
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """The adapter's output is multiplied by alpha / rank."""
    dropout: Share = 0.0
    """Share of an adapter's inputs set to zero in training."""
    targets: Annotated[tuple[str, ...], Field(strict=False)] | Literal["all-linear"] = "all-linear"
    """Names of the layers that get an adapter; all-linear is every linear layer but the head."""
    export: Literal["merged", "adapter"] = "merged"
    """Write an ordinary model with the adapters merged in, or the adapters alone."""


class StudentConfig(Config):
    """The model that is trained: an existing one, or a new one."""

    model: PathText | None = None
    """Hub name or folder."""
    init: Annotated[FromConfig | FromTeacher, Field(discriminator="kind")] | None = None
    """Build a new student instead: with random weights, or as a part of its teacher."""
    tokenizer: PathText | None = None
    """Hub name or folder of the tokenizer, where it is not the student's own (a new student: the teacher's)."""
    lora: Lora | None = None
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


class LiveTeacher(Config):
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
    """How it lies on its processes: whole in each; a part of each layer in each, put together when it is needed; or
    such parts in the CPU's memory. auto is as the student lies, and whole where it is quantised."""
    ranks: Positive | None = None
    """Run it on so many processes of its own, the last ones, which send its hidden states ahead; null has it beside the
    student."""
    columns: Positive | Literal["auto"] = "auto"
    """How many columns of both heads are compared; auto is all of them where the heads are equally wide, and else those
    that the tokenizer has tokens for."""
    attention: Attention = "auto"
    """The attention kernel; auto is what `transformers` takes."""
    revision: str | None = None
    """Commit or tag on the hub."""
    trust_remote_code: bool = False
    """Run code that comes with the model."""

    @model_validator(mode="after")
    def _one_precision(self) -> "LiveTeacher":
        if self.quantization is not None and self.dtype == "float64":
            raise ValueError(f"dtype=float64 is for checks, and quantization={self.quantization} rounds what it checks")
        return self


class ServerTeacher(Config):
    """A teacher behind an OpenAI-compatible server, asked while the student trains for its likeliest tokens at each
    position. No teacher is loaded; over several passes or students a store asks it once."""

    kind: Literal["server"]
    model: str
    """The name that it is served under."""
    url: str
    """Where it is, with the version: http://127.0.0.1:8000/v1."""
    dialect: Literal["vllm", "openai"] = "vllm"
    """vLLM, which takes and tells token ids; or any other server that echoes a text with log-probabilities."""
    tokenizer: PathText | None = None
    """Hub name or folder of its tokenizer; null takes the student's for it."""
    top: Positive = 20
    """How many tokens it tells of each position; the rest is one further outcome."""
    concurrency: Annotated[int, Field(gt=0, le=1024)] = 8
    """Requests under way at a time."""
    retries: Annotated[int, Field(ge=0)] = 6
    """How often a request is tried again, with longer and longer waits."""
    timeout_s: Annotated[float, Field(gt=0)] = 120.0
    """How long an answer may take, in seconds."""
    key_variable: str | None = None
    """The environment variable that holds the server's key."""


class StoreTeacher(Config):
    """What a teacher said once, read from a store ("offline"). No teacher is loaded."""

    kind: Literal["store"]
    path: PathText
    """The store: a folder that `stillroom capture` wrote, or an address such as s3://bucket/store."""


class StoredData(Config):
    """The documents of the store itself, so that no signal can be joined to other data."""

    format: Literal["store"]
    length: Annotated[int, Field(ge=2)] | Literal["auto"] = "auto"
    """Tokens in a row; auto is what the store was captured with, and it cannot be less."""
    pack: bool = True
    """Put several documents into a row. They never attend to each other."""
    shuffle: bool = True
    """Take the documents in a new order each epoch, which follows from the run's seed."""


class HeldOut(Config):
    """Text that is never trained on, read as `data` is read."""

    path: PathText
    """A file, folder or data set like data.path; where data.format is store, another store."""
    split: str = "train"
    """The split, where the data set has several."""
    subset: str | None = None
    """The configuration on the hub; null is data.subset where the path is the same."""
    revision: str | None = None
    """The commit or tag on the hub; null is data.revision where the path is the same."""
    max_documents: Positive | None = None
    """Read only the first so many documents."""
    every: Positive | None = None
    """Measure after every so many steps; always at the end."""


class BatchConfig(Config):
    """How many tokens go into a step."""

    tokens: Positive
    """Tokens (positions that the student reads) in an optimizer step, at the most."""
    micro_tokens: Positive | Literal["auto"] = "auto"
    """Tokens that go through the student at once, with padding; it changes memory and speed and never the result. auto
    is the length of a row or 16384, whichever is more."""


class AdamW(Config):
    """Adam with decoupled weight decay (arXiv 1711.05101)."""

    kind: Literal["adamw"] = "adamw"
    learning_rate: Annotated[float, Field(gt=0)]
    """The highest learning rate, reached after the warm-up."""
    warmup: Share = 0.0
    """Share of all steps over which the learning rate rises from 0."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after the warm-up, to 0 at the last step."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Of matrices and embeddings; norms and biases have none."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of the first moment."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay of the second moment."""
    epsilon: Annotated[float, Field(gt=0)] = 1e-8
    """Added to the root of the second moment."""
    clip: Annotated[float, Field(gt=0)] | None = 1.0
    """The longest that the gradient of all parameters together may be; null is no limit."""


class Checkpoints(Config):
    """What can be resumed from."""

    every: Positive | None = 500
    """Steps between checkpoints. One is also written when a run is interrupted, and at its end."""
    keep: Positive = 2
    """How many of the latest stay on disk."""
    background: bool | Literal["auto"] = "auto"
    """Write them from a copy in the CPU's memory while training goes on; auto does so on a GPU."""
    best: bool = False
    """Keep the one with the lowest held-out objective too, and export that model."""


class DistillConfig(Config):
    """`stillroom distill`: train a student to predict as its teacher does."""

    student: StudentConfig
    """The model that is trained."""
    teacher: Annotated[LiveTeacher | ServerTeacher | StoreTeacher, Field(discriminator="kind")] | None = None
    """What is learnt from: a live model, one behind a server, or a store; null trains on the data's own labels
    alone."""
    data: Annotated[TextData | ChatData | PromptCompletionData | StoredData, Field(discriminator="format")]
    """What they read."""
    held_out: HeldOut | None = None
    """What the student is measured on."""
    objectives: Annotated[tuple[ObjectiveConfig, ...], Field(strict=False, min_length=1)]
    """What is minimised: the weighted sum of these."""
    steps: Positive | None = None
    """Optimizer steps; or else:"""
    epochs: Positive | None = None
    """passes over the data."""
    batch: BatchConfig
    """How many tokens go into a step."""
    optimizer: AdamW
    """AdamW and its schedule."""
    checkpoints: Checkpoints = Checkpoints()
    """What can be resumed from."""
    parallel: ParallelConfig = Auto()
    """How the student lies on the processes that `torchrun` starts."""
    precision: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    """The student's arithmetic; its weights stay float32. auto is bfloat16 on a GPU that has it, else float32. float64
    is for checks: its weights are then float64 too."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps; auto takes a CUDA device where there is one, and else the CPU."""
    logits_bytes: Positive | Literal["auto"] = "auto"
    """Budget for the logits that are held at a time; auto is 256 MiB."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Of new weights, the order of documents, and dropout."""
    tracking: Annotated[tuple[Literal["tensorboard", "wandb", "trackio", "mlflow"], ...], Field(strict=False)] = ()
    """Where the metrics go besides metrics.jsonl; each needs its package."""
    out: PathText
    """The run's folder, which must not exist yet."""

    @model_validator(mode="after")
    def _fits_together(self) -> "DistillConfig":
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give either `steps` or `epochs`, and not both")
        if not any(objective.weight != 0 for objective in self.objectives):
            raise ValueError("every objective has weight 0, so there is nothing to learn")
        for i, objective in enumerate(self.objectives):
            if self.teacher is None and objective.needs_teacher:
                raise ValueError(f"objectives.{i} ({objective.kind}) needs a `teacher`")
            if isinstance(self.teacher, ServerTeacher) and objective.kind == "hidden":
                raise ValueError(f"objectives.{i} (hidden) needs the teacher's inner states, and a server tells none")
            missing = getattr(objective, "missing", "bucket")
            if missing != "bucket" and isinstance(self.teacher, LiveTeacher):
                raise ValueError(
                    f"objectives.{i}.missing is `{missing}`, and a live teacher leaves nothing out: nobody reads it"
                )
            if isinstance(objective.token_weight, ByColumn) and getattr(self.data, "weight", None) is None:
                raise ValueError(f"objectives.{i}.token_weight is `data`, and data.weight names no column")
        if isinstance(self.teacher, StoreTeacher) != isinstance(self.data, StoredData):
            raise ValueError(
                "a store brings its own documents, and no other data have its signals: teacher.kind=store and "
                "data.format=store go together"
            )
        if self.data.length != "auto" and self.batch.tokens < self.data.length:
            raise ValueError(f"batch.tokens ({self.batch.tokens}) is less than a row, data.length ({self.data.length})")
        length, micro_tokens = self.data.length, self.batch.micro_tokens
        if length != "auto" and micro_tokens != "auto" and micro_tokens < length:
            raise ValueError(
                f"batch.micro_tokens ({self.batch.micro_tokens}) is less than a row, data.length ({self.data.length})"
            )
        if self.held_out is not None and self._measures_what_it_trains_on():
            raise ValueError("held_out is the same as data: what is measured must not be trained on")
        self._teacher_has_a_place()
        if self.checkpoints.best and (self.held_out is None or self.held_out.every is None):
            raise ValueError("checkpoints.best needs `held_out` with `every`, by which the best is known")
        self._student_has_an_origin()
        return self

    def _student_has_an_origin(self) -> None:
        init, nobody = self.student.init, not isinstance(self.teacher, LiveTeacher)
        if isinstance(init, FromTeacher):
            if nobody and init.model is None:
                raise ValueError("student.init needs `model`, to be cut from, where there is no live teacher")
            return
        if init is None:
            return
        if init.like is not None and init.family is not None:
            raise ValueError("student.init takes `like` or `family`, and not both")
        if nobody and init.like is None and init.family is None:
            raise ValueError("student.init needs `like` or `family` where there is no live teacher to be like")
        of_server = self.teacher.tokenizer if isinstance(self.teacher, ServerTeacher) else None
        known = isinstance(self.teacher, StoreTeacher | LiveTeacher) or of_server is not None
        if not known and self.student.tokenizer is None:
            whose = "without a teacher" if self.teacher is None else "of a server whose tokenizer is not given"
            raise ValueError(f"a new student {whose} needs student.tokenizer")

    def _teacher_has_a_place(self) -> None:
        if not isinstance(self.teacher, LiveTeacher):
            return
        if self.teacher.quantization is not None and self.teacher.placement not in ("auto", "whole"):
            raise ValueError(
                f"a teacher in {self.teacher.quantization} lies whole in each process: teacher.placement="
                f"{self.teacher.placement} would divide weights that are packed with their scales"
            )
        if self.teacher.ranks is None:
            return
        if self.teacher.placement == "offloaded":
            raise ValueError(
                "a teacher on `ranks` of its own has their memory to itself: placement=offloaded is for one beside the "
                "student"
            )
        if isinstance(self.student.init, FromTeacher):
            raise ValueError(
                "a student that is cut out of its teacher needs it beside it: cut it first with `stillroom prune`, and "
                "give its folder as student.model; or leave teacher.ranks out"
            )

    def _measures_what_it_trains_on(self) -> bool:
        assert self.held_out is not None
        if isinstance(self.data, StoredData):
            return isinstance(self.teacher, StoreTeacher) and self.teacher.path == self.held_out.path
        return (self.held_out.path, self.held_out.split) == (self.data.path, self.data.split)

"""The settings of `stillroom distill`: student + (live teacher or none) + data -> model."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from stillroom.config import Config, PathText, Positive
from stillroom.data.config import ChatData, HeldOutConfig, PromptCompletionData, StoredDataConfig, TextData
from stillroom.distributed.config import AutoParallelConfig, ParallelConfig
from stillroom.losses.config import ByColumn, ObjectiveConfig
from stillroom.teachers.config import LiveTeacherConfig, ServerTeacherConfig, StoreTeacherConfig
from stillroom.training.config import (
    AdamWConfig,
    BatchConfig,
    CheckpointConfig,
    ExportConfig,
    PrunedStudentConfig,
    StudentConfig,
)


class DistillConfig(Config):
    """`stillroom distill`: train a student to predict as its teacher does."""

    verb: ClassVar[str | None] = "distill"

    student: StudentConfig
    """The model that is trained."""
    teacher: (
        Annotated[LiveTeacherConfig | ServerTeacherConfig | StoreTeacherConfig, Field(discriminator="kind")] | None
    ) = None
    """What is learnt from: a live model, one behind a server, or a store; null trains on the data's own labels
    alone."""
    data: Annotated[TextData | ChatData | PromptCompletionData | StoredDataConfig, Field(discriminator="format")]
    """What they read."""
    held_out: HeldOutConfig | None = None
    """What the student is measured on."""
    objectives: Annotated[tuple[ObjectiveConfig, ...], Field(strict=False, min_length=1)]
    """What is minimised: the weighted sum of these."""
    steps: Positive | None = None
    """Optimizer steps; or else:"""
    epochs: Positive | None = None
    """passes over the data."""
    batch: BatchConfig
    """How many tokens go into a step."""
    optimizer: AdamWConfig
    """AdamW and its schedule."""
    checkpoints: CheckpointConfig = CheckpointConfig()
    """What can be resumed from."""
    export: ExportConfig = ExportConfig()
    """How the trained student is written."""
    parallel: ParallelConfig = AutoParallelConfig()
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
            if isinstance(self.teacher, ServerTeacherConfig) and objective.kind == "hidden":
                raise ValueError(f"objectives.{i} (hidden) needs the teacher's inner states, and a server tells none")
            missing = getattr(objective, "missing", "bucket")
            if missing != "bucket" and isinstance(self.teacher, LiveTeacherConfig):
                raise ValueError(
                    f"objectives.{i}.missing is `{missing}`, and a live teacher leaves nothing out: nobody reads it"
                )
            if isinstance(objective.token_weight, ByColumn) and getattr(self.data, "weight", None) is None:
                raise ValueError(f"objectives.{i}.token_weight is `data`, and data.weight names no column")
        if isinstance(self.teacher, StoreTeacherConfig) != isinstance(self.data, StoredDataConfig):
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
        init, nobody = self.student.init, not isinstance(self.teacher, LiveTeacherConfig)
        if isinstance(init, PrunedStudentConfig):
            if nobody and init.model is None:
                raise ValueError("student.init needs `model`, to be cut from, where there is no live teacher")
            return
        if init is None:
            return
        if init.like is not None and init.family is not None:
            raise ValueError("student.init takes `like` or `family`, and not both")
        if nobody and init.like is None and init.family is None:
            raise ValueError("student.init needs `like` or `family` where there is no live teacher to be like")
        of_server = self.teacher.tokenizer if isinstance(self.teacher, ServerTeacherConfig) else None
        known = isinstance(self.teacher, StoreTeacherConfig | LiveTeacherConfig) or of_server is not None
        if not known and self.student.tokenizer is None:
            whose = "without a teacher" if self.teacher is None else "of a server whose tokenizer is not given"
            raise ValueError(f"a new student {whose} needs student.tokenizer")

    def _teacher_has_a_place(self) -> None:
        if not isinstance(self.teacher, LiveTeacherConfig):
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
        if isinstance(self.student.init, PrunedStudentConfig):
            raise ValueError(
                "a student that is cut out of its teacher needs it beside it: cut it first with `stillroom prune`, and "
                "give its folder as student.model; or leave teacher.ranks out"
            )

    def _measures_what_it_trains_on(self) -> bool:
        assert self.held_out is not None
        if isinstance(self.data, StoredDataConfig):
            return isinstance(self.teacher, StoreTeacherConfig) and self.teacher.path == self.held_out.path
        return (self.held_out.path, self.held_out.split) == (self.data.path, self.data.split)

"""The settings of `stillroom distill`: student + (live teacher or none) + data -> model."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from stillroom.config import Config, PathText, Positive, replace
from stillroom.data.config import AnyData, HeldOutConfig, StoredDataConfig
from stillroom.distributed.config import AutoParallelConfig, ParallelConfig
from stillroom.losses.config import ByColumn, ObjectiveConfig
from stillroom.teachers.config import LiveTeacherConfig, ServerTeacherConfig, StoreTeacherConfig
from stillroom.training.config import (
    AdamWConfig,
    BatchConfig,
    CheckpointConfig,
    ExportConfig,
    NewStudentConfig,
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
    """The source of what is learned: a live model, one behind a server, or a store; null trains on the data's own
    labels alone."""
    data: Annotated[AnyData | StoredDataConfig, Field(discriminator="format")]
    """The text that they read."""
    held_out: HeldOutConfig | None = None
    """The text that the student is measured on."""
    objectives: Annotated[tuple[ObjectiveConfig, ...], Field(strict=False, min_length=1)]
    """The losses whose weighted sum is minimized."""
    steps: Positive | None = None
    """Optimizer steps; or else:"""
    epochs: Positive | None = None
    """passes over the data."""
    batch: BatchConfig
    """The number of tokens in a step."""
    optimizer: AdamWConfig
    """AdamW and its schedule."""
    checkpoints: CheckpointConfig = CheckpointConfig()
    """The states that a run can be resumed from."""
    export: ExportConfig = ExportConfig()
    """The form in which the trained student is written."""
    parallel: ParallelConfig = AutoParallelConfig()
    """The layout of the student on the processes that `torchrun` starts."""
    precision: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    """The student's arithmetic; its weights stay float32. auto is bfloat16 on a GPU that has it, else float32. float64
    is for checks: its weights are then float64 too."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps; auto takes a CUDA device where there is one, and else the CPU."""
    logits_bytes: Positive | Literal["auto"] = "auto"
    """Budget for the logits that are held at a time; auto is 256 MiB."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """The seed of new weights, the order of documents, and dropout."""
    tracking: Annotated[tuple[Literal["tensorboard", "wandb", "trackio", "mlflow"], ...], Field(strict=False)] = ()
    """The places where the metrics go besides metrics.jsonl; each needs its package."""
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
        length = self.data.length
        for name, tokens in (("tokens", self.batch.tokens), ("micro_tokens", self.batch.micro_tokens)):
            if isinstance(length, int) and isinstance(tokens, int) and tokens < length:
                raise ValueError(f"batch.{name} ({tokens}) is less than a row, data.length ({length})")
        if (held_out := self.held_out) is not None:
            if isinstance(self.data, StoredDataConfig):
                same = getattr(self.teacher, "path", None) == held_out.path
                if held_out.path is None:
                    raise ValueError("held_out.share is for data that are read as text: give the `path` of a store")
                if same:
                    raise ValueError("held_out is the same as data: what is measured must not be trained on")
            else:
                held_out.of(self.data)
        if self.checkpoints.best and (held_out is None or held_out.every is None):
            raise ValueError("checkpoints.best needs `held_out` with `every`, by which the best is known")
        return self

    @model_validator(mode="after")
    def _teacher_has_a_place(self) -> "DistillConfig":
        teacher = self.teacher
        if not isinstance(teacher, LiveTeacherConfig):
            return self
        if teacher.quantization is not None and teacher.placement not in ("auto", "whole"):
            raise ValueError(
                f"a teacher in {teacher.quantization} lies whole in each process: teacher.placement="
                f"{teacher.placement} would divide weights that are packed with their scales"
            )
        if teacher.ranks is not None and teacher.placement == "offloaded":
            raise ValueError(
                "a teacher on `ranks` of its own has their memory to itself: placement=offloaded is for one beside the "
                "student"
            )
        if teacher.ranks is not None and isinstance(self.student.init, PrunedStudentConfig):
            raise ValueError(
                "a student that is cut out of its teacher needs it beside it: cut it first with `stillroom prune`, and "
                "give its folder as student.model; or leave teacher.ranks out"
            )
        return self

    @model_validator(mode="after")
    def _student_has_an_origin(self) -> "DistillConfig":
        init, teacher = self.student.init, self.teacher
        has_live = isinstance(teacher, LiveTeacherConfig)
        if isinstance(init, PrunedStudentConfig) and init.model is None and not has_live:
            raise ValueError("student.init needs `model`, to be cut from, where there is no live teacher")
        if not isinstance(init, NewStudentConfig):
            return self
        if init.like is not None and init.family is not None:
            raise ValueError("student.init takes `like` or `family`, and not both")
        if not has_live and init.like is None and init.family is None:
            raise ValueError("student.init needs `like` or `family` where there is no live teacher to be like")
        known = teacher.tokenizer is not None if isinstance(teacher, ServerTeacherConfig) else teacher is not None
        if not known and self.student.tokenizer is None:
            whose = "without a teacher" if teacher is None else "of a server whose tokenizer is not given"
            raise ValueError(f"a new student {whose} needs student.tokenizer")
        return self

    @property
    def held_out_data(self) -> AnyData | StoredDataConfig | None:
        """The held-out data: read as the training data are, from another place and in their own order."""
        if self.held_out is None or isinstance(self.data, StoredDataConfig):
            return None if self.held_out is None else replace(self.data, {"shuffle": False})
        return self.held_out.of(self.data)

    @property
    def paths_read(self) -> dict[str, str | None]:
        """The places that a run reads, by their settings."""
        student, teacher, init = self.student, self.teacher, self.student.init
        return {
            "teacher.model": teacher.model if isinstance(teacher, LiveTeacherConfig) else None,
            "teacher.path": getattr(teacher, "path", None),
            "student.model": student.model,
            "student.tokenizer": student.tokenizer,
            "student.init.like": getattr(init, "like", None),
            "student.init.model": getattr(init, "model", None),
            "data.path": getattr(self.data, "path", None),
            "held_out.path": None if self.held_out is None else self.held_out.path,
        }

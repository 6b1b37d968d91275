"""The origin of a student: a model that is there, a new one, or a part of its teacher; as far as configs tell."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig, PreTrainedTokenizerBase

from stillroom.config import is_local
from stillroom.distill.hidden_plan import StudentOrigin
from stillroom.errors import ConfigError
from stillroom.estimates.headers import checkpoint_dtype
from stillroom.models import loading
from stillroom.pruning.plan import PruningPlan, plan_pruning
from stillroom.pruning.prune import read_mask
from stillroom.runs import same_model
from stillroom.teachers.config import LiveTeacherConfig
from stillroom.tokenizers import required_vocab_size
from stillroom.training.config import NewStudentConfig, PrunedStudentConfig, StudentConfig


@dataclass(frozen=True)
class StudentPlan:
    """A student before it is loaded."""

    config: PretrainedConfig
    source: tuple[str, str | None] | None = None
    """The model whose weights it starts with, and the revision of that; None for a new one with random weights."""
    cut: PruningPlan | None = None
    """The part of the source that it starts as, where that is not all of it."""

    @property
    def kind(self) -> Literal["new", "part", "trained"]:
        return "new" if self.source is None else "trained" if self.cut is None else "part"

    def export_dtype(self, precision: str) -> str:
        """Returns the type of the exported weights where the recipe leaves it open.

        It is float64 in a run of that precision, and else the type of the checkpoint that the student comes from: what
        its config.json says, or what most of its weights are stored in. It is float32 where neither is a type of
        weights that can be exported, as with a new student of a family's default settings.
        """
        if precision == "float64":
            return precision
        described = self.config if self.cut is None else self.cut.teacher
        return checkpoint_dtype(described, *(self.source or (None, None)))

    def origin_in(self, teacher: str) -> StudentOrigin | None:
        """Returns what the student was in the teacher of this fingerprint; None where it is not cut from it."""
        if self.source is None:
            return None
        name = self.source[0]
        if self.cut is not None:
            same = same_model(loading.fingerprint(name, self.cut.teacher), teacher)
            return StudentOrigin(self.cut.layers) if same else None
        was = read_mask(Path(name).expanduser()) if is_local(name) else None
        same = was is not None and same_model(was.teacher, teacher)
        return StudentOrigin(was.layers, was.channels) if same and was is not None else None


def plan_student(
    student: StudentConfig,
    teacher: LiveTeacherConfig | None,
    described: PretrainedConfig | None,
    tokenizer: PreTrainedTokenizerBase | None,
    read: Callable[[str], PretrainedConfig] | None = None,
) -> StudentPlan:
    """Returns what a student will be, as far as configs tell.

    Args:
        teacher: the live teacher, and ``described`` its config.
        tokenizer: the student's; None where only its sizes are wanted.
        read: gives the config of a model by its name; None loads it as a run does.
    """

    def load(name: str) -> PretrainedConfig:
        return loading.read_config(name, revision=student.revision, trust_remote_code=student.trust_remote_code)

    read, init = read or load, student.init
    if init is None:
        assert student.model is not None
        return StudentPlan(read(student.model), (student.model, student.revision))
    if isinstance(init, PrunedStudentConfig):
        if init.model is not None:
            source, whole = (init.model, student.revision), read(init.model)
        else:
            assert teacher is not None  # the config demands it
            assert described is not None
            source, whole = (teacher.model, teacher.revision), described
        cut = plan_pruning(init, whole)
        return StudentPlan(cut.config, source, cut)
    pattern = described if init.like is None else read(init.like)
    return StudentPlan(new_config(init, None if init.family is not None else pattern, tokenizer))


def new_config(
    init: NewStudentConfig, pattern: PretrainedConfig | None, tokenizer: PreTrainedTokenizerBase | None
) -> PretrainedConfig:
    """Returns the config of a new student: the pattern's (or the family's own) with ``init.settings``, for
    ``tokenizer``."""
    if pattern is None:
        if init.family is None or init.family not in CONFIG_MAPPING:
            raise ConfigError(
                f"`{init.family}` is not a family that `transformers` knows",
                {"student.init.family": init.family},
                why="The family decides which layers a new model has.",
                fix="Use the model_type of a config.json, such as llama, qwen2, qwen3, mistral or gemma2.",
            )
        vocab_size = init.settings.get("vocab_size") if tokenizer is None else required_vocab_size(tokenizer)
        if vocab_size is None:
            raise ConfigError(
                "the vocabulary of the student is not known",
                {"student.init.family": init.family, "student.init.settings.vocab_size": "missing"},
                why="It is the tokenizer's, which is not read for a plan, and embeddings and head follow from it.",
                fix="Set student.init.settings.vocab_size, or use --dry-run, which reads the tokenizer.",
            )
        pattern = AutoConfig.for_model(init.family, vocab_size=vocab_size)
    config = loading.configure(pattern, init.settings)
    if tokenizer is not None:
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(config, name, getattr(tokenizer, name))
    return config

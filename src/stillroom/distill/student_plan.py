"""Where a student comes from: a model that is there, a new one, or a part of its teacher; as far as configs tell."""

from collections.abc import Callable
from pathlib import Path

from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig, PreTrainedTokenizerBase

from stillroom.config import is_local
from stillroom.distill.config import DistillConfig
from stillroom.distill.hidden_plan import StudentOrigin
from stillroom.errors import ConfigError
from stillroom.estimates.headers import checkpoint_dtype
from stillroom.models import loading
from stillroom.pruning.plan import PruningPlan, plan_pruning
from stillroom.pruning.prune import read_mask
from stillroom.store.reader import Store
from stillroom.teachers.config import LiveTeacherConfig
from stillroom.tokenizers import required_vocab_size
from stillroom.training.config import NewStudentConfig, PrunedStudentConfig, StudentConfig


def student_parts(
    student: StudentConfig,
    teacher: PretrainedConfig | None,
    tokenizer: PreTrainedTokenizerBase | None,
    read: Callable[[str], PretrainedConfig] | None = None,
) -> tuple[PruningPlan | None, PretrainedConfig | None, PretrainedConfig]:
    """What is cut of the teacher (None where nothing is), the config of a new student with random weights (None for
    others), and the student's config.

    Args:
        teacher: the config of a live teacher.
        tokenizer: the student's; None where only its sizes are wanted.
        read: gives the config of a model by its name; None loads it as a run does.
    """

    def load(name: str) -> PretrainedConfig:
        return loading.read_config(name, revision=student.revision, trust_remote_code=student.trust_remote_code)

    read, init = read or load, student.init
    if init is None:
        assert student.model is not None
        return None, None, read(student.model)
    if isinstance(init, PrunedStudentConfig):
        source = teacher if init.model is None else read(init.model)
        assert source is not None  # the config demands a model where there is no live teacher
        cut = plan_pruning(init, source)
        return cut, None, cut.config
    pattern = teacher if init.like is None else read(init.like)
    fresh = new_config(init, None if init.family is not None else pattern, tokenizer)
    return None, fresh, fresh


def new_config(
    init: NewStudentConfig, pattern: PretrainedConfig | None, tokenizer: PreTrainedTokenizerBase | None
) -> PretrainedConfig:
    """The config of a new student: the pattern's (or the family's own) with ``init.settings``, for ``tokenizer``."""
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


def export_dtype(config: DistillConfig, cut: PruningPlan | None, described: PretrainedConfig) -> str:
    """Returns the type of the exported weights where the recipe leaves it open.

    It is float64 in a run of that precision, and else the type of the checkpoint that the student comes from: what its
    config.json says, or what most of its weights are stored in. It is float32 where neither is a type of weights that
    can be exported, as with a new student of a family's default settings.

    Args:
        described: the student's config; that of a pruned one is its source's in ``cut``.
    """
    if config.precision == "float64":
        return "float64"
    name, revision = cut_from(config) or config.student.model, config.student.revision
    if cut is not None and getattr(config.student.init, "model", None) is None:
        revision = getattr(config.teacher, "revision", None)
    return checkpoint_dtype(described if cut is None else cut.teacher, name, revision)


def cut_from(config: DistillConfig) -> str | None:
    """The model that a student is cut from; None where it is not cut."""
    init = config.student.init
    if not isinstance(init, PrunedStudentConfig):
        return None
    if init.model is not None:
        return init.model
    assert isinstance(config.teacher, LiveTeacherConfig)  # the config demands it
    return config.teacher.model


def origin_of(
    config: DistillConfig, teacher: PretrainedConfig | None, store: Store | None, cut: PruningPlan | None
) -> StudentOrigin | None:
    """What the student was in this very teacher, by its fingerprint; None where it is not cut from it."""
    if store is not None:
        ours = store.manifest.teacher.fingerprint
    elif isinstance(config.teacher, LiveTeacherConfig) and teacher is not None:
        ours = loading.fingerprint(config.teacher.model, teacher)
    else:
        return None
    source, name = cut_from(config), config.student.model
    if cut is not None and source is not None:
        return StudentOrigin(cut.layers) if loading.fingerprint(source, cut.teacher) == ours else None
    was = read_mask(Path(name).expanduser()) if name is not None and is_local(name) else None
    return StudentOrigin(was.layers, was.channels) if was is not None and was.teacher == ours else None

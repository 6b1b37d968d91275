"""Where a student comes from: a model that is there, a new one, or a part of its teacher; as far as configs tell."""

from pathlib import Path

from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig, PreTrainedTokenizerBase

from stillroom import models
from stillroom.config import is_local
from stillroom.cut.cut import read_cut
from stillroom.cut.plan import CutPlan, plan_cut
from stillroom.distill.config import DistillConfig, FromConfig, FromTeacher, LiveTeacher
from stillroom.distill.hidden_plan import Origin
from stillroom.errors import ConfigError
from stillroom.store.reader import Store
from stillroom.tokenizers import num_columns


def student_parts(
    config: DistillConfig, teacher: PretrainedConfig | None, tokenizer: PreTrainedTokenizerBase
) -> tuple[CutPlan | None, PretrainedConfig | None, PretrainedConfig]:
    """What is cut of the teacher (None where nothing is), the config of a new student with random weights (None for
    others), and the student's config."""
    student, init = config.student, config.student.init

    def read(name: str) -> PretrainedConfig:
        return models.read_config(name, revision=student.revision, trust_remote_code=student.trust_remote_code)

    if init is None:
        assert student.model is not None
        return None, None, read(student.model)
    if isinstance(init, FromTeacher):
        source = teacher if init.model is None else read(init.model)
        assert source is not None  # the config demands a model where there is no live teacher
        cut = plan_cut(init, source)
        return cut, None, cut.config
    pattern = teacher if init.like is None else read(init.like)
    fresh = new_config(init, None if init.family is not None else pattern, tokenizer)
    return None, fresh, fresh


def new_config(
    init: FromConfig, pattern: PretrainedConfig | None, tokenizer: PreTrainedTokenizerBase
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
        pattern = AutoConfig.for_model(init.family, vocab_size=num_columns(tokenizer))
    config = models.configure(pattern, init.settings)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, name, getattr(tokenizer, name))
    return config


def cut_from(config: DistillConfig) -> str | None:
    """The model that a student is cut from; None where it is not cut."""
    init = config.student.init
    if not isinstance(init, FromTeacher):
        return None
    if init.model is not None:
        return init.model
    assert isinstance(config.teacher, LiveTeacher)  # the config demands it
    return config.teacher.model


def origin_of(
    config: DistillConfig, teacher: PretrainedConfig | None, store: Store | None, cut: CutPlan | None
) -> Origin | None:
    """What the student was in this very teacher, by its fingerprint; None where it is not cut from it."""
    if store is not None:
        ours = store.manifest.teacher.fingerprint
    elif isinstance(config.teacher, LiveTeacher) and teacher is not None:
        ours = models.fingerprint(config.teacher.model, teacher)
    else:
        return None
    source, name = cut_from(config), config.student.model
    if cut is not None and source is not None:
        return Origin(cut.layers) if models.fingerprint(source, cut.teacher) == ours else None
    was = read_cut(Path(name).expanduser()) if name is not None and is_local(name) else None
    return Origin(was.layers, was.channels) if was is not None and was.teacher == ours else None

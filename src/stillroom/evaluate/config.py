"""The settings of `stillroom evaluate`: models -> scores and a report."""

from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, StringConstraints, model_validator

from stillroom.config import Config, PathText, Positive
from stillroom.data.config import DataConfig, TextData
from stillroom.evaluate.results import Role
from stillroom.evaluate.tasks.config import TaskConfig

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z][\w-]*$")]

ROLES: dict[str, Role] = {"teacher": "teacher", "distilled": "distilled", "baseline": "baseline"}
"""The role of a model by its name alone."""


class ModelConfig(Config):
    """A model that is evaluated."""

    model: PathText
    """Hub name or folder; behind an address, the name that it is served under."""
    url: str | None = None
    """The address of an OpenAI-compatible server that runs it, for tasks alone: http://127.0.0.1:8000/v1."""
    role: Role | None = None
    """What it is; null is what its name says: teacher, distilled, baseline, and any other name is other. There is one
    teacher at the most, and one baseline: the student that was not distilled."""
    tokenizer: PathText | None = None
    """Hub name or folder of its tokenizer; null is the model's own. One that makes other ids than that is refused."""
    revision: str | None = None
    """Commit or tag on the hub."""
    trust_remote_code: bool = False
    """Run code that comes with the model."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """The type of its weights and arithmetic; auto is bfloat16 on a GPU and float32 on a CPU."""
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2", "flex_attention"] = "auto"
    """The attention kernel; auto is what `transformers` takes."""
    run: PathText | None = None
    """The folder of the run that made it, whose training curves the report shows; null is the folder around the model,
    where that is a run's."""


ModelOrText = Annotated[
    ModelConfig, BeforeValidator(lambda value: value if isinstance(value, dict | ModelConfig) else {"model": value})
]
"""A model; a bare text is its folder or hub name."""


class EvaluateConfig(Config):
    """`stillroom evaluate`: how much of the teacher did the student keep?"""

    verb: ClassVar[str | None] = "evaluate"

    models: Annotated[dict[Name, ModelOrText], Field(min_length=1)]
    """What is compared, each under a name that the results call it by: models.teacher=FOLDER models.distilled=FOLDER
    models.baseline=FOLDER, and any others. A bare text is the model; or settings:"""
    data: DataConfig | None = None
    """The held-out text that they predict; null where there are only tasks."""
    tasks: Annotated[tuple[TaskConfig, ...], Field(strict=False)] = ()
    """The benchmarks that they are asked; each may also be a bare text: the path of a description file, or the name of
    a task of lm-eval."""
    batch_tokens: Positive | Literal["auto"] = "auto"
    """Tokens that go through a model at once, with padding; auto is the length of a row or 16384, whichever is more. It
    changes memory and speed and no score."""
    logits_bytes: Positive | Literal["auto"] = "auto"
    """Budget for the logits that are held at a time; auto is 256 MiB."""
    device: str = "auto"
    """cpu, cuda, cuda:1; auto takes a CUDA device where there is one, and else the CPU."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Of the resamples that intervals are taken from."""
    out: PathText
    """The folder of the results, which must not exist yet."""

    @model_validator(mode="after")
    def _fits_together(self) -> "EvaluateConfig":
        for role in ("teacher", "baseline"):
            names = [name for name in self.models if self.role(name) == role]
            if len(names) > 1:
                raise ValueError(f"there is one {role} at the most, and {' and '.join(names)} are said to be it")
        if self.data is None:
            if not self.tasks:
                raise ValueError("there is nothing to measure: give `data` (a held-out text), `tasks`, or both")
            return self
        data = self.data
        if data.weight is not None:
            raise ValueError("data.weight: every predicted token counts the same in an evaluation")
        if data.cache != "auto":
            raise ValueError("data.cache: an evaluation keeps no tokenised data")
        if getattr(data, "template", "auto") == "student":
            raise ValueError("data.template=student: there may be several; auto demands that all have the same one")
        return self

    def role(self, name: str) -> Role:
        """The role of the model of that name."""
        return self.models[name].role or ROLES.get(name, "other")

    @property
    def teacher(self) -> str | None:
        """The teacher's name."""
        return next((name for name in self.models if self.role(name) == "teacher"), None)

    @property
    def baseline(self) -> str | None:
        return next((name for name in self.models if self.role(name) == "baseline"), None)

    @property
    def cuts(self) -> bool:
        """Whether a long document loses text, and where depends on the tokenizer."""
        return self.data is not None and not (isinstance(self.data, TextData) and self.data.overlong == "split")

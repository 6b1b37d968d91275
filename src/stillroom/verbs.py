"""What every verb does alike: a plan that --dry-run shows, checks that several plans make, and a run folder's life."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from stillroom.config import Config, is_local
from stillroom.data.config import AnyData
from stillroom.data.dataset import cache_path
from stillroom.data.sources import open_source
from stillroom.errors import ConfigError, MismatchError, MissingError
from stillroom.estimates.hardware import Hardware
from stillroom.estimates.report import CostReport
from stillroom.estimates.sections import costs_here
from stillroom.models import loading
from stillroom.recipe import to_yaml
from stillroom.runs import RunFolder, RunFolderView
from stillroom.terminal import redact
from stillroom.tokenizers import required_vocab_size, template_of

Report = Callable[[str, Mapping[str, Any]], None]
"""Receives what a run does, for a progress line: an event ("note", "step", …) and its values."""
C = TypeVar("C", bound=Config)


@dataclass(frozen=True)
class VerbPlan(ABC, Generic[C]):
    """What a verb will do: its settings, resolved and checked against headers. Making one writes nothing."""

    config: C
    """The settings with every "auto" resolved, as run.json writes them down."""

    def __str__(self) -> str:
        """Returns the resolved settings, what a run reads and writes, and what it costs, as YAML."""
        writes, out = self.writes(), Path(self.out)
        if out.exists():
            writes["note"] = f"{out} exists: it needs --resume or --overwrite"
        settings = {"config": redact(self.config.model_dump(mode="json"))}
        return to_yaml({**settings, **self.details(), "reads": self.reads(), "writes": writes, "costs": self.costs()})

    @property
    def out(self) -> str:
        """The run's folder."""
        out: Any = getattr(self.config, "out")  # noqa: B009
        return out

    def details(self) -> dict[str, Any]:
        """Returns what a verb shows of its plan besides, by name."""
        return {}

    @abstractmethod
    def reads(self) -> dict[str, str]:
        """Returns the models and files that a run reads, by what they are for."""

    @abstractmethod
    def writes(self) -> dict[str, str]:
        """Returns the files that a run writes, by what they are."""

    def promise(self, folder: Path) -> None:
        """Writes into ``folder`` what stands for the products of a run, each where it will be in ``out``.

        Another verb's plan that names ``folder`` where it means ``out`` is checked as if the run was made: a promised
        model has its configs, its tokenizer and the headers of its weights, a promised store its manifest and its
        tokenizer. What a run still has to measure or count is left open. A verb that makes nothing which others read
        promises nothing.
        """

    @abstractmethod
    def costs(self) -> dict[str, Any] | str:
        """Returns memory, arithmetic and time on the device of the run; or why they are not known."""


def costs_on(device: str, costs: Callable[[Hardware], CostReport]) -> dict[str, Any] | str:
    """Returns the costs on a device of this machine as texts; or why they are not known."""
    return costs_here(loading.device_name(device), loading.device_memory(device), costs)


def files_of(data: AnyData) -> str:
    """Returns the files of a data set, as a plan lists them."""
    files = open_source(data).files if is_local(data.path) else []
    return ", ".join(map(str, files)) or f"{data.path} on the hub"


def tokenized_file(data: AnyData, tokenizer: PreTrainedTokenizerBase, template: str | None) -> str:
    """Returns the path of a local data set once it is tokenized, and whether it is there already."""
    path = cache_path(data, tokenizer, template)
    return f"{path} ({'there already' if path.exists() else 'new'})"


def has_bfloat16(device: str) -> bool:
    """Whether "auto" means bfloat16 on a device: it is a CUDA device that computes in it."""
    return torch.device(device).type == "cuda" and torch.cuda.is_bf16_supported()


def check_row(setting: str, value: int, length: int, shown_length: object) -> None:
    """Raises ConfigError where a batch of ``value`` tokens has no room for a row of ``length`` tokens."""
    if value < length:
        raise ConfigError(
            f"{setting} is less than a row",
            {setting: value, "data.length": shown_length},
            why="A row goes through a model whole.",
            fix=f"Set it to at least {length}.",
        )


def check_vocabulary(
    tokenizer: PreTrainedTokenizerBase, model: PretrainedConfig, who: str, *, tokenizer_name: str, fix: str
) -> None:
    """Returns where a model has a column of its head for each token of a tokenizer.

    Args:
        who: the name of the model in an error.
        tokenizer_name: the name of the tokenizer in an error.

    Raises:
        MismatchError: it does not.
    """
    needed, there = required_vocab_size(tokenizer), model.get_text_config().vocab_size
    if needed > there:
        raise MismatchError(
            f"the tokenizer has tokens that {who} has no column for",
            {"tokenizer": f"{needed} tokens: {tokenizer_name}", f"the head of {who}": f"{there} columns"},
            why="The model would read and predict ids that it does not have; it is never resized without a word.",
            fix=fix,
        )


def required_template(tokenizer: PreTrainedTokenizerBase, data: AnyData, *, tokenizer_name: str) -> str:
    """Returns the tokenizer's chat template.

    Raises:
        MissingError: it has none.
    """
    if (template := template_of(tokenizer)) is None:
        raise no_template({"tokenizer": tokenizer_name, "data.format": data.format})
    return template


def no_template(values: Mapping[str, object], of: str = "the tokenizer") -> MissingError:
    """Returns the error of rows that need a chat template where there is none."""
    return MissingError(
        f"{of} has no chat template",
        dict(values),
        why="Without one it is not known how a conversation becomes text for the model.",
        fix="Give the tokenizer a chat_template.jinja, or use data.format=prompt_completion or text.",
    )


@contextmanager
def recorded(folder: RunFolder | RunFolderView, results: Callable[[], Mapping[str, Any]] = dict) -> Iterator[None]:
    """Records in run.json that what happens inside failed or was interrupted, where it does.

    Args:
        results: gives what else is known then.
    """
    try:
        yield
    except BaseException as error:
        status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        with suppress(OSError):  # the error that is under way says what went wrong
            folder.update(status=status, **results())
        raise

"""What is known of a run before anything is loaded: its models' configs and the headers of their safetensors, from a
folder, or these small files alone from the hub."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from stillroom.config import is_local
from stillroom.errors import DataError, MissingError, StillroomError
from stillroom.estimates.model_size import ModelSize, model_size
from stillroom.models.folder import has_other_head, read_object, read_values, tensors_of, weight_files

MOST_BESIDE = 1.25
"""Times the parameters, and a head that is tied and yet stored, that a model's files hold at the most: GPT-2's hold
masks of its attention, too."""

ITEM_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "BF16": 2, "F16": 2, "I16": 2, "U16": 2, "F8_E4M3": 1,
    "F8_E5M2": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip


EXPORT_DTYPES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""The types in which a model can be exported, by what safetensors calls them."""


@dataclass(frozen=True)
class ModelFiles:
    """What a model's small files tell."""

    config: Mapping[str, Any]
    """The values of config.json."""
    numbers: Mapping[str, int]
    """How many numbers its weights hold, by the type that safetensors calls them: BF16, F32, …"""

    @property
    def size_bytes(self) -> int:
        return sum(ITEM_BYTES.get(dtype, 1) * count for dtype, count in self.numbers.items())


@dataclass(frozen=True)
class Headers:
    """What is known of a run's models and data before anything is loaded."""

    models: Mapping[str, ModelSize]
    """By what they are in the run: student, teacher, model, smaller model; by name in an evaluation. A model behind a
    server has none."""
    store: Mapping[str, Any] | None = None
    """The manifest of a teacher's store."""
    num_tokens: float | None = None
    """Tokens in one pass over the data (of a capture, the positions that are stored), where they are tokenized."""
    num_held_out: float | None = None
    """Tokens of the held-out data, where they are tokenized."""
    itemsize: int = 2
    """Bytes of a number of the weights of a model that is cut."""
    alone: frozenset[str] | None = None
    """Models that read the text without the teacher, since their tokenizer is another; None where nobody compared."""
    questions: Mapping[str, int | None] = field(default_factory=dict)
    """How many questions each task asks; None where that is not known."""

    @classmethod
    def of(cls, configs: Mapping[str, PretrainedConfig | None], **known: Any) -> "Headers":
        """The same of configs that are loaded already; None for a model that is not there.

        Raises:
            ConfigError: `transformers` cannot build a model without code of its own.
        """
        sizes = {name: model_size(config, f"the {name}") for name, config in configs.items() if config is not None}
        return cls(sizes, **known)


def read_model(name: str, revision: str | None = None, whose: str = "the model") -> ModelFiles:
    """The config and the headers of a folder, or of a model on the hub (of which no weights are loaded).

    Raises:
        MissingError: there is no such model, or it has no config.json or no safetensors.
        DataError: a file is damaged.
    """
    return _local(Path(name).expanduser(), whose) if is_local(name) else _from_hub(name, revision, whose)


def read_sizes(name: str, revision: str | None, whose: str) -> tuple[ModelFiles, ModelSize]:
    """A model's small files and the size that its config tells and its headers confirm.

    Raises:
        MissingError: there is no such model, or it has no config.json or no safetensors.
        DataError: a file is damaged, or the weights are not those of the config.
        ConfigError: `transformers` cannot build the model without code of its own.
    """
    files = read_model(name, revision, whose)
    size, stored = model_size(files.config, whose), sum(files.numbers.values())
    packed = files.config.get("quantization_config") is not None
    if not packed and not size.total <= stored <= MOST_BESIDE * (size.total + size.head_entries):
        raise DataError(
            f"the weights of {whose} are not those of its config",
            {
                "config.json": f"{size.total:,} parameters ({size.family})",
                "headers of the weights": f"{stored:,} numbers",
            },
            why="One of them is another model's, or a file is missing, so no figure would be right.",
            fix="Download config.json and all *.safetensors of the same model again.",
        )
    return files, size


def checkpoint_dtype(config: PretrainedConfig, name: str | None, revision: str | None) -> str:
    """Returns the type of a model's weights: what its config says, or what most of them are stored in; float32 where
    that is no type that a model can be exported in, or where there are no weights (``name`` is None)."""
    if (dtype := config.dtype or config.get_text_config().dtype) is not None:
        found = str(dtype).removeprefix("torch.")
        return found if found in EXPORT_DTYPES.values() else "float32"
    numbers = {} if name is None else read_model(name, revision).numbers
    return EXPORT_DTYPES.get(max(numbers, key=lambda kind: numbers[kind], default="F32"), "float32")


def read_config(name: str, revision: str | None, whose: str) -> Mapping[str, Any]:
    """The config.json alone, of a model whose weights nobody will read.

    Raises:
        MissingError: there is none.
        DataError: it is damaged.
    """
    if is_local(name):
        return _local_config(Path(name).expanduser(), whose)
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return read_object(Path(hf_hub_download(name, "config.json", revision=revision)))
    except StillroomError:
        raise
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise _not_there(name, whose, str(error).splitlines()[0][:200]) from error


def _local(folder: Path, whose: str) -> ModelFiles:
    config = _local_config(folder, whose)
    numbers: Counter[str] = Counter()
    weights = weight_files(folder)
    for weight in weights:
        numbers.update(numbers_of(weight))
    if config.get("tie_word_embeddings", True) and has_other_head(folder):
        config = untied(config)
    return ModelFiles(config, numbers)


def _local_config(folder: Path, whose: str) -> Mapping[str, Any]:
    if not (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file():
        raise MissingError(
            f"{whose} is not there",
            {"folder": folder, "expected": "config.json"},
            why="Its sizes are read from its config.json.",
            fix="Check the path; the name of a model on the hub has the form owner/name.",
        )
    return read_values(folder)


def untied(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a config.json, with a head of its own."""
    inner = {key: untied(value) for key, value in values.items() if key == "text_config" and isinstance(value, dict)}
    return {**values, **inner, "tie_word_embeddings": False}


def numbers_of(path: Path) -> Counter[str]:
    """How many numbers a safetensors file holds, by type."""
    found: Counter[str] = Counter()
    for tensor in tensors_of(path).values():
        found[str(tensor.get("dtype"))] += prod(tensor["shape"])
    return found


def _from_hub(name: str, revision: str | None, whose: str) -> ModelFiles:
    from huggingface_hub import get_safetensors_metadata, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, NotASafetensorsRepoError

    config = read_config(name, revision, whose)
    try:
        cached = try_to_load_from_cache(name, "model.safetensors", revision=revision)
        if isinstance(cached, str):
            return ModelFiles(config, numbers_of(Path(cached)))
        found = get_safetensors_metadata(name, revision=revision)
    except StillroomError:
        raise
    except NotASafetensorsRepoError as error:
        raise _not_there(name, whose, "a config and no safetensors weights") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise _not_there(name, whose, str(error).splitlines()[0][:200]) from error
    return ModelFiles(config, {str(dtype): count for dtype, count in found.parameter_count.items()})


def _not_there(name: str, whose: str, found: str) -> MissingError:
    return MissingError(
        f"{whose} cannot be read from the hub",
        {"model": name, "found": found},
        why="Its config.json and the headers of its safetensors tell its sizes; its weights are not loaded.",
        fix="Check the name, the network (or HF_HUB_OFFLINE) and the access (`hf auth login`); or name a folder.",
    )

"""Reading: a model's tensors from its safetensors, by each process only the rows that it holds."""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel

from stillroom.errors import DataError
from stillroom.weights.parts import fill, named, own_rows


def load(model: PreTrainedModel, folder: Path, *, whole: bool = True) -> None:
    """Sets a model's parameters from the files of a folder: all, which must have memory, or those that have.

    Where the family's parameters are made of several tensors of the files (the experts of a mixture, say), those of one
    parameter are read whole, one parameter after the other.

    Raises:
        DataError: tensors are missing or left over, or have other shapes.
    """
    wanted, names = dict(named(model)), _Names(model)
    if not whole:
        wanted = {name: tensor for name, tensor in wanted.items() if not tensor.is_meta}
    given: set[int] = set()
    with _Files(folder) as files:
        left_over: list[str] = []
        composed: dict[str, tuple[Any, list[tuple[str, str]]]] = {}
        for key in files:
            name, pattern, converter = (key, None, None) if key in wanted else names.of(key, wanted)
            if name not in wanted:
                left_over.append(key)
            elif pattern is None:
                given.add(id(wanted[name]))
                _read_rows(wanted[name], files[key], key, folder)
            else:
                composed.setdefault(name, (converter, []))[1].append((key, pattern))
        for name, (converter, parts) in composed.items():
            for target, tensor in _compose(model, name, converter, parts, files).items():
                given.add(id(wanted[target]))
                _fill_from(wanted[target], tensor, target, folder)
    missing = [name for name, tensor in wanted.items() if id(tensor) not in given]
    left_over = [key for key in left_over if not any(re.search(p, key) for p in _left_out(model))]
    check_whole(str(folder), missing, left_over if whole else [], model.base_model_prefix)


def _left_out(model: PreTrainedModel) -> set[str]:
    """Patterns of what a family's files may hold and its models leave out, as `transformers` says: the frequencies of
    positions that old files have, heads for several tokens."""
    patterns = set(model._keys_to_ignore_on_load_unexpected or ())
    buffers = [name for name, _ in model.named_buffers()]
    if any(name.endswith("rotary_emb.inv_freq") for name in buffers):
        patterns.add(r"rotary_emb\.inv_freq")
    if any(name.endswith("position_ids") for name in buffers):
        patterns.add(r"(^|\.)position_ids$")
    return patterns


def check_whole(name: str, missing: list[str], left_over: list[str], prefix: str) -> None:
    """Returns where a model's files hold its tensors and no more of its body.

    Args:
        name: the model's.
        prefix: of the body's tensors.

    Raises:
        DataError: they do not.
    """
    if missing := sorted(missing):
        raise DataError(
            f"the weights of {name} are not complete",
            {"missing": f"{len(missing)} tensors: {', '.join(missing[:3])}"},
            why="They would be left at random values, and the model would look trained.",
            fix="Use a complete copy of the model, or start a new student with init={kind: config}.",
        )
    if surplus := sorted(key for key in left_over if key.startswith(f"{prefix}.")):
        raise DataError(
            f"{name} holds more than its config.json says",
            {"left over": f"{len(surplus)} tensors: {', '.join(surplus[:3])}"},
            why="A part of the model, layers perhaps, would be left out without a word.",
            fix="Mend config.json (num_hidden_layers is the usual fault), or use a complete copy of the model.",
        )


class _Files(ExitStack):
    """The tensors of a folder's safetensors by their names, none of them read yet."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def __enter__(self) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().__enter__()
        slices: dict[str, Any] = {}
        for path in _paths(self.folder):
            file = self.enter_context(safe_open(path, framework="pt"))
            slices |= {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
        return slices


def _paths(folder: Path) -> Iterator[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        yield from (folder / name for name in names)
    else:
        yield folder / "model.safetensors"


class _Names:
    """What tensors of a family's files are called in its model, as `transformers` says."""

    def __init__(self, model: PreTrainedModel) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        rules = get_model_conversion_mapping(model)
        self.prefix = model.base_model_prefix
        self.converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        self.renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]

    def of(self, key: str, wanted: Mapping[str, Tensor]) -> tuple[str, str | None, Any]:
        """The name; and, where the tensor is one of several that make up a parameter, by which pattern it was found and
        what makes the parameter of them."""
        from transformers.core_model_loading import rename_source_key

        name, pattern = rename_source_key(key, self.renamings, self.converters, self.prefix, dict(wanted))
        if pattern is None:
            return name, None, None
        return name, pattern, next(rule for rule in self.converters if pattern in rule.source_patterns)


def _compose(
    model: PreTrainedModel, name: str, converter: Any, parts: list[tuple[str, str]], files: Mapping[str, Any]
) -> dict[str, Tensor]:
    """The parameters that several tensors of the files make up, whole."""
    from transformers.core_model_loading import dot_natural_key

    converter = deepcopy(converter)
    for key, pattern in sorted(parts, key=lambda part: dot_natural_key(part[0])):
        converter.add_tensor(name, key, pattern, files[key][...])
    made = converter.convert(name, model=model, config=model.config)
    return {target: found[0] if isinstance(found, list) else found for target, found in made.items()}


def _read_rows(parameter: Tensor, there: Any, key: str, folder: Path) -> None:
    _check_shape(parameter, tuple(there.get_shape()), key, folder)
    try:
        fill(parameter, there[own_rows(parameter)] if parameter.ndim else there[...])
    except SafetensorError as error:
        raise DataError(
            f"the tensor {key} of {folder} cannot be read",
            {"reason": str(error)},
            why="The model cannot be whole without it.",
            fix="Copy or download its files again.",
        ) from error


def _fill_from(parameter: Tensor, whole: Tensor, name: str, folder: Path) -> None:
    _check_shape(parameter, tuple(whole.shape), name, folder)
    fill(parameter, whole[own_rows(parameter)])


def _check_shape(parameter: Tensor, shape: tuple[int, ...], key: str, folder: Path) -> None:
    if torch.Size(shape) != parameter.shape:
        raise DataError(
            f"the tensor {key} of {folder} has another shape than its config.json says",
            {"file": list(shape), "config.json": list(parameter.shape)},
            why="It is not the tensor that the model is to have.",
            fix="Put the right config.json beside the weights.",
        )

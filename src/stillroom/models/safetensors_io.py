"""Weights in safetensors files: read tensor by tensor or in row slices, and written in shards."""

import json
import re
import shutil
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import _TYPES, save_file
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from stillroom.errors import DataError
from stillroom.models.dtensor import fill_local, full_tensor, is_adapter, named, own_rows
from stillroom.models.folder import read_header
from stillroom.runs import replace_folder, writing


def load_weights(model: PreTrainedModel, folder: Path, *, whole: bool = True) -> None:
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
                _check_shape(wanted[target], tuple(tensor.shape), target, folder)
                fill_local(wanted[target], tensor[own_rows(wanted[target])])
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
        check_made(self.folder)
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
        fill_local(parameter, there[own_rows(parameter)] if parameter.ndim else there[...])
    except SafetensorError as error:
        raise DataError(
            f"the tensor {key} of {folder} cannot be read",
            {"reason": str(error)},
            why="The model cannot be whole without it.",
            fix="Copy or download its files again.",
        ) from error


def _check_shape(parameter: Tensor, shape: tuple[int, ...], key: str, folder: Path) -> None:
    if torch.Size(shape) != parameter.shape:
        raise DataError(
            f"the tensor {key} of {folder} has another shape than its config.json says",
            {"file": list(shape), "config.json": list(parameter.shape)},
            why="It is not the tensor that the model is to have.",
            fix="Put the right config.json beside the weights.",
        )


FILE_BYTES = 2**30
"""A file ends with the layer that takes it to this size, so that one process holds little more than that at a time."""


@contextmanager
def new_model_folder(folder: Path) -> Iterator[Path]:
    """Gives the temporary folder in which a model is to be written, and gives it its name where that went well.

    An older folder of the name is there until then, and what is not whole is deleted.

    Raises:
        StorageError: the disk is full, say.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # what a killed run left
    try:
        with writing(folder):
            try:
                yield temporary
            except SafetensorError as error:
                raise OSError(str(error)) from error  # what it says of a disk
            replace_folder(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


class _Rounding:
    """Gives a model's tensors the type in which they are exported.

    Numbers that are no floating point numbers stay, and so do those that `transformers` keeps in float32 whatever the
    type of the model is (the biases by which some mixtures of experts route).
    """

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype | None) -> None:
        self.dtype = dtype
        kept = () if dtype is None else model._get_dtype_plan(dtype)
        self.kept = [pattern.replace("*", ".*") for pattern in kept]

    def __call__(self, name: str, tensor: Tensor) -> Tensor:
        if self.dtype is None or not tensor.is_floating_point():
            return tensor
        return tensor.to(torch.float32 if any(re.search(p, name) for p in self.kept) else self.dtype)


def round_weights(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Rounds a model's parameters and saved buffers to another type in place, one after the other, which ends its
    training; adapters beside them too."""
    rounded = _Rounding(model, dtype)
    for name, tensor in model.state_dict(keep_vars=True).items():
        tensor.data = rounded(name, tensor.data)


def save_weights(
    model: PreTrainedModel,
    folder: Path,
    *,
    writes: bool,
    dtype: torch.dtype | None = None,
    file_bytes: int = FILE_BYTES,
) -> None:
    """Writes weights and configs as ``save_pretrained`` does; low-rank adapters are merged into the weights.

    Every process that holds a part calls it, and the one that ``writes`` makes the folder.

    Args:
        dtype: the type to which whole tensors are rounded as they are written; None leaves them as they are.
    """
    rounded = _Rounding(model, dtype)
    if writes:
        folder.mkdir(parents=True, exist_ok=True)
    kept: dict[str, Tensor] = {}
    written: list[dict[str, Tensor]] = []  # of each file its tensors, without memory
    for layer in _layers(model):
        tensors = _as_in_files(model, layer, rounded)
        if not writes:
            continue
        kept |= {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        if _size(kept) >= file_bytes:
            written.append(_write_file(kept, folder, len(written)))
            kept = {}
    if writes:
        if kept:
            written.append(_write_file(kept, folder, len(written)))
        _name_files(written, folder)
        _write_configs(model, folder, dtype or model.dtype)


PROMISE = "promise"
"""The format that the header of a promised model's weights names."""
_PROMISED = {"format": PROMISE}


def check_made(folder: Path) -> None:
    """Raises DataError where a model is only promised."""
    path = folder / "model.safetensors"
    if path.is_file() and read_header(path).startswith(json.dumps({"__metadata__": _PROMISED})[:-1].encode()):
        raise DataError(
            f"the model in {folder} is promised, and not there yet",
            {"format of model.safetensors": PROMISE},
            why="It stands for what a run will make, so that other runs can be planned, and has no weights.",
            fix="Make the run that writes the model, and name its folder.",
        )


def save_promise(model: PreTrainedModel, folder: Path, dtype: torch.dtype) -> None:
    """Writes what stands for a model until there is one: plans read it as they read a model, and nobody can load it.

    The header of its model.safetensors names each tensor with its type and shape, and the rest of the file is a hole,
    which takes no room on a disk.

    Args:
        model: on the meta device.
        dtype: the type that the model will be written in.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rounded, names = _Rounding(model, dtype), {dtype: name for name, dtype in reversed(_TYPES.items())}
    header: dict[str, Any] = {"__metadata__": _PROMISED}
    end = 0
    for layer in _layers(model):
        for name, tensor in _as_in_files(model, layer, rounded).items():
            start, end = end, end + tensor.numel() * tensor.itemsize
            header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    head = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        file.truncate(8 + len(head) + end)
    _write_configs(model, folder, dtype)


def _layers(model: PreTrainedModel) -> Iterator[list[tuple[str, nn.Module]]]:
    """The modules that have tensors of their own, by name: those of each block together, the others one by one."""
    blocks: dict[str, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules():
        if next(_own(module), None) is not None:
            words = name.split(".")
            number = next((i for i, word in enumerate(words) if word.isdecimal()), None)
            blocks.setdefault(name if number is None else ".".join(words[: number + 1]), []).append((name, module))
    yield from blocks.values()


def _own(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A module's own parameters and saved buffers."""
    yield from module.named_parameters(recurse=False)
    yield from ((k, b) for k, b in module.named_buffers(recurse=False) if k not in module._non_persistent_buffers_set)


def _as_in_files(
    model: PreTrainedModel, modules: Iterable[tuple[str, nn.Module]], rounded: _Rounding
) -> dict[str, Tensor]:
    """A block's tensors, whole and by the names of the family's files. A tied head is the embeddings, and left out."""
    from transformers.core_model_loading import revert_weight_conversion

    tied = set(model.all_tied_weights_keys) if model.config.get_text_config().tie_word_embeddings else set()
    adapted = {name for name, module in model.named_modules() if hasattr(module, "lora_A")}
    found: dict[str, Tensor] = {}
    for name, module in modules:
        for own, tensor in _own(module):
            key = f"{name}.{own}" if name else own
            if is_adapter(f".{key}"):
                continue
            whole = full_tensor(tensor)
            place = name.removesuffix(".base_layer")
            if own == "weight" and place != name and place in adapted:
                whole = whole + _delta(model.get_submodule(place)).to(whole.dtype)
            key = key.replace(".base_layer.", ".")
            if key not in tied:
                found[key] = rounded(key, whole)
    return revert_weight_conversion(model, found)


class _Delta(nn.Module):
    """What an adapter adds to the weight beside it, of parameters that are given."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self) -> Tensor:
        layer: Any = self.layer
        deltas = [layer.get_delta_weight(name) for name in layer.active_adapters]
        return torch.stack(deltas).sum(0)


@torch.no_grad()
def _delta(layer: nn.Module) -> Tensor:
    whole = {
        f"layer.{name}": full_tensor(parameter)
        for name, parameter in layer.named_parameters()
        if not name.startswith("base_layer.")
    }
    return functional_call(_Delta(layer), whole, ())


def _size(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())


def _write_file(tensors: dict[str, Tensor], folder: Path, number: int) -> dict[str, Tensor]:
    """Writes a file under a name that does not yet say how many there are; returns its tensors without memory."""
    save_file(tensors, folder / _temporary(number), metadata={"format": "pt"})
    return {name: tensor.to("meta") for name, tensor in tensors.items()}


def _temporary(number: int) -> str:
    return f"{number:05d}.part"


def _name_files(written: list[dict[str, Tensor]], folder: Path) -> None:
    if len(written) == 1:
        (folder / _temporary(0)).rename(folder / "model.safetensors")
        return
    places: dict[str, str] = {}
    for number, tensors in enumerate(written):
        name = f"model-{number + 1:05d}-of-{len(written):05d}.safetensors"
        (folder / _temporary(number)).rename(folder / name)
        places |= dict.fromkeys(tensors, name)
    sizes = {
        "total_size": sum(map(_size, written)),
        "total_parameters": sum(t.numel() for w in written for t in w.values()),
    }
    index = {"metadata": sizes, "weight_map": dict(sorted(places.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_configs(model: PreTrainedModel, folder: Path, dtype: torch.dtype) -> None:
    config: Any = model.config
    config.architectures = [type(model).__name__]
    config.dtype = str(dtype).removeprefix("torch.")
    config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)

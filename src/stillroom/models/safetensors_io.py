"""Weights: which rows of a parameter this process holds, and their files, read tensor by tensor or in row slices and
written in shards."""

import json
import re
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import _TYPES, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.func import functional_call
from transformers import PreTrainedModel

from stillroom.errors import DataError
from stillroom.models.folder import INDEX_FILE, read_header, weight_files
from stillroom.runs import replace_folder, writing


def own_rows(parameter: Tensor) -> slice:
    """The rows (of the first dimension) of a parameter that lie in this process; all where it is not sharded.

    FSDP2 shards as ``torch.chunk`` does: as many rows in each part as in the first, and fewer or none in the last ones.
    """
    if not parameter.ndim:
        return slice(0, 1)
    if not isinstance(parameter, DTensor):
        return slice(0, parameter.shape[0])
    assert all(placement.is_shard(0) for placement in parameter.placements if placement.is_shard())
    mesh, placements = parameter.device_mesh, parameter.placements
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, mesh, placements)
    start = min(offset[0], parameter.shape[0])
    return slice(start, start + shape[0])


def local_part(tensor: Tensor) -> Tensor:
    """The part of a tensor that lies in this process: itself where it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def fill_local(parameter: Tensor, rows: Tensor) -> None:
    """Sets this process's part of a parameter: ``rows`` are those of ``own_rows``."""
    local_part(parameter).copy_(rows.reshape(local_part(parameter).shape))


def full_tensor(tensor: Tensor) -> Tensor:
    """A tensor whole, put together from the parts of all processes, each of which must ask for it."""
    if not isinstance(tensor, DTensor):
        return tensor.detach()
    if tensor.device.type != tensor.device_mesh.device_type:  # offloaded
        return full_tensor(tensor.to(tensor.device_mesh.device_type))
    return tensor.full_tensor().detach()


def materialize(module: nn.Module, device: torch.device | str) -> None:
    """Gives parameters without memory ("meta") some, on ``device``, with whatever lies there; others move there."""

    def there(tensor: Tensor) -> Tensor:
        return torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.to(device)

    module._apply(there)


def named(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and saved buffers by their names in the model's files, each name of a tied one.

    Adapters are left out, and the weights beside them have the names that they had before.
    """
    state: dict[str, Any] = module.state_dict(keep_vars=True)
    for name, tensor in state.items():
        if not is_adapter(name):
            yield name.replace(".base_layer.", "."), tensor


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name is part of a low-rank adapter."""
    return ".lora_" in name


def load_weights(model: PreTrainedModel, folder: Path, *, whole: bool = True) -> None:
    """Sets a model's parameters from the files of a folder: all, which must have memory, or those that have.

    Where the family's parameters are made of several tensors of the files (the experts of a mixture, say), those of one
    parameter are read whole, one parameter after the other.

    Raises DataError where tensors are missing or left over, or have other shapes.
    """
    wanted, renamed = dict(named(model)), _renaming(model)
    if not whole:
        wanted = {name: tensor for name, tensor in wanted.items() if not tensor.is_meta}
    given: set[int] = set()
    with _slices(folder) as files:
        left_over: list[str] = []
        composed: dict[str, tuple[Any, list[tuple[str, str]]]] = {}
        for key in files:
            name, pattern, converter = (key, None, None) if key in wanted else renamed(key, wanted)
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
    left_out = _left_out(model)
    left_over = [key for key in left_over if whole and not any(re.search(pattern, key) for pattern in left_out)]
    check_whole(str(folder), missing, left_over, model.base_model_prefix)


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

    Raises DataError where they do not.
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


@contextmanager
def _slices(folder: Path) -> Iterator[dict[str, Any]]:  # kept: a context of its own
    """Gives the tensors of a folder's safetensors by their names, none of them read yet."""
    check_made(folder)
    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(path, framework="pt")) for path in weight_files(folder)]
        yield {key: file.get_slice(key) for file in files for key in file.keys()}  # noqa: SIM118


def _renaming(model: PreTrainedModel) -> Callable[[str, Mapping[str, Tensor]], tuple[str, str | None, Any]]:
    """Returns a function from the name of a tensor in a family's files to its name in the model, as `transformers` has
    it; and, where it is one of several that make up a parameter, by which pattern it was found and what joins them."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    rules = get_model_conversion_mapping(model)
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]

    def renamed(key: str, wanted: Mapping[str, Tensor]) -> tuple[str, str | None, Any]:
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, dict(wanted))
        return name, pattern, next((rule for rule in converters if pattern in rule.source_patterns), None)

    return renamed


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
PART = "{:05d}.part"
"""The name of a file while nobody knows how many there will be."""


@contextmanager
def new_model_folder(folder: Path) -> Iterator[Path]:
    """Gives the temporary folder in which a model is to be written, and gives it its name where that went well.

    An older folder of the name is there until then, and what is not whole is deleted.

    Raises StorageError where the disk is full, say.
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


def _rounding(model: PreTrainedModel, dtype: torch.dtype | None) -> Callable[[str, Tensor], Tensor]:
    """Returns a function that gives a model's tensors, by name, the type in which they are exported.

    Numbers that are no floating point numbers stay, and so do those that `transformers` keeps in float32 whatever the
    type of the model is (the biases by which some mixtures of experts route).
    """
    kept = [pattern.replace("*", ".*") for pattern in (() if dtype is None else model._get_dtype_plan(dtype))]

    def rounded(name: str, tensor: Tensor) -> Tensor:
        if dtype is None or not tensor.is_floating_point():
            return tensor
        return tensor.to(torch.float32 if any(re.search(pattern, name) for pattern in kept) else dtype)

    return rounded


def round_weights(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Rounds a model's parameters and saved buffers to another type in place, one after the other, which ends its
    training; adapters beside them too."""
    rounded = _rounding(model, dtype)
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
    rounded = _rounding(model, dtype)
    if writes:
        folder.mkdir(parents=True, exist_ok=True)
    kept: dict[str, Tensor] = {}
    written: list[dict[str, Tensor]] = []  # of each file its tensors, without memory

    def write() -> None:
        save_file(kept, folder / PART.format(len(written)), metadata={"format": "pt"})
        written.append({name: tensor.to("meta") for name, tensor in kept.items()})
        kept.clear()

    for layer in _layers(model):
        tensors = _as_in_files(model, layer, rounded)
        if writes:
            kept |= {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
            if _size(kept) >= file_bytes:
                write()
    if writes:
        if kept:
            write()
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
    rounded, names = _rounding(model, dtype), {dtype: name for name, dtype in reversed(_TYPES.items())}
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


def _write_configs(model: PreTrainedModel, folder: Path, dtype: torch.dtype) -> None:
    config: Any = model.config
    config.architectures = [type(model).__name__]
    config.dtype = str(dtype).removeprefix("torch.")
    config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)


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


@torch.no_grad()
def _as_in_files(
    model: PreTrainedModel, modules: Iterable[tuple[str, nn.Module]], rounded: Callable[[str, Tensor], Tensor]
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
                adapter = _Delta(model.get_submodule(place))
                parts = {k: full_tensor(p) for k, p in adapter.named_parameters() if ".base_layer." not in k}
                whole = whole + functional_call(adapter, parts, ()).to(whole.dtype)
            key = key.replace(".base_layer.", ".")
            if key not in tied:
                found[key] = rounded(key, whole)
    return revert_weight_conversion(model, found)


class _Delta(nn.Module):
    """Gives what an adapter adds to the weight beside it, of parameters that are given."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self) -> Tensor:
        layer: Any = self.layer
        return torch.stack([layer.get_delta_weight(name) for name in layer.active_adapters]).sum(0)


def _size(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())


def _name_files(written: list[dict[str, Tensor]], folder: Path) -> None:
    """Gives files their names, which say how many there are, and writes the index of several."""
    places: dict[str, str] = {}
    for number, tensors in enumerate(written):
        name = f"model-{number + 1:05d}-of-{len(written):05d}.safetensors"
        name = "model.safetensors" if len(written) == 1 else name
        (folder / PART.format(number)).rename(folder / name)
        places |= dict.fromkeys(tensors, name)
    if len(written) > 1:
        sizes = {
            "total_size": sum(map(_size, written)),
            "total_parameters": sum(t.numel() for w in written for t in w.values()),
        }
        index = {"metadata": sizes, "weight_map": dict(sorted(places.items()))}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

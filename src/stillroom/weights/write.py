"""Writing: a model whose parameters lie in several processes as one Hugging Face folder, a few layers at a time."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from stillroom.weights.parts import full, is_adapter

FILE_BYTES = 2**30
"""A file ends with the layer that takes it to this size, so that one process holds little more than that at a time."""


def save(model: PreTrainedModel, folder: Path, *, writes: bool, file_bytes: int = FILE_BYTES) -> None:
    """Writes weights and configs as ``save_pretrained`` does; low-rank adapters are merged into the weights.

    Every process that holds a part calls it, and the one that ``writes`` makes the folder.
    """
    if writes:
        folder.mkdir(parents=True, exist_ok=True)
    kept: dict[str, Tensor] = {}
    written: list[dict[str, Tensor]] = []  # of each file its tensors, without memory
    for layer in _layers(model):
        tensors = _as_in_files(model, layer)
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
        _write_configs(model, folder)


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


def _as_in_files(model: PreTrainedModel, modules: Iterable[tuple[str, nn.Module]]) -> dict[str, Tensor]:
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
            whole = full(tensor)
            place = name.removesuffix(".base_layer")
            if own == "weight" and place != name and place in adapted:
                whole = whole + _delta(model.get_submodule(place)).to(whole.dtype)
            key = key.replace(".base_layer.", ".")
            if key not in tied:
                found[key] = whole
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
        f"layer.{name}": full(parameter)
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


def _write_configs(model: PreTrainedModel, folder: Path) -> None:
    config: Any = model.config
    config.architectures = [type(model).__name__]
    config.dtype = str(model.dtype).removeprefix("torch.")
    config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)

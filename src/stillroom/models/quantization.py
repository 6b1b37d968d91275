"""Quantised weights: the linear layers of a model in 8 or 4 bits, made as they are read, by `transformers`' quantisers.

    int8    a scale for each output channel (torchao)
    fp8     e4m3, a scale for each output channel (torchao)
    nf4     four bits with the quantiles of a normal distribution, a scale for each 64 (arXiv 2305.14314, bitsandbytes)

Weights alone are quantised: products are made in the model's own type. Embeddings and head keep it, too.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from stillroom.config import Quantization
from stillroom.errors import MismatchError, require

PACKAGES: dict[Quantization, str] = {"int8": "torchao", "fp8": "torchao", "nf4": "bitsandbytes"}


def check_quantizable(config: PretrainedConfig, kind: Quantization, name: str) -> None:
    """Returns where a model's weights can be quantised.

    Raises:
        MissingError: a package that does it is not installed.
        MismatchError: the model's weights are stored in a quantised form already.
    """
    for package in (PACKAGES[kind], "accelerate"):
        require(package, "quantized", f"weights in {kind}")
    stored: Any = getattr(config, "quantization_config", None)
    if stored is not None:
        method = stored.get("quant_method") if isinstance(stored, dict) else getattr(stored, "quant_method", None)
        raise MismatchError(
            f"{name} is quantised already",
            {"asked for": kind, "its config.json": method},
            why="What is quantised twice is rounded twice, and none of the quantisers does it.",
            fix="Leave `quantization` out, which loads it as it is stored; or name the model that it was made of.",
        )


def quantized_loading(kind: Quantization, dtype: torch.dtype | str, device: torch.device | str) -> dict[str, Any]:
    """What `from_pretrained` takes besides, so that each weight is quantised on the device as it is read.

    Args:
        dtype: of the products.
    """
    assert isinstance(dtype, torch.dtype)
    return {"quantization_config": _quantizer(kind, dtype), "device_map": {"": device}}


def _quantizer(kind: Quantization, dtype: torch.dtype) -> Any:
    """A quantiser's settings, which leave out the head, and what is tied to it, where they name nothing."""
    if kind == "nf4":
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    from torchao.quantization import (  # pyright: ignore[reportMissingImports]
        Float8WeightOnlyConfig,
        Int8WeightOnlyConfig,
    )
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig() if kind == "int8" else Float8WeightOnlyConfig())


def is_quantized(weight: Tensor | None) -> bool:
    """Whether it is held by a class of a quantiser's."""
    return weight is not None and type(weight) is not nn.Parameter


def check_quantized(model: PreTrainedModel, kind: Quantization, name: str) -> None:
    """Returns where a model's layers are quantised and its head is not.

    Raises:
        MismatchError: none is, or the head is; or four bits do not fit their sizes.
    """
    head: Any = model.get_output_embeddings()
    if head is not None and is_quantized(head.weight):
        raise MismatchError(
            f"the head of {name} would be quantised",
            {"family": model.config.model_type, "asked for": kind},
            why="The losses multiply with its weight, which must be numbers as they are.",
            fix="Leave `quantization` out, and please report the family.",
        )
    if not any(map(is_quantized, model.parameters())):
        raise MismatchError(
            f"no layer of {name} can be quantised to {kind}",
            {"family": model.config.model_type, "asked for": kind},
            why="Its layers are of a kind that the quantiser passes over, so nothing would be gained.",
            fix="Leave `quantization` out, or try another kind.",
        )
    _check_blocks(model, name)


def _check_blocks(model: PreTrainedModel, name: str) -> None:
    """On a CPU bitsandbytes packs four bits in blocks of 32 outputs by 64 inputs."""
    for layer, parameter in model.named_parameters():
        packed: Any = getattr(parameter, "quant_state", None)
        if packed is not None and parameter.device.type == "cpu" and (packed.shape[0] % 32 or packed.shape[1] % 64):
            raise MismatchError(
                f"{name} has sizes that four bits on a CPU do not fit",
                {layer: "{} outputs of {} inputs".format(*packed.shape), "multiples of": "32 and 64"},
                why="bitsandbytes packs weights in blocks of that size there, and takes no others.",
                fix="Take quantization=int8, or a GPU, where any size fits.",
            )


def num_numbers(parameter: Tensor) -> int:
    """How many numbers a parameter stands for: in four bits, two are packed into one."""
    packed: Any = getattr(parameter, "quant_state", None)
    return parameter.numel() if packed is None else packed.shape.numel()

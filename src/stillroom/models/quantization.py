"""Quantized weights: the linear layers of a model in 8 or 4 bits, made as they are read, by `transformers`' quantizers.

    int8    a scale for each output channel (torchao)
    fp8     e4m3, a scale for each output channel (torchao)
    nf4     four bits with the quantiles of a normal distribution, a scale for each 64 (arXiv 2305.14314, bitsandbytes)

Weights alone are quantized: products are made in the model's own type. Embeddings and head keep it, too.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from stillroom.config import Quantization
from stillroom.errors import MismatchError, require

PACKAGES: dict[Quantization, str] = {"int8": "torchao", "fp8": "torchao", "nf4": "bitsandbytes"}


def check_quantizable(config: PretrainedConfig, kind: Quantization, name: str) -> None:
    """Returns where a model's weights can be quantized. Raises MissingError where a package that does it is not
    installed; MismatchError where the model's weights are stored in a quantized form already."""
    for package in (PACKAGES[kind], "accelerate"):
        require(package, "quantized", f"weights in {kind}")
    stored: Any = getattr(config, "quantization_config", None)
    if stored is not None:
        method = stored.get("quant_method") if isinstance(stored, dict) else getattr(stored, "quant_method", None)
        raise MismatchError(
            f"{name} is quantized already",
            {"asked for": kind, "its config.json": method},
            why="What is quantized twice is rounded twice, and none of the quantizers does it.",
            fix="Leave `quantization` out, which loads it as it is stored; or name the model that it was made of.",
        )


def quantized_loading(kind: Quantization, dtype: torch.dtype | str, device: torch.device | str) -> dict[str, Any]:
    """Returns what `from_pretrained` takes besides, so that each weight is quantized on the device as it is read.

    The quantizer's settings leave out the head, and what is tied to it, where they name nothing.

    Args:
        dtype: of the products.
    """
    assert isinstance(dtype, torch.dtype)
    if kind == "nf4":
        from transformers import BitsAndBytesConfig

        form = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": dtype}
        quantizer: Any = BitsAndBytesConfig(load_in_4bit=True, **form)
    else:
        from torchao import quantization  # pyright: ignore[reportMissingImports]
        from transformers import TorchAoConfig

        of_weights = quantization.Int8WeightOnlyConfig if kind == "int8" else quantization.Float8WeightOnlyConfig
        quantizer = TorchAoConfig(of_weights())
    return {"quantization_config": quantizer, "device_map": {"": device}}


def is_quantized(weight: Tensor | None) -> bool:
    """Whether it is held by a class of a quantizer's."""
    return weight is not None and type(weight) is not nn.Parameter


def check_quantized(model: PreTrainedModel, kind: Quantization, name: str) -> None:
    """Returns where a model's layers are quantized and its head is not.

    Raises:
        MismatchError: none is, or the head is; or four bits do not fit their sizes.
    """
    head: Any = model.get_output_embeddings()
    if head is not None and is_quantized(head.weight):
        raise MismatchError(
            f"the head of {name} would be quantized",
            {"family": model.config.model_type, "asked for": kind},
            why="The losses multiply with its weight, which must be numbers as they are.",
            fix="Leave `quantization` out, and please report the family.",
        )
    if not any(map(is_quantized, model.parameters())):
        raise MismatchError(
            f"no layer of {name} can be quantized to {kind}",
            {"family": model.config.model_type, "asked for": kind},
            why="Its layers are of a kind that the quantizer passes over, so nothing would be gained.",
            fix="Leave `quantization` out, or try another kind.",
        )
    for layer, parameter in model.named_parameters():
        packed: Any = getattr(parameter, "quant_state", None)  # on a CPU, in blocks of 32 outputs by 64 inputs
        if packed is not None and parameter.device.type == "cpu" and (packed.shape[0] % 32 or packed.shape[1] % 64):
            raise MismatchError(
                f"{name} has sizes that four bits on a CPU do not fit",
                {layer: "{} outputs of {} inputs".format(*packed.shape), "multiples of": "32 and 64"},
                why="bitsandbytes packs weights in blocks of that size there, and takes no others.",
                fix="Take quantization=int8, or a GPU, where any size fits.",
            )


def num_numbers(parameter: Tensor) -> int:
    """Returns how many numbers a parameter stands for: in four bits, two are packed into one."""
    packed: Any = getattr(parameter, "quant_state", None)
    return parameter.numel() if packed is None else packed.shape.numel()

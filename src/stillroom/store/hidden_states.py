"""The hidden column: inner states of the teacher to bytes and back. docs/formats/store.md tells it byte by byte.

A row holds one block a layer, in the order of a model. ``int8``: the scale of each position, float32, then numbers,
``[kept, width]``; a state is numbers · scale, scale = max |state| / 127. ``bfloat16``: the states, ``[kept, width]``.
"""

from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from stillroom.layers import Layer
from stillroom.store.config import HiddenStatesConfig

MOST = torch.finfo(torch.bfloat16).max
"""The largest size of a channel that can be kept: what bfloat16 holds."""

LEAST_SCALE = torch.finfo(torch.float32).tiny
"""A state whose scale would be less, so that no channel reaches 1.5e-36, is kept as zeros."""

LEVELS = 127

MOST_SCALE = np.float32(MOST) / np.float32(LEVELS)


def bytes_per_position(config: HiddenStatesConfig, width: int) -> int:
    """What the states of one position take, exactly."""
    return len(config.layers) * (4 + width if config.format == "int8" else 2 * width)


def encode(states: Float[Tensor, "layers kept width"], config: HiddenStatesConfig) -> bytes:
    """A row of float32 states, which are all finite and none larger than ``MOST``, as bytes."""
    assert len(states) == len(config.layers)
    if config.format == "bfloat16":
        return _bytes(states.to(torch.bfloat16).view(torch.int16), "<i2")
    scales = states.abs().amax(-1) / LEVELS
    scales = torch.where(scales < LEAST_SCALE, 0.0, scales)
    numbers = (states / torch.where(scales > 0, scales, torch.inf).unsqueeze(-1)).round().to(torch.int8)
    return b"".join(_bytes(s, "<f4") + _bytes(n, "i1") for s, n in zip(scales, numbers, strict=True))


def decode(
    data: bytes | memoryview, config: HiddenStatesConfig, width: int, kept: int, into: Mapping[Layer, np.ndarray]
) -> None:
    """Writes the states of some of a row's layers into arrays, float32 [kept, width].

    Raises:
        ValueError: the bytes are not as many as such a row has, or hold what is no state.
    """
    size = kept * bytes_per_position(config, width)
    if len(data) != size:
        raise ValueError(f"{len(data)} bytes of hidden states where {size} are expected")
    if not kept:
        return
    block = size // len(config.layers)
    for layer, out in into.items():
        start = block * config.layers.index(layer)
        _decode_block(data[start : start + block], config, out)


def _decode_block(data: bytes | memoryview, config: HiddenStatesConfig, out: np.ndarray) -> None:
    kept = len(out)
    if config.format == "bfloat16":
        bits = np.frombuffer(data, "<u2").astype(np.uint32) << 16
        out[:] = bits.view(np.float32).reshape(out.shape)
        if not np.isfinite(out).all():
            raise ValueError("a hidden state is not finite")
        return
    scales = np.frombuffer(data, "<f4", kept)
    if not ((scales >= 0) & (scales <= MOST_SCALE) & ~np.signbit(scales)).all():
        raise ValueError("a scale of hidden states is negative, too large or not a number")
    numbers = np.frombuffer(data, "i1", offset=4 * kept).reshape(out.shape)
    if numbers.min(initial=0) < -LEVELS:
        raise ValueError("a number of hidden states is -128")
    np.multiply(numbers, scales[:, None], out=out, dtype=np.float32)


def _bytes(tensor: Tensor, kind: str) -> bytes:
    return tensor.cpu().contiguous().numpy().astype(kind, copy=False).tobytes()

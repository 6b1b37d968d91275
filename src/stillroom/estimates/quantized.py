"""Weights in 8 or 4 bits: the kinds there are, and what they take."""

from stillroom.estimates.architecture import Architecture
from stillroom.models.config import Quantization

WEIGHT_BYTES: dict[Quantization, float] = {"int8": 1.0, "fp8": 1.0, "nf4": 0.5 + 1 / 64 + 4 / (64 * 256)}
"""Of a weight: of the 8-bit kinds the scales (one for each output channel) are left out; of nf4 the scale of each 64,
itself in 8 bits with a scale for each 256, is counted."""


def weights_bytes(model: Architecture, itemsize: int, quantization: Quantization | None) -> float:
    """Of all of a model's weights. Where they are quantised, those of attention and of dense MLPs are; embeddings,
    norms, experts and the head keep their ``itemsize``."""
    parameters = model.parameters
    if quantization is None:
        return float(itemsize * parameters.total)
    quantized = parameters.attention + parameters.mlp
    return WEIGHT_BYTES[quantization] * quantized + itemsize * (parameters.total - quantized)

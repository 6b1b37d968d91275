"""Settings that belong to a model, wherever it is used. They import no torch."""

from typing import Literal

Quantization = Literal["int8", "fp8", "nf4"]


Attention = Literal["auto", "eager", "sdpa", "flash_attention_2", "flex_attention"]

"""LMHead: from a hidden state to logits, with every transformation that model families apply on the way."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from stillroom.errors import MismatchError

TILE_ROWS = 8192
"""Rows of a half-precision weight that are widened at a time where the device cannot accumulate in float32 itself."""


@dataclass(frozen=True)
class LMHead:
    """``logits = softcap(scale · (hidden @ weightᵀ + bias))`` with ``softcap(x) = c · tanh(x / c)``."""

    weight: Float[Tensor, "v d"]
    bias: Float[Tensor, " v"] | None = None
    scale: float = 1.0
    softcap: float | None = None

    @property
    def vocab_size(self) -> int:
        return self.weight.shape[0]

    def logits(self, hidden: Float[Tensor, "n d"], vocab_size: int | None = None) -> Float[Tensor, "n c"]:
        """The first ``vocab_size`` logits (all by default), float32, or float64 where ``hidden`` is. No gradients."""
        vocab_size = self.vocab_size if vocab_size is None else vocab_size
        check_columns(vocab_size, self.vocab_size, "head")
        out = torch.empty(len(hidden), vocab_size, dtype=accumulator(hidden.dtype), device=hidden.device)
        with torch.no_grad():
            logits_into(out, hidden, self)
        return out


def check_columns(asked_for: int, there: int, whose: str) -> None:
    """Raises MismatchError where there are fewer columns of the vocabulary than asked for, or fewer than one is."""
    if not 0 < asked_for <= there:
        raise MismatchError(
            f"{asked_for} columns cannot be taken from the {whose}",
            {"asked for": f"{asked_for} columns", f"the {whose} has": f"{there} columns"},
            why="The others would be whatever lies in memory.",
            fix="Compare at most the columns that both heads have.",
        )


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The type that sums are held in: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def logits_into(out: Float[Tensor, "n c"], hidden: Float[Tensor, "n d"], head: LMHead) -> None:
    """Writes the first ``c`` logits of each row into ``out``."""
    vocab_size = out.shape[1]
    multiply_into(out, hidden, head.weight[:vocab_size])
    if head.bias is not None:
        out += head.bias[:vocab_size]
    if head.scale != 1.0:
        out *= head.scale
    if head.softcap is not None:
        out.div_(head.softcap).tanh_().mul_(head.softcap)


def multiply_into(out: Float[Tensor, "n c"], rows: Float[Tensor, "n d"], weight: Float[Tensor, "c d"]) -> None:
    """``out = rows @ weightᵀ``, accumulated in the type of ``out`` whatever the type of the operands."""
    if rows.dtype == weight.dtype == out.dtype:
        torch.mm(rows, weight.T, out=out)
    elif rows.is_cuda and rows.dtype == weight.dtype:
        out.copy_(torch.mm(rows, weight.T, out_dtype=out.dtype))
    else:
        wide = rows.to(out.dtype)
        for start in range(0, len(weight), TILE_ROWS):
            tile = slice(start, start + TILE_ROWS)
            torch.mm(wide, weight[tile].to(out.dtype).T, out=out[:, tile])


def add_product(
    total: Float[Tensor, "n m"], left: Float[Tensor, "n k"], right: Float[Tensor, "k m"], *, first: bool = False
) -> None:
    """``total += left @ right``, accumulated in the type of ``total`` and ``left``; ``right`` may be narrower.

    Args:
        first: ``total`` counts as 0, whatever it holds.
    """
    if right.dtype == total.dtype:
        total.addmm_(left, right, beta=0 if first else 1)
    elif right.is_cuda:
        product = torch.mm(left.to(right.dtype), right, out_dtype=total.dtype)
        total.copy_(product) if first else total.add_(product)
    else:
        for start in range(0, len(right), TILE_ROWS):
            tile = slice(start, start + TILE_ROWS)
            total.addmm_(left[:, tile], right[tile].to(total.dtype), beta=0 if first and start == 0 else 1)

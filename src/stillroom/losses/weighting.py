"""Weighting: what each token counts in an objective, besides the objective's own weight."""

import math
from collections.abc import Callable
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from stillroom.errors import MismatchError
from stillroom.losses.block import Block
from stillroom.losses.measures import student_entropy, teacher_entropy

TokenWeight = Callable[[Block], Tensor]
"""What each position of a block counts, [r]. It is a number like any other to the gradient, which does not pass it."""


def by_entropy(who: Literal["student", "teacher"], *, certain: float, uncertain: float) -> TokenWeight:
    """``certain + (uncertain − certain) · H / log v`` with the entropy H at temperature 1 over v columns."""

    def weight(block: Block) -> Float[Tensor, " r"]:
        entropy = student_entropy(block) if who == "student" else teacher_entropy(block)
        share = entropy / math.log(max(2, block.num_columns))
        return certain + (uncertain - certain) * share

    return weight


def by_data(block: Block) -> Float[Tensor, " r"]:
    """The batch's own weights.

    Raises:
        MismatchError: it has none.
    """
    if block.data_weights is None:
        raise MismatchError(
            "an objective counts tokens by the data, and the batch brings no weights",
            {"token_weight": "data", "batch.weights": "none"},
            why="Every token would count alike, which is not what was asked for.",
            fix="Set data.weight to the column that holds each row's weight.",
        )
    return block.data_weights.to(block.logits("student").dtype)

"""Pair: hidden states of student and teacher at the same positions, which every distance compares."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stillroom.errors import MismatchError
from stillroom.head import accumulator
from stillroom.signals import Attention

EPS = 1e-6
"""The least mean square that a row is divided by, as in most models' norms: a row below an RMS of 1e-3 counts as small,
and one of zeros stays finite."""


@dataclass(frozen=True)
class Pair:
    """What student and teacher hold at the same ``n`` kept positions of one layer each."""

    student: Float[Tensor, "n d"] | Attention
    """After the projector, so of the teacher's width; queries, keys and values for the attention relation."""
    teacher: Float[Tensor, "n e"] | Attention
    """``e`` is ``d``, but for the linear CKA and the attention relation, which compare any widths."""
    documents: Int[Tensor, " n"]
    """Which document each position belongs to: equal numbers stand side by side."""
    scale: Float[Tensor, " d"] | None = None
    """What each channel's difference is divided by, for the channel-scaled MSE."""

    def states(self) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n d"]]:
        """Student's and teacher's states, in float32, or float64 where the student's are. The teacher has no gradient.

        Raises:
            MismatchError: their widths differ.
        """
        student, teacher = self.student, self.teacher
        assert isinstance(student, Tensor)
        assert isinstance(teacher, Tensor)
        if student.shape[1] != teacher.shape[1]:
            raise MismatchError(
                "the states of student and teacher have different widths",
                {"student": f"{student.shape[1]} channels", "teacher": f"{teacher.shape[1]} channels"},
                why="This distance compares them channel by channel.",
                fix="Use a projector, or linear_cka, which compares states of any widths.",
            )
        dtype = accumulator(student.dtype)
        return student.to(dtype), teacher.detach().to(dtype)


Distance = Callable[..., Float[Tensor, " n"]]
"""``distance(pair, **arguments)``: one value for each position, differentiable in the student's states.

It is at least 0, and 0 with a gradient of 0 where the student's states are the teacher's. A state that is not finite
gives a value that is not finite.
"""


def mean_square(states: Float[Tensor, "n d"]) -> Float[Tensor, "n 1"]:
    """Of each row, over its channels."""
    return states.square().mean(-1, keepdim=True)


def no_autocast(tensor: Tensor) -> torch.autocast:
    """A context in which products keep the type of their operands, inside an autocast too."""
    return torch.autocast(tensor.device.type, enabled=False)

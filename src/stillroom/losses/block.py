"""LogitBlock: a few rows of logits, from which every loss takes the log-probabilities it needs."""

from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stillroom.errors import MismatchError
from stillroom.kernels import LOWEST_LOGIT
from stillroom.signals import Sparse


class LogitBlock:
    """Student's and teacher's logits of ``r`` positions over the same vocabulary of ``v`` tokens, and the labels.

    A ``sparse`` signal of the same positions may replace the teacher's logits. ``data_weights`` are the weights that
    the data give to each position.

    Log-probabilities that several losses share are computed once. The logits are float32 or float64 and are changed:
    −inf becomes a very low finite number.
    """

    def __init__(
        self,
        student_logits: Float[Tensor, "r v"],
        teacher_logits: Float[Tensor, "r v"] | None,
        labels: Int[Tensor, " r"],
        sparse: Sparse | None = None,
        data_weights: Float[Tensor, " r"] | None = None,
    ) -> None:
        self.labels, self.sparse, self.data_weights = labels, sparse, data_weights
        self.vocab_size = student_logits.shape[1]
        self._logits = {"student": student_logits.clamp_(min=LOWEST_LOGIT)}
        if teacher_logits is not None:
            self._logits["teacher"] = teacher_logits.clamp_(min=LOWEST_LOGIT)
        self._cache: dict[tuple[str, str, float], Tensor] = {}

    def logits(self, who: Literal["student", "teacher"]) -> Float[Tensor, "r v"]:
        """The logits themselves, not to be changed.

        Raises:
            MismatchError: the teacher's are needed, and there is no teacher or a sparse signal of it.
        """
        if who not in self._logits:
            raise MismatchError(
                "the teacher's logits are needed and not there",
                {"needed": "all logits", "given": "no signal" if self.sparse is None else "a few entries"},
                why="This loss or measure compares student and teacher over the whole vocabulary.",
                fix="Give a dense signal, or leave out the loss or measure.",
            )
        return self._logits[who]

    def student(self, temperature: float = 1.0) -> Float[Tensor, "r v"]:
        """log softmax(student logits / temperature), in nats."""
        return self._log("student", temperature)

    def teacher(self, temperature: float = 1.0) -> Float[Tensor, "r v"]:
        """log softmax(teacher logits / temperature), in nats."""
        return self._log("teacher", temperature)

    def student_probabilities(self, temperature: float = 1.0) -> Float[Tensor, "r v"]:
        return self._probabilities("student", temperature)

    def teacher_probabilities(self, temperature: float = 1.0) -> Float[Tensor, "r v"]:
        return self._probabilities("teacher", temperature)

    def _log(self, who: Literal["student", "teacher"], temperature: float) -> Tensor:
        key = ("log", who, temperature)
        if key not in self._cache:
            logits = self.logits(who)
            self._cache[key] = torch.log_softmax(logits if temperature == 1.0 else logits / temperature, dim=-1)
        return self._cache[key]

    def _probabilities(self, who: Literal["student", "teacher"], temperature: float) -> Tensor:
        key = ("plain", who, temperature)
        if key not in self._cache:
            self._cache[key] = self._log(who, temperature).exp()
        return self._cache[key]


@runtime_checkable
class Loss(Protocol):
    """A loss as a pure function of a block.

    Returns its value in nats for each position, and the value's gradient with respect to the student's *logits*, a
    tensor of its own that the caller may change. Both carry the factor temperature², which keeps the gradient's size
    the same at every temperature (Hinton et al. 2015, arXiv 1503.02531).
    """

    def __call__(
        self, block: LogitBlock, *args: Any, **arguments: Any
    ) -> tuple[Float[Tensor, " r"], Float[Tensor, "r v"]]: ...

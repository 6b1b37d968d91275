"""Block: a few rows of logits, from which every loss takes the log-probabilities it needs."""

from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stillroom.kernels.terms import LOWEST_LOGIT
from stillroom.signals import Sparse


class LogitBlock:
    """Student's and teacher's logits of ``r`` positions over the same ``v`` columns, and their next tokens.

    In the place of the teacher's logits there may be a ``sparse`` signal of the same positions. ``data_weights`` are
    what the data say that each position counts.

    What several losses share (log-probabilities at one temperature, say) is computed once. The logits are float32 or
    float64 and are changed: −inf becomes a very low finite number.
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
        self._known: dict[tuple[str, str, float], Tensor] = {}

    def logits(self, who: Literal["student", "teacher"]) -> Float[Tensor, "r v"]:
        """The logits themselves, not to be changed."""
        return self._logits[who]

    def student(self, temperature: float = 1.0) -> Float[Tensor, "r v"]:
        """log softmax(student logits / temperature), in nats."""
        return self._log("student", temperature)

    def teacher(self, temperature: float = 1.0) -> Float[Tensor, "r v"]:
        """log softmax(teacher logits / temperature), in nats."""
        return self._log("teacher", temperature)

    def student_probabilities(self, temperature: float = 1.0) -> Float[Tensor, "r v"]:
        return self._plain("student", temperature)

    def teacher_probabilities(self, temperature: float = 1.0) -> Float[Tensor, "r v"]:
        return self._plain("teacher", temperature)

    def _log(self, who: str, temperature: float) -> Tensor:
        key = ("log", who, temperature)
        if key not in self._known:
            logits = self._logits[who]
            self._known[key] = torch.log_softmax(logits if temperature == 1.0 else logits / temperature, dim=-1)
        return self._known[key]

    def _plain(self, who: str, temperature: float) -> Tensor:
        key = ("plain", who, temperature)
        if key not in self._known:
            self._known[key] = self._log(who, temperature).exp()
        return self._known[key]


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

"""LogitBlock: a few rows of logits and the teacher's signal of them, from which every loss takes what it needs.

A truncated sparse signal shows both distributions through k + 1 outcomes: each kept id, and the bucket of all the
others, whose mass the teacher's signal states exactly and the student's softmax gives.

A sampled one has weights ``w`` as entries with ``E[w] = t``, and only losses that are linear in the target are
unbiased: among the divergences, forward KL (arXiv 2503.16870).
"""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stillroom.errors import MismatchError
from stillroom.kernels import LOWEST_LOGIT
from stillroom.losses.config import LOSSES, Missing
from stillroom.signals import Sparse, untempered

Who = Literal["student", "teacher"]
NatsAndGradient = tuple[Float[Tensor, " r"], Float[Tensor, "r v"]]
Loss = Callable[..., NatsAndGradient]
"""A loss as a pure function of a block and keyword arguments.

It returns its value in nats for each position, and the value's gradient with respect to the student's *logits*, a
tensor of its own that the caller may change. Both carry the factor temperature², which keeps the gradient's size the
same at every temperature (Hinton et al. 2015, arXiv 1503.02531).
"""


class Outcomes(NamedTuple):
    """Teacher ``t`` and student ``s`` over the same outcomes. An outcome that is impossible for both has t = s = 0."""

    log_t: Float[Tensor, "r m"]
    log_s: Float[Tensor, "r m"]
    t: Float[Tensor, "r m"]
    s: Float[Tensor, "r m"]
    others: Float[Tensor, "r v"] | None = None
    """From a sparse signal, whose last outcome is all other ids together: the student's probabilities of these, 0 on
    the kept ones. The caller may change this tensor."""


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
        self.vocab_size, self.dtype = student_logits.shape[1], student_logits.dtype
        self._logits = {"student": student_logits.clamp_(min=LOWEST_LOGIT)}
        if teacher_logits is not None:
            self._logits["teacher"] = teacher_logits.clamp_(min=LOWEST_LOGIT)
        self._cache: dict[tuple[str, Who, float], Tensor] = {}

    def logits(self, who: Who) -> Float[Tensor, "r v"]:
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

    def log_probs(self, who: Who, temperature: float = 1.0) -> Float[Tensor, "r v"]:
        """log softmax(logits / temperature), in nats."""
        key = ("log_probs", who, temperature)
        if key not in self._cache:
            logits = self.logits(who)
            self._cache[key] = torch.log_softmax(logits if temperature == 1.0 else logits / temperature, dim=-1)
        return self._cache[key]

    def probs(self, who: Who, temperature: float = 1.0) -> Float[Tensor, "r v"]:
        """softmax(logits / temperature)."""
        key = ("probs", who, temperature)
        if key not in self._cache:
            self._cache[key] = self.log_probs(who, temperature).exp()
        return self._cache[key]

    def outcomes(self, temperature: float = 1.0) -> Outcomes:
        """All tokens; or the entries of a truncated signal and, as one further outcome, all others together.

        The log of a bucket below the least number that the type holds, or of 0, is the log of that number: so the
        student's mass beside the entries costs at most 88 nats in float32, and not infinitely much. All four are 0
        where a position has fewer than k entries.

        Raises:
            MismatchError: the signal is sampled, or does not know what it left out at this temperature.
        """
        signal, probs = self.sparse, self.probs("student", temperature)
        if signal is None:
            log_t, log_s = self.log_probs("teacher", temperature), self.log_probs("student", temperature)
            return Outcomes(log_t, log_s, self.probs("teacher", temperature), probs)
        if signal.sampled:
            check_sparse("this divergence", temperature, sampled=True, temperatures=())
        targets, log_residual = (x.to(self.dtype) for x in signal.log_targets(temperature))
        finite = targets > -torch.inf
        log_t = targets.masked_fill(~finite, 0)
        log_s = self.log_probs("student", temperature).gather(-1, signal.ids).masked_fill(~finite, 0)
        others = probs.scatter(-1, signal.ids, 0)
        residual = others.sum(-1)  # the sum of all others, which is exact however small it is
        lowest = math.log(torch.finfo(self.dtype).tiny)
        columns = (
            (log_t, log_residual.clamp(min=lowest)),
            (log_s, residual.log().clamp(min=lowest)),
            (log_t.exp() * finite, log_residual.exp()),
            (log_s.exp() * finite, residual),
        )
        log_t, log_s, t, s = (torch.cat([entries, last.unsqueeze(-1)], -1) for entries, last in columns)
        return Outcomes(log_t, log_s, t, s, others)

    def targets(
        self, temperature: float, missing: Missing
    ) -> tuple[Int[Tensor, "r k"], Float[Tensor, "r k"], Float[Tensor, " r"]]:
        """Targets ``y`` on a few distinct ids that stand for the whole of a sparse signal, and ``−Σ y log y``.

        A sample's are its weights, with the teacher's entropy, which is the expectation of ``−Σ y log y``. The mass
        that a truncated signal left out goes by one rule:

        - ``renormalise``: the entries are scaled up to a sum of 1, as if nothing had been left out;
        - ``zero``: the entries as they are, with a sum below 1: the gradient of ``renormalise`` times the mass kept;
        - ``label``: the mass is put on the data's own next token.

        Raises:
            MismatchError: the signal has none at this temperature, or of this kind; or a sample has no entropy.
        """
        assert self.sparse is not None
        signal, known = self.sparse, tuple(self.sparse.log_rests)
        check_sparse("forward_kl", temperature, sampled=signal.sampled, temperatures=known, missing=missing)
        if signal.sampled and signal.entropy is None:
            raise MismatchError(
                "a sampled signal comes without the teacher's entropy",
                {"entropy": "none", "needed by": "forward_kl"},
                why="The divergence is the cross-entropy less the teacher's entropy, which a sample does not contain.",
                fix="Give `Sparse.entropy`.",
            )
        ids, (log_y, log_residual) = signal.ids, signal.log_targets(temperature)
        y = log_y.to(self.dtype).exp()
        if signal.sampled and signal.entropy is not None:
            return ids, y, signal.entropy.to(self.dtype)
        if missing == "renormalise":
            y = y / y.sum(-1, keepdim=True)
        elif missing == "label":
            label, residual = self.labels.unsqueeze(-1), log_residual.to(self.dtype).exp().unsqueeze(-1)
            same = (ids == label) & (log_y > -torch.inf)
            y = torch.where(same, y + residual, y)
            ids, y = torch.cat([ids, label], -1), torch.cat([y, residual * ~same.any(-1, keepdim=True)], -1)
        return ids, y, torch.special.entr(y).sum(-1)


def check_sparse(
    loss: str,
    temperature: float = 1.0,
    *,
    sampled: bool,
    temperatures: tuple[float, ...],
    missing: str = "bucket",
    name: str = "the stored signal",
) -> None:
    """Checks that a loss can be taken from a sparse signal without bias.

    Args:
        loss: its name in LOSSES; any other name is that of a loss which needs exact entries.
        temperatures: the temperatures at which the mass left out is known.

    Raises:
        MismatchError: it cannot, with the reason.
    """
    needed = LOSSES[loss].signal if loss in LOSSES else "truncated"
    if needed == "none":
        return
    if needed == "dense":
        raise MismatchError(
            f"{loss} cannot be learned from a few entries",
            {"objective": loss, name: "sampled" if sampled else "truncated"},
            why="It compares every logit, and the mean of all that were left out is not known.",
            fix="Use a divergence, a live teacher, or a store of signal.kind=full.",
        )
    if sampled and needed != "sampled":
        raise MismatchError(
            f"{loss} cannot be learned from sampled targets",
            {"objective": loss, name: "sampled"},
            why="A sample is right on average only where the loss is linear in the target, and this one is not: its "
            "gradient would be biased, at every number of draws.",
            fix="Use forward_kl, or capture with signal.kind=top_k, from which the other divergences can be learned.",
        )
    if sampled and missing != "bucket":
        raise MismatchError(
            f"missing={missing} has no meaning for sampled targets",
            {"missing": missing, name: "sampled"},
            why="A sample leaves nothing out on average, so there is no residual mass to assign.",
            fix="Leave out `missing`.",
        )
    if temperature != 1.0 and (sampled or temperature not in temperatures):
        raise untempered(temperature, "1.0, sampled" if sampled else ", ".join(map(str, temperatures)))

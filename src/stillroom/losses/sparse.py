"""Losses from a sparse signal: a few entries of the teacher's distribution, truncated with a bucket, or sampled.

If it is truncated, both distributions are seen through k + 1 outcomes: each kept id, and the bucket of all the others,
whose mass the teacher's signal states exactly and the student's softmax gives.

If it is sampled, the entries are weights ``w`` with ``E[w] = t``, and only losses that are linear in the target are
unbiased: among the divergences, forward KL (arXiv 2503.16870).
"""

import math
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stillroom.errors import MismatchError
from stillroom.losses.block import LogitBlock
from stillroom.losses.config import LOSSES
from stillroom.signals import Sparse, untempered

Missing = Literal["bucket", "renormalise", "zero", "label"]
"""The target that is assumed for everything that a truncated signal left out."""


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


class Seen(NamedTuple):
    """Student and teacher over the k + 1 outcomes of a truncated signal; the last is all others together."""

    ids: Int[Tensor, "r k"]
    log_t: Float[Tensor, "r k+1"]
    log_s: Float[Tensor, "r k+1"]
    t: Float[Tensor, "r k+1"]
    s: Float[Tensor, "r k+1"]
    """All four are 0 where a position has fewer than k entries."""
    others: Float[Tensor, "r v"]
    """The student's probabilities of the other ids, 0 on the kept ones. The caller may change this tensor."""


def see(block: LogitBlock, signal: Sparse, temperature: float) -> Seen:
    """The outcomes at a temperature.

    The log of a bucket below the least number that the type holds, or of 0, is the log of that number: so the
    student's mass beside the entries costs at most 88 nats in float32, and not infinitely much.

    Raises:
        MismatchError: the signal is sampled, or does not know what it left out at this temperature.
    """
    if signal.sampled:
        check_sparse("this divergence", temperature, sampled=True, temperatures=())
    log_student = block.student(temperature)
    targets, log_residual = (x.to(log_student.dtype) for x in signal.log_targets(temperature))
    finite = targets > -torch.inf
    log_t, log_s = targets.masked_fill(~finite, 0), log_student.gather(-1, signal.ids).masked_fill(~finite, 0)
    mask = finite.to(log_student.dtype)
    others = block.student_probabilities(temperature).scatter(-1, signal.ids, 0)
    residual = others.sum(-1)  # the sum of all others, which is exact however small it is
    lowest = math.log(torch.finfo(residual.dtype).tiny)
    outcomes = (
        (log_t, log_residual.clamp(min=lowest)),
        (log_s, residual.log().clamp(min=lowest)),
        (log_t.exp() * mask, log_residual.exp()),
        (log_s.exp() * mask, residual),
    )
    columns = (torch.cat([entries, last.unsqueeze(-1)], -1) for entries, last in outcomes)
    return Seen(signal.ids, *columns, others)  # pyright: ignore[reportCallIssue]


def forward_kl(
    block: LogitBlock, signal: Sparse, temperature: float, missing: Missing
) -> tuple[Float[Tensor, " r"], Float[Tensor, "r v"]]:
    """``T² Σ y (log t − log s)`` over targets ``y`` on a few ids, without a bucket; gradient ``T (s Σ y − y)``.

    For a sampled signal, y are the weights, and a single position's value may be negative; so it may with
    ``missing="zero"``.
    """
    ids, y, entropy = targets(block, signal, temperature, missing)
    nats = -(y * block.student(temperature).gather(-1, ids)).sum(-1) - entropy
    gradient = block.student_probabilities(temperature) * y.sum(-1, keepdim=True)
    gradient.scatter_add_(-1, ids, -y)
    return (nats, gradient) if temperature == 1.0 else (nats * temperature**2, gradient.mul_(temperature))


def targets(
    block: LogitBlock, signal: Sparse, temperature: float, missing: Missing
) -> tuple[Int[Tensor, "r k"], Float[Tensor, "r k"], Float[Tensor, " r"]]:
    """The targets ``y`` on their ids, and ``−Σ y log y``; for a sample, the teacher's entropy, its expectation.

    Raises:
        MismatchError: the signal has none at this temperature, or of this kind; or a sample has no entropy.
    """
    check_sparse(
        "forward_kl", temperature, sampled=signal.sampled, temperatures=tuple(signal.log_rests), missing=missing
    )
    dtype = block.logits("student").dtype
    if signal.sampled:
        if signal.entropy is None:
            raise MismatchError(
                "a sampled signal comes without the teacher's entropy",
                {"entropy": "none", "needed by": "forward_kl"},
                why="The divergence is the cross-entropy less the teacher's entropy, which a sample does not contain.",
                fix="Give `Sparse.entropy`.",
            )
        return signal.ids, signal.log_probs.to(dtype).exp(), signal.entropy.to(dtype)
    ids, y = completed(block, signal, temperature, missing)
    return ids, y, torch.special.entr(y).sum(-1)


def completed(
    block: LogitBlock, signal: Sparse, temperature: float, missing: Missing
) -> tuple[Int[Tensor, "r k"], Float[Tensor, "r k"]]:
    """Targets on distinct ids that stand for the whole of a truncated signal, by one rule for its missing mass:

    - ``renormalise``: the entries are scaled up to a sum of 1, as if nothing had been left out;
    - ``zero``: the entries as they are, with a sum below 1: the gradient of ``renormalise`` times the mass kept;
    - ``label``: the mass is put on the data's own next token.
    """
    log_targets, log_residual = signal.log_targets(temperature)
    targets = log_targets.to(block.logits("student").dtype).exp()
    if missing == "renormalise":
        return signal.ids, targets / targets.sum(-1, keepdim=True)
    if missing == "zero":
        return signal.ids, targets
    label, residual = block.labels.unsqueeze(-1), log_residual.to(targets.dtype).exp().unsqueeze(-1)
    same = (signal.ids == label) & (log_targets > -torch.inf)
    targets = torch.where(same, targets + residual, targets)
    return torch.cat([signal.ids, label], -1), torch.cat([targets, residual * ~same.any(-1, keepdim=True)], -1)

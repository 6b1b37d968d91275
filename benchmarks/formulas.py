"""Every loss as a plain formula on full logits, for autograd to differentiate: the reference of the fused ones."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, relu, softplus


def forward_kl(log_t: Tensor, log_s: Tensor) -> Tensor:
    return (log_t.exp() * (log_t - log_s)).sum(-1)


def reverse_kl(log_t: Tensor, log_s: Tensor) -> Tensor:
    return forward_kl(log_s, log_t)


def mixture(log_t: Tensor, log_s: Tensor, of_teacher: float) -> Tensor:
    return torch.logaddexp(log_t + math.log(of_teacher), log_s + math.log(1 - of_teacher))


def jensen_shannon(log_t: Tensor, log_s: Tensor, beta: float) -> Tensor:
    log_m = mixture(log_t, log_s, beta)
    return beta * forward_kl(log_t, log_m) + (1 - beta) * forward_kl(log_s, log_m)


def skew_kl(log_t: Tensor, log_s: Tensor, alpha: float) -> Tensor:
    return forward_kl(log_t, mixture(log_t, log_s, alpha))


def skew_reverse_kl(log_t: Tensor, log_s: Tensor, alpha: float) -> Tensor:
    return forward_kl(log_s, mixture(log_t, log_s, 1 - alpha))


def adaptive_kl(log_t: Tensor, log_s: Tensor, mu: float) -> Tensor:
    t, order = log_t.exp().sort(-1, descending=True)
    gap = (t - log_s.detach().exp().gather(-1, order)).abs()
    head = t.cumsum(-1) - t < mu
    share = (gap * head).sum(-1) / gap.sum(-1)
    return share * forward_kl(log_t, log_s) + (1 - share) * reverse_kl(log_t, log_s)


def alpha_beta(log_t: Tensor, log_s: Tensor, alpha: float, beta: float) -> Tensor:
    total = alpha + beta
    mixed = (alpha * log_t + beta * log_s).exp()
    ends = (alpha * (total * log_t).exp() + beta * (total * log_s).exp()) / total
    return (ends - mixed).sum(-1) / (alpha * beta)


def total_variation(log_t: Tensor, log_s: Tensor) -> Tensor:
    return (log_t.exp() - log_s.exp()).abs().sum(-1) / 2


def logit_mse(teacher: Tensor, student: Tensor) -> Tensor:
    gap = student - teacher
    return (gap - gap.mean(-1, keepdim=True)).square().mean(-1)


def ranking(teacher: Tensor, student: Tensor, k: int, cost: Callable[[Tensor], Tensor]) -> Tensor:
    scores = student.gather(-1, teacher.topk(k).indices)
    first, second = torch.triu_indices(k, k, 1)
    return cost(scores[:, first] - scores[:, second]).mean(-1)


def hinge_ranking(teacher: Tensor, student: Tensor, k: int) -> Tensor:
    return ranking(teacher, student, k, lambda ahead: relu(1 - ahead))


def logistic_ranking(teacher: Tensor, student: Tensor, k: int) -> Tensor:
    return ranking(teacher, student, k, lambda ahead: softplus(-ahead))


OF_LOG_PROBABILITIES = (
    forward_kl, reverse_kl, jensen_shannon, skew_kl, skew_reverse_kl, adaptive_kl, alpha_beta, total_variation,
)  # fmt: skip
OF_LOGITS = (logit_mse, hinge_ranking, logistic_ranking)
FORMULAS = {formula.__name__: formula for formula in (*OF_LOG_PROBABILITIES, *OF_LOGITS)}


def values(name: str, teacher: Tensor, student: Tensor, labels: Tensor, **arguments: Any) -> Tensor:
    """The loss of each position, from logits ``[n, v]``."""
    if name == "cross_entropy":
        return cross_entropy(student, labels, reduction="none")
    formula = FORMULAS[name]
    if formula in OF_LOG_PROBABILITIES:
        teacher, student = teacher.log_softmax(-1), student.log_softmax(-1)
    return formula(teacher, student, **arguments)

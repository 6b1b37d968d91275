"""What benchmarks/losses.py measures, all on one problem: our losses, bare products, full logits, liger-kernel, TRL.

A job is a function of a problem that returns another one: this gives the loss, the mean over positions, whose backward
fills in the gradients of the student's hidden states and head.
"""

import importlib.util
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import kl_div, linear

from stillroom.config import LOGITS_BYTES
from stillroom.lm_head import LMHead
from stillroom.losses.config import LOSSES
from stillroom.losses.fused_linear import Buffers, linear_losses
from stillroom.losses.objective import Objective
from stillroom.signals import Dense, Signal, Sparse

ARGUMENTS: dict[str, dict[str, float]] = {
    "jensen_shannon": {"beta": 0.5},
    "skew_kl": {"alpha": 0.1},
    "skew_reverse_kl": {"alpha": 0.1},
    "adaptive_kl": {"mu": 0.5},
    "alpha_beta": {"alpha": 0.5, "beta": 0.5},
    "hinge_ranking": {"k": 16},
    "logistic_ranking": {"k": 16},
}
"""With which each loss is measured; the others have none."""
NEEDS_NO_TEACHER = "cross_entropy"
TOP_50, SAMPLES_24 = "forward_kl from top 50", "forward_kl from 24 samples"
PEER_TASKS = {"forward_kl": 0.0, "jensen_shannon": 0.5}
"""What peers do too, and the beta by which both liger-kernel and TRL name it."""


@dataclass(frozen=True)
class Problem:
    student: Tensor
    """Hidden states ``[n, d]``; like the head's weight ``[v, d]`` with a gradient to come."""
    head: Tensor
    teacher: Tensor
    teacher_head: Tensor
    labels: Tensor

    def first(self, positions: int) -> "Problem":
        student = self.student.detach()[:positions].requires_grad_()
        return Problem(student, self.head, self.teacher[:positions], self.teacher_head, self.labels[:positions])

    @property
    def trained(self) -> tuple[Tensor, Tensor]:
        return self.student, self.head

    @property
    def gradient_bytes(self) -> int:
        return sum(x.nbytes for x in self.trained)

    def dense(self) -> Dense:
        return Dense(self.teacher, LMHead(self.teacher_head))

    def losses(self, objectives: list[Objective], signal: Signal | None, buffers: Buffers | None = None):
        weights = torch.full((len(self.student),), 1 / len(self.student), device=self.student.device)
        return linear_losses(self.student, LMHead(self.head), objectives, self.labels, weights, signal, buffers=buffers)


Job = Callable[[Problem], Callable[[], Tensor]]


def problem(
    positions: int, vocabulary: int, *, hidden: int = 256, teacher_hidden: int = 512, apart: float | None = None,
    dtype: torch.dtype = torch.float32, device: str = "cpu",
) -> Problem:  # fmt: skip
    """Random hidden states and heads, whose logits have a standard deviation of 2.

    Args:
        apart: the teacher's logits are the student's plus noise of this standard deviation; None: of their own.
    """
    generator = torch.Generator(device).manual_seed(0)

    def normal(rows: int, columns: int, scale: float = 1.0) -> Tensor:
        return torch.randn(rows, columns, generator=generator, device=device).mul_(scale).to(dtype)

    student, head = normal(positions, hidden), normal(vocabulary, hidden, 2 / math.sqrt(hidden))
    if apart is None:
        teacher, of_teacher = (
            normal(positions, teacher_hidden),
            normal(vocabulary, teacher_hidden, 2 / math.sqrt(teacher_hidden)),
        )
    else:
        more = teacher_hidden - hidden
        teacher = torch.cat([student, normal(positions, more)], 1)
        of_teacher = torch.cat([head, normal(vocabulary, more, apart / math.sqrt(more))], 1)
    tokens = torch.randint(vocabulary, (positions,), generator=generator, device=device)
    return Problem(student.requires_grad_(), head.requires_grad_(), teacher, of_teacher, tokens)


def objective(name: str) -> Objective:
    return Objective(name, LOSSES[name].load(), 1.0, ARGUMENTS.get(name, {}))


def ours(name: str, signal: Callable[[Problem], Signal | None] = Problem.dense) -> Job:
    def job(p: Problem) -> Callable[[], Tensor]:
        said, buffers = signal(p), Buffers()
        return lambda: p.losses([objective(name)], said, buffers).total

    return job


def chunk_rows(vocabulary: int) -> int:
    """How many positions our own chunks have, where there is a dense teacher."""
    return max(1, LOGITS_BYTES // (vocabulary * 4 * 2))


@torch.no_grad()
def four(p: Problem) -> Callable[[], Tensor]:
    """Student's logits, teacher's logits, both gradients: into tensors that are there already, and nothing else."""
    n, vocabulary = len(p.student), len(p.head)
    rows = min(n, chunk_rows(vocabulary))
    student, head = (x.detach() for x in p.trained)
    logits, teacher_logits = (student.new_zeros(rows, vocabulary) for _ in range(2))
    student_gradient, head_gradient = torch.zeros_like(student), torch.zeros_like(head)

    def products() -> Tensor:
        for start in range(0, n, rows):
            here = slice(start, min(start + rows, n))
            some = slice(here.stop - start)
            torch.mm(student[here], head.T, out=logits[some])
            torch.mm(p.teacher[here], p.teacher_head.T, out=teacher_logits[some])
            torch.mm(logits[some], head, out=student_gradient[here])
            head_gradient.addmm_(logits[some].T, student[here], beta=float(start > 0))
        return student_gradient[0, 0]

    return products


@torch.no_grad()
def top_50(p: Problem, k: int = 50) -> Sparse:
    """The teacher's 50 likeliest, and the mass of all others."""
    ids, values, rests = [], [], []
    for start in range(0, len(p.teacher), 256):
        log_t = linear(p.teacher[start : start + 256], p.teacher_head).float().log_softmax(-1)
        kept = log_t.topk(k)
        rests.append(log_t.scatter(-1, kept.indices, -torch.inf).logsumexp(-1))
        ids.append(kept.indices)
        values.append(kept.values)
    return Sparse(torch.cat(ids), torch.cat(values), {1.0: torch.cat(rests)}, vocab_size=len(p.teacher_head))


@torch.no_grad()
def samples_24(p: Problem, head: int = 16, draws: int = 8) -> Sparse:
    """The 16 likeliest, and 8 more that share the others' mass: no true sample, but of the same shape and cost."""
    kept = top_50(p, head + draws)
    log_share = (kept.log_probs[:, head:].exp().sum(-1) + kept.log_rests[1.0].exp()).log() - math.log(draws)
    weights = torch.cat([kept.log_probs[:, :head], log_share.unsqueeze(-1).expand(-1, draws)], -1)
    entropy = -(weights.exp() * kept.log_probs).sum(-1)
    return Sparse(kept.ids, weights, entropy=entropy, sampled=True, vocab_size=kept.vocab_size)


def own_jobs() -> dict[str, Job]:
    kinds = ["forward_kl", *(name for name in LOSSES if name not in ("forward_kl", NEEDS_NO_TEACHER))]
    return {
        **{name: ours(name) for name in kinds},
        NEEDS_NO_TEACHER: ours(NEEDS_NO_TEACHER, lambda _: None),
        TOP_50: ours("forward_kl", top_50),
        SAMPLES_24: ours("forward_kl", samples_24),
    }


def naive(beta: float) -> Job:
    """What a training script does: both full logits in float32, `torch.nn.functional`, autograd."""

    def divergence(log_s: Tensor, log_t: Tensor) -> Tensor:
        if beta == 0:
            return kl_div(log_s, log_t, log_target=True, reduction="batchmean")
        mixed = torch.logsumexp(torch.stack([log_s + math.log(1 - beta), log_t + math.log(beta)]), 0)
        of_teacher = kl_div(mixed, log_t, log_target=True, reduction="batchmean")
        return beta * of_teacher + (1 - beta) * kl_div(mixed, log_s, log_target=True, reduction="batchmean")

    def job(p: Problem) -> Callable[[], Tensor]:
        def loss() -> Tensor:
            with torch.no_grad():
                log_t = linear(p.teacher, p.teacher_head).float().log_softmax(-1)
            return divergence(linear(p.student, p.head).float().log_softmax(-1), log_t)

        return loss

    return job


def liger(kind: str, beta: float, *, compiled: bool) -> Job:
    """`kind` is the class's name; 1,024 positions a chunk, as it has by default."""

    def job(p: Problem) -> Callable[[], Tensor]:
        from liger_kernel import chunked_loss

        loss = getattr(chunked_loss, kind)(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, compiled=compiled)
        return lambda: loss(p.student, p.head, p.teacher, p.teacher_head, p.labels)

    return job


def trl(beta: float) -> Job:
    """The function under `DistillationTrainer`'s loss: tiles of 4,096 positions by 32,768 columns."""

    def job(p: Problem) -> Callable[[], Tensor]:
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

        return lambda: ChunkedDivergenceFunction.apply(
            p.student, p.head, None, p.teacher, p.teacher_head, None, beta, 1.0
        )[0].mean()

    return job


def peer_jobs() -> tuple[dict[str, Job], list[str]]:
    """The peers that are there, and a sentence for each that is not."""
    jobs = {f"naive {task}": naive(beta) for task, beta in PEER_TASKS.items()}
    missing = []
    if importlib.util.find_spec("liger_kernel"):
        jobs |= {f"liger {task}": liger("LigerFusedLinearJSDLoss", b, compiled=False) for task, b in PEER_TASKS.items()}
        jobs["liger cosine"] = liger("LigerFusedLinearCosineSimilarityLoss", 1.0, compiled=False)
        if torch.cuda.is_available() or shutil.which("g++") or shutil.which("clang++"):
            jobs |= {
                f"liger {task} compiled": liger("LigerFusedLinearJSDLoss", beta, compiled=True)
                for task, beta in PEER_TASKS.items()
            }
            jobs["liger cosine compiled"] = liger("LigerFusedLinearCosineSimilarityLoss", 1.0, compiled=True)
        else:
            missing.append("liger-kernel compiled was not measured: torch.compile needs a C++ compiler")
    else:
        missing.append("liger-kernel was not measured: it is not installed (pip install -e '.[bench]')")
    if importlib.util.find_spec("trl"):
        jobs |= {f"trl {task}": trl(beta) for task, beta in PEER_TASKS.items()}
    else:
        missing.append("trl was not measured: it is not installed (pip install -e '.[bench]')")
    return jobs, missing


def all_jobs(*, peers: bool) -> tuple[dict[str, Job], list[str]]:
    there, missing = peer_jobs() if peers else ({}, [])
    return {"four": four, **own_jobs(), **there}, missing

"""Held-out measurement: what the student makes of text that it never trains on, and how near it is to the teacher."""

from collections.abc import Callable, Iterable

import torch

from stillroom.batch import Batch
from stillroom.distributed.group import SINGLE_RANK, RankGroup
from stillroom.distributed.sharding import let_go
from stillroom.losses.divergences import forward_kl
from stillroom.losses.logits import cross_entropy
from stillroom.losses.metrics import accepted_mass, student_entropy, teacher_cross_entropy, top1_agreement
from stillroom.losses.objective import Measure, Objective
from stillroom.store.config import SAMPLED, Full
from stillroom.teachers.base import Teacher
from stillroom.teachers.server import ServerTeacher
from stillroom.teachers.stored import StoredTeacher
from stillroom.training.step import StudentStep

MEASURES: dict[Measure, str] = {
    student_entropy: "student_entropy_nats",
    top1_agreement: "top1_agreement",
    accepted_mass: "accepted_mass",
    teacher_cross_entropy: "teacher_cross_entropy_nats",
}
"""The measures by their names in what is reported."""


@torch.no_grad()
def measure_held_out(
    module: StudentStep,
    teacher: Teacher | None,
    steps: Iterable[list[Batch]],
    device: torch.device | str,
    stop: Callable[[], bool] = lambda: False,
    ranks: RankGroup = SINGLE_RANK,
) -> dict[str, float] | None:
    """Means over the kept positions, all at temperature 1 but for the objectives' own.

    ``loss_nats`` is the weighted sum of the run's objectives, as they are at its end; ``cross_entropy_nats`` is with
    the data; ``student_entropy_nats`` is the student's own; and with a teacher there are ``forward_kl_nats`` (teacher ‖
    student), ``top1_agreement``, ``accepted_mass`` (of speculative decoding) and the teacher's own cross-entropy; of an
    objective of inner states its distance. From
    a store, only what it kept can be told: agreement and accepted mass where its first entry is the likeliest token,
    the teacher's own cross-entropy where it kept the labels' log-probabilities, and of a truncated signal the
    divergence with its bucket. None where ``stop`` came to say so before the end.

    Args:
        steps: this process's part of them.
        processes: those that measure together, whose sums are told to all.
    """
    watched = [Objective("cross_entropy_nats", cross_entropy, 0.0)]
    measures: list[Measure] = [student_entropy]
    if teacher is not None:
        watched.append(Objective("forward_kl_nats", forward_kl, 0.0))
        measures += _known(teacher)
    objectives = (*module.objectives, *watched)
    of_objectives = [objective.name for objective in objectives]
    names = [*of_objectives, *(f"{name}_distance" for name in module.hidden), *(MEASURES[m] for m in measures)]
    total = torch.zeros(2 + len(names), dtype=torch.float64)  # of the loss, of kept positions, and of each value
    was_training = module.training
    module.eval()
    for micro_batch in (micro_batch for step in steps for micro_batch in step):
        if ranks.any_rank(stop()):
            let_go(module)
            return None
        batch = micro_batch.to(device)
        teacher_output = None if teacher is None else teacher.forward(batch)
        result = module(batch, teacher_output, 1, objectives, measures=measures)
        total += torch.cat(
            [torch.stack([result.loss.cpu().double(), _number(micro_batch.num_kept)]), result.sums.cpu()]
        )
    module.train(was_training)
    let_go(module)
    loss, num_kept, *sums = ranks.all_reduce_(total).tolist()
    found = dict(zip(names, (value / num_kept for value in sums), strict=True))
    for objective in module.objectives:
        del found[objective.name]  # which ``loss_nats`` has in it
    return {"loss_nats": loss / num_kept, **found, "num_tokens": round(num_kept)}


def _number(value: int) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


def _known(teacher: Teacher) -> list[Measure]:
    """The measures that the teacher's signals tell."""
    if isinstance(teacher, ServerTeacher):
        of_labels: list[Measure] = [teacher_cross_entropy] if teacher.config.dialect == "vllm" else []
        return [top1_agreement, accepted_mass, *of_labels]
    signal = teacher.store.signal_config if isinstance(teacher, StoredTeacher) else None
    if signal is None or isinstance(signal, Full):
        return [top1_agreement, accepted_mass, teacher_cross_entropy]
    agreement: list[Measure] = [] if signal.kind in SAMPLED else [top1_agreement, accepted_mass]
    return agreement + [teacher_cross_entropy] * signal.label

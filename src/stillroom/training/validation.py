"""Held-out measurement: the student on text that it never trains on, and how near it is to the teacher there."""

from collections.abc import Callable, Iterable

import torch

from stillroom.batch import Batch
from stillroom.distributed.group import SINGLE_RANK, RankGroup
from stillroom.distributed.sharding import reshard
from stillroom.losses.divergences import forward_kl
from stillroom.losses.logits import accepted_mass, cross_entropy, student_entropy, teacher_cross_entropy, top1_agreement
from stillroom.losses.objective import Measure, Objective
from stillroom.store.config import SAMPLED, Full
from stillroom.teachers.base import ServerTeacher, StoredTeacher, Teacher
from stillroom.training.step import StudentStep

MEASURES: dict[Measure, str] = {
    student_entropy: "student_entropy_nats",
    top1_agreement: "top1_agreement",
    accepted_mass: "accepted_mass",
    teacher_cross_entropy: "teacher_cross_entropy_nats",
}
"""The measures with their names in the results."""


@torch.no_grad()
def measure_held_out(
    module: StudentStep,
    teacher: Teacher | None,
    steps: Iterable[list[Batch]],
    device: torch.device | str,
    stop: Callable[[], bool] = lambda: False,
    ranks: RankGroup = SINGLE_RANK,
) -> dict[str, float] | None:
    """Returns means over the kept positions, all at temperature 1 but for the objectives' own.

    ``loss_nats`` is the weighted sum of the run's objectives, as they are at its end; ``cross_entropy_nats`` is with
    the data; ``student_entropy_nats`` is the student's own; and with a teacher there are ``forward_kl_nats`` (teacher ‖
    student), ``top1_agreement``, ``accepted_mass`` (of speculative decoding) and the teacher's own cross-entropy; an
    objective of hidden states gives its distance. A store gives only what it kept: agreement and accepted mass where
    its first entry is the top-1 token, the teacher's own cross-entropy where it kept the labels' log-probabilities, and
    of a truncated signal the divergence with its residual mass. Returns None where ``stop`` returned true before the
    end.

    Args:
        steps: this process's part of them.
        ranks: the processes that measure together, which all get the means.
    """
    watched = [Objective("cross_entropy_nats", cross_entropy, 0.0)]
    measures: list[Measure] = [student_entropy]
    if teacher is not None:
        watched.append(Objective("forward_kl_nats", forward_kl, 0.0))
        measures += _measures_of(teacher)
    objectives = (*module.objectives, *watched)
    num_objectives = len(module.objectives)
    names = [*(o.name for o in objectives), *module.columns[num_objectives:], *(MEASURES[m] for m in measures)]
    total = torch.zeros(2 + len(names), dtype=torch.float64)  # loss, kept positions, then each value
    was_training = module.training
    module.eval()
    for micro_batch in (micro_batch for step in steps for micro_batch in step):
        if ranks.any_rank(stop()):
            reshard(module)
            return None
        batch = micro_batch.to(device)
        teacher_output = None if teacher is None else teacher.forward(batch)
        result = module(batch, teacher_output, 1, objectives, measures=measures)
        num_kept = torch.tensor([micro_batch.num_kept], dtype=torch.float64)
        total += torch.cat([result.loss.cpu().double().view(1), num_kept, result.sums.cpu()])
    module.train(was_training)
    reshard(module)
    loss, num_kept, *sums = ranks.all_reduce_(total).tolist()
    means = dict(zip(names[num_objectives:], (value / num_kept for value in sums[num_objectives:]), strict=True))
    return {"loss_nats": loss / num_kept, **means, "num_tokens": round(num_kept)}


def _measures_of(teacher: Teacher) -> list[Measure]:
    """Returns the measures that can be computed from what the teacher gives."""
    if isinstance(teacher, ServerTeacher):
        of_labels: list[Measure] = [teacher_cross_entropy] if teacher.config.dialect == "vllm" else []
        return [top1_agreement, accepted_mass, *of_labels]
    signal = teacher.store.signal_config if isinstance(teacher, StoredTeacher) else None
    if signal is None or isinstance(signal, Full):
        return [top1_agreement, accepted_mass, teacher_cross_entropy]
    agreement: list[Measure] = [] if signal.kind in SAMPLED else [top1_agreement, accepted_mass]
    return agreement + [teacher_cross_entropy] * signal.label

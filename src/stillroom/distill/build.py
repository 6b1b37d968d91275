"""From a plan to what a step needs: the teacher, the student, the stream of batches, the student step and its
optimizer."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from stillroom import models
from stillroom.data.config import AnyData
from stillroom.data.stream import BatchStream, DocumentSet
from stillroom.distill.ahead import Micro, ReadAhead
from stillroom.distill.checkpoint import TrainState
from stillroom.distill.config import StoredData, StoreTeacher
from stillroom.distill.cut import cut_student
from stillroom.distill.first_step import fit_to_first_step
from stillroom.distill.hidden import HiddenSpec, HiddenTerm, layers_of
from stillroom.distill.hidden_plan import Origin
from stillroom.distill.objective_config import Hidden
from stillroom.distill.objectives import build_objectives, hidden_weights, needs_teacher
from stillroom.distill.optimizer import build_optimizer, build_schedule
from stillroom.distill.plan import Plan
from stillroom.distill.step import StudentStep
from stillroom.distill.student import Student, build_student
from stillroom.distill.teacher import LiveTeacher, StoredTeacher

AnyTeacher = LiveTeacher | StoredTeacher


def build_teacher(plan: Plan) -> AnyTeacher | None:
    """The teacher, where the recipe has one."""
    teacher = plan.config.teacher
    if teacher is None:
        return None
    if isinstance(teacher, StoreTeacher):
        assert plan.store is not None
        return StoredTeacher(plan.store)
    model: PreTrainedModel = models.load_model(
        teacher.model,
        dtype=getattr(torch, teacher.dtype),
        device=plan.config.device,
        attention=None if teacher.attention == "auto" else teacher.attention,
        revision=teacher.revision,
        trust_remote_code=teacher.trust_remote_code,
    )
    models.verify(model, "the teacher", pack=plan.config.data.pack)
    return LiveTeacher(model)


def build_pair(
    plan: Plan, teacher: AnyTeacher | None, data: DocumentSet, folder: Path, say: Callable[[str], object]
) -> tuple[Student, tuple[HiddenSpec, ...]]:
    """The student, and what the objectives of inner states compare of it and of the teacher, which will tell it.

    Args:
        data: what is trained on; a student that is cut out of its teacher is chosen by it.
        folder: that remembers how such a student was cut.
        say: is told what was found.
    """
    part, cut = None, None
    if plan.cut is not None:
        live = teacher.model if isinstance(teacher, LiveTeacher) else None
        part = cut_student(plan, live, data, folder, say)
        cut = part[1]
    specs: tuple[HiddenSpec, ...] = ()
    if plan.hidden is not None:
        known = plan.hidden.origin
        specs = plan.hidden.specs(known if known is None or cut is None else Origin(cut.layers, cut.channels))
    if teacher is not None:
        teacher.ask_for(*layers_of(specs, 1))
    student = build_student(plan.config, plan.fresh, part)
    models.verify(student.model, "the student", pack=plan.config.data.pack)
    return student, specs


def asked_in_training(plan: Plan, teacher: AnyTeacher | None) -> AnyTeacher | None:
    """The teacher as it is asked while training: None where no objective needs it."""
    config = plan.config
    if not needs_teacher(config.objectives):
        return None
    if not isinstance(teacher, StoredTeacher):
        return teacher
    signals = any(objective.needs_teacher for objective in config.objectives if not isinstance(objective, Hidden))
    return StoredTeacher(teacher.store, teacher.layers, signals=signals)


def build_stream(
    plan: Plan, documents: DocumentSet, data: AnyData | StoredData, *, tokens: int, epochs: int | None
) -> BatchStream:
    """The steps of at most ``tokens`` positions over some documents, read as ``data`` says."""
    micro_tokens = plan.config.batch.micro_tokens
    assert micro_tokens != "auto"
    assert data.length != "auto"
    return BatchStream(
        documents,
        length=data.length,
        pack=data.pack,
        shuffle=data.shuffle,
        tokens=tokens,
        micro_tokens=micro_tokens,
        seed=plan.config.seed,
        epochs=epochs,
        pad_token=pad_token(plan),
    )


def pad_token(plan: Plan) -> int:
    """The padding token's id, or 0 where the tokenizer has none; what stands on padding does not matter."""
    token: Any = plan.tokenizer.pad_token_id
    return token if isinstance(token, int) else 0


def build_state(
    plan: Plan, student: Student, specs: Sequence[HiddenSpec], stream: ReadAhead, num_steps: int
) -> TrainState:
    """The state before the first step. It seeds torch's own generator."""
    config = plan.config
    assert config.logits_bytes != "auto"
    module = StudentStep(
        student.model,
        build_objectives(config.objectives),
        num_columns=plan.columns,
        logits_bytes=config.logits_bytes,
        precision=getattr(torch, config.precision),
        hidden=[HiddenTerm(spec, seed=config.seed + number) for number, spec in enumerate(specs)],
        hidden_weights=hidden_weights(config.objectives),
    ).to(config.device)
    optimizer = build_optimizer(module, config.optimizer)
    torch.manual_seed(config.seed)
    return TrainState(
        module=module,
        optimizer=optimizer,
        schedule=build_schedule(optimizer, config.optimizer, num_steps),
        stream=stream,
        frozen_saved=student.adapters is None,
    )


def fit_to(state: TrainState, specs: Sequence[HiddenSpec], teacher: AnyTeacher | None, step: Iterable[Micro]) -> None:
    """Lets the objectives that measure first see a step."""
    if teacher is not None and any(spec.measures_first for spec in specs):
        fit_to_first_step(state.module, teacher, step)

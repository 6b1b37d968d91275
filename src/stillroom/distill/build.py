"""From a plan to what a step needs: the teacher, the student, the stream of batches, the student step and its
optimizer."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from stillroom import models
from stillroom.cut.cut import Cut, read_cut, write_cut
from stillroom.data.config import AnyData
from stillroom.data.stream import BatchStream, DocumentSet, Part
from stillroom.distill.ahead import Micro, ReadAhead
from stillroom.distill.checkpoint import TrainState
from stillroom.distill.config import LiveTeacher as LiveTeacherConfig
from stillroom.distill.config import ServerTeacher, StoredData, StoreTeacher
from stillroom.distill.cut import cut_student
from stillroom.distill.distant import DistantTeacher
from stillroom.distill.first_step import fit_to_first_step
from stillroom.distill.hidden import HiddenSpec, HiddenTerm, layers_of
from stillroom.distill.hidden_plan import Origin
from stillroom.distill.meeting import NOBODY_ELSE, Meeting
from stillroom.distill.objective_config import Hidden
from stillroom.distill.objectives import build_objectives, hidden_weights, needs_teacher
from stillroom.distill.optimizer import build_optimizer, build_schedule
from stillroom.distill.parallel_config import Fsdp
from stillroom.distill.plan import Plan
from stillroom.distill.processes import ALONE, Processes
from stillroom.distill.served import ServedTeacher
from stillroom.distill.sharding import let_go, realise_sharded, replicate, shard_student, shard_teacher
from stillroom.distill.step import StudentStep
from stillroom.distill.student import Student, build_student, build_student_to_shard, student_dtype
from stillroom.distill.teacher import LiveTeacher, StoredTeacher
from stillroom.errors import StorageError
from stillroom.weights import read

AnyTeacher = LiveTeacher | StoredTeacher | DistantTeacher | ServedTeacher


def build_teacher(
    plan: Plan, meeting: Meeting = NOBODY_ELSE, documents: DocumentSet | None = None
) -> AnyTeacher | None:
    """The teacher, where the recipe has one: as this process sees it.

    Args:
        documents: those that are trained on, which a server is asked about.
    """
    teacher = plan.config.teacher
    if teacher is None:
        return None
    if isinstance(teacher, ServerTeacher):
        assert documents is not None
        assert plan.columns is not None
        served = ServedTeacher(teacher, plan.tokenizer, documents, plan.columns)
        served.engine.check()
        return served
    if isinstance(teacher, StoreTeacher):
        assert plan.store is not None
        return StoredTeacher(plan.store)
    if meeting.num_teachers and not meeting.teaches:
        return DistantTeacher(
            meeting, models.load_head(_teacher_skeleton(plan), *_teacher_place(plan)), _dtype(teacher)
        )
    if teacher.placement == "whole":
        model = models.load_model(
            teacher.model,
            dtype=_dtype(teacher),
            device=plan.config.device,
            attention=None if teacher.attention == "auto" else teacher.attention,
            revision=teacher.revision,
            trust_remote_code=teacher.trust_remote_code,
            quantization=teacher.quantization,
        )
    else:
        model = _teacher_skeleton(plan).requires_grad_(False)
        folder, device = _teacher_place(plan)
        offload = teacher.placement == "offloaded" and device != "cpu"
        shard_teacher(model, meeting.mine, offload=offload)
        realise_sharded(model, device, offload=offload)
        model.tie_weights()
        read.load(model, folder)
    models.verify(model, "the teacher", pack=plan.config.data.pack, device=torch.device(plan.config.device))
    return LiveTeacher(model)


def _teacher_skeleton(plan: Plan) -> PreTrainedModel:
    teacher = plan.config.teacher
    assert isinstance(teacher, LiveTeacherConfig)
    assert plan.teacher_config is not None
    return models.build_skeleton(
        plan.teacher_config,
        dtype=_dtype(teacher),
        attention=None if teacher.attention == "auto" else teacher.attention,
        trust_remote_code=teacher.trust_remote_code,
    )


def _teacher_place(plan: Plan) -> tuple[Path, str]:
    """The teacher's folder, and the device on which it goes."""
    teacher = plan.config.teacher
    assert isinstance(teacher, LiveTeacherConfig)
    return models.local_folder(teacher.model, teacher.revision), plan.config.device


def _dtype(teacher: LiveTeacherConfig) -> torch.dtype:
    return getattr(torch, teacher.dtype)


def compared_layers(plan: Plan, cut: Cut | None) -> tuple[HiddenSpec, ...]:
    """What the objectives of inner states compare."""
    if plan.hidden is None:
        return ()
    known = plan.hidden.origin
    return plan.hidden.specs(known if known is None or cut is None else Origin(cut.layers, cut.channels))


def build_pair(
    plan: Plan,
    teacher: AnyTeacher | None,
    data: DocumentSet,
    folder: Path,
    say: Callable[[str], object],
    processes: Processes = ALONE,
) -> tuple[Student, tuple[HiddenSpec, ...]]:
    """The student, and what the objectives of inner states compare of it and of the teacher, which will tell it.

    A student that is to be sharded has no values yet; it gets them in ``build_state``.

    Args:
        data: what is trained on; a student that is cut out of its teacher is chosen by it.
        folder: that remembers how such a student was cut.
        say: is told what was found.
    """
    sharded = isinstance(plan.config.parallel, Fsdp)
    part, place, cut = None, None, None
    if plan.cut is not None:
        whole = not sharded and getattr(plan.config.teacher, "placement", None) == "whole"
        live = teacher.model if isinstance(teacher, LiveTeacher) and whole else None
        if sharded:
            place, cut = _cut_for_all(plan, data, folder, say, processes)
        else:
            part = processes.in_turn(lambda: cut_student(plan, live, data, folder, say))
            cut = part[1]
    specs = compared_layers(plan, cut)
    if teacher is not None:
        teacher.ask_for(*layers_of(specs, 1))
    if sharded:
        assert cut is None or place is not None
        return build_student_to_shard(
            plan.config, plan.fresh, None if cut is None or place is None else (place, cut)
        ), specs
    student = build_student(plan.config, plan.fresh, part)
    models.verify(student.model, "the student", pack=plan.config.data.pack)
    return student, specs


def _cut_for_all(
    plan: Plan, data: DocumentSet, folder: Path, say: Callable[[str], object], processes: Processes
) -> tuple[Path, Cut]:
    """A student that is cut by the first process, which holds the teacher whole for it, and the folder where all find
    it."""
    place = folder / "cut"

    def make() -> None:
        model, cut = cut_student(plan, None, data, folder, say)
        model.save_pretrained(place)
        write_cut(place, cut)

    processes.first_does(make)
    cut = read_cut(place)
    if cut is None:
        raise StorageError(
            f"the student that was cut is not in {place}",
            {"folder": place, "found there": "no cut.json"},
            why="The first process cuts it, and the others read it from the run's folder.",
            fix="Put `out` on a file system that all hosts share.",
        )
    return place, cut


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
    plan: Plan,
    documents: DocumentSet,
    data: AnyData | StoredData,
    *,
    tokens: int,
    epochs: int | None,
    processes: Processes = ALONE,
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
        part=Part(processes.rank, processes.size),
    )


def pad_token(plan: Plan) -> int:
    """The padding token's id, or 0 where the tokenizer has none; what stands on padding does not matter."""
    token: Any = plan.tokenizer.pad_token_id
    return token if isinstance(token, int) else 0


def build_state(
    plan: Plan,
    student: Student,
    specs: Sequence[HiddenSpec],
    stream: ReadAhead,
    num_steps: int,
    processes: Processes = ALONE,
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
    )
    module.hidden.to(student_dtype(config))
    parallel: nn.Module | None = None
    if isinstance(config.parallel, Fsdp):
        offload = config.parallel.offload and config.device != "cpu"
        shard_student(module, processes, reshard=config.parallel.reshard, offload=offload)
        realise_sharded(module, config.device, offload=offload)
        student.model.tie_weights()
        assert student.fill is not None
        student.fill()
        device = torch.device(config.device)
        module.within(lambda: models.verify(student.model, "the student", pack=config.data.pack, device=device))
        let_go(module)
    else:
        module.to(config.device)
        if processes.size > 1:
            parallel = replicate(module, processes)
    optimizer = build_optimizer(module, config.optimizer)
    torch.manual_seed(config.seed + processes.rank)
    return TrainState(
        module=module,
        optimizer=optimizer,
        schedule=build_schedule(optimizer, config.optimizer, num_steps),
        stream=stream,
        frozen_saved=student.adapters is None,
        processes=processes,
        parallel=parallel,
        place=torch.device(config.device),
    )


def fit_to(state: TrainState, specs: Sequence[HiddenSpec], teacher: AnyTeacher | None, step: Iterable[Micro]) -> None:
    """Lets the objectives that measure first see a step."""
    if teacher is not None and any(spec.measures_first for spec in specs):
        fit_to_first_step(state.module, teacher, step, state.processes, device=state.device)

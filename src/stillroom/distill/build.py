"""From a plan to what a step needs: the teacher, the student, the stream of batches, the student step and its
optimizer."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from stillroom.data.config import AnyData, StoredDataConfig
from stillroom.data.dataloader import BatchStream, DocumentSet, RankSlice
from stillroom.distill.cut_student import prune_student
from stillroom.distill.hidden_plan import StudentOrigin
from stillroom.distill.plan import DistillPlan
from stillroom.distributed.config import FsdpConfig
from stillroom.distributed.group import SINGLE_RANK, RankGroup
from stillroom.distributed.init import SINGLE_PROCESS, DistContext
from stillroom.distributed.sharding import materialize_sharded, replicate, reshard, shard_teacher, shard_trained
from stillroom.errors import StorageError
from stillroom.losses.config import HiddenObjective
from stillroom.losses.objective import build_objectives, hidden_weights, needs_teacher
from stillroom.models import loading, safetensors_io
from stillroom.models.hidden_states import verify
from stillroom.pruning.prune import PruneMask, read_mask, write_mask
from stillroom.teachers.base import ServerTeacher, StoredTeacher, Teacher
from stillroom.teachers.config import LiveTeacherConfig, ServerTeacherConfig, StoreTeacherConfig
from stillroom.teachers.live import LiveTeacher, RemoteTeacher
from stillroom.training.hidden_objective import HiddenLoss, HiddenSpec, fit_to_first_step, layers_of
from stillroom.training.optimizer import build_optimizer, build_schedule
from stillroom.training.prefetch import MicroBatch, Prefetcher
from stillroom.training.state import TrainState
from stillroom.training.step import StudentStep
from stillroom.training.student import Student, build_meta_student, build_student


def build_teacher(
    plan: DistillPlan, context: DistContext = SINGLE_PROCESS, documents: DocumentSet | None = None
) -> Teacher | None:
    """The teacher, where the recipe has one: as this process sees it.

    Args:
        documents: those that are trained on, which a server is asked about.
    """
    teacher = plan.config.teacher
    if teacher is None:
        return None
    if isinstance(teacher, ServerTeacherConfig):
        assert documents is not None
        assert plan.vocab_size is not None
        served = ServerTeacher(teacher, plan.tokenizer, documents, plan.vocab_size)
        served.engine.check()
        return served
    if isinstance(teacher, StoreTeacherConfig):
        assert plan.store is not None
        return StoredTeacher(plan.store)
    if context.num_teachers and not context.is_teacher:
        return RemoteTeacher(
            context, loading.load_head(_teacher_skeleton(plan), *_teacher_place(plan)), _dtype(teacher)
        )
    if teacher.placement == "whole":
        model = loading.load_model(
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
        shard_teacher(model, context.group, offload=offload)
        materialize_sharded(model, device, offload=offload)
        model.tie_weights()
        safetensors_io.load_weights(model, folder)
    verify(model, "the teacher", pack=plan.config.data.pack, device=torch.device(plan.config.device))
    return LiveTeacher(model)


def _teacher_skeleton(plan: DistillPlan) -> PreTrainedModel:
    teacher = plan.config.teacher
    assert isinstance(teacher, LiveTeacherConfig)
    assert plan.teacher_config is not None
    return loading.build_meta_model(
        plan.teacher_config,
        dtype=_dtype(teacher),
        attention=None if teacher.attention == "auto" else teacher.attention,
        trust_remote_code=teacher.trust_remote_code,
    )


def _teacher_place(plan: DistillPlan) -> tuple[Path, str]:
    """The teacher's folder, and the device on which it goes."""
    teacher = plan.config.teacher
    assert isinstance(teacher, LiveTeacherConfig)
    return loading.local_folder(teacher.model, teacher.revision), plan.config.device


def _dtype(teacher: LiveTeacherConfig) -> torch.dtype:
    return getattr(torch, teacher.dtype)


def compared_layers(plan: DistillPlan, cut: PruneMask | None) -> tuple[HiddenSpec, ...]:
    """What the objectives of inner states compare."""
    if plan.hidden is None:
        return ()
    known = plan.hidden.origin
    return plan.hidden.specs(known if known is None or cut is None else StudentOrigin(cut.layers, cut.channels))


def build_pair(
    plan: DistillPlan,
    teacher: Teacher | None,
    data: DocumentSet,
    folder: Path,
    say: Callable[[str], object],
    ranks: RankGroup = SINGLE_RANK,
) -> tuple[Student, tuple[HiddenSpec, ...]]:
    """The student, and what the objectives of inner states compare of it and of the teacher, which will tell it.

    A student that is to be sharded has no values yet; it gets them in ``build_state``.

    Args:
        data: what is trained on; a student that is cut out of its teacher is chosen by it.
        folder: that remembers how such a student was cut.
        say: is told what was found.
    """
    sharded = isinstance(plan.config.parallel, FsdpConfig)
    part, place, cut = None, None, None
    if plan.cut is not None:
        whole = not sharded and getattr(plan.config.teacher, "placement", None) == "whole"
        live = teacher.model if isinstance(teacher, LiveTeacher) and whole else None
        if sharded:
            place, cut = _cut_for_all(plan, data, folder, say, ranks)
        else:
            part = ranks.local_rank0_first(lambda: prune_student(plan, live, data, folder, say))
            cut = part[1]
    specs = compared_layers(plan, cut)
    if teacher is not None:
        teacher.set_outputs(*layers_of(specs, 1))
    config = plan.config
    dtype = student_dtype(config.precision)
    if sharded:
        assert cut is None or place is not None
        pruned = None if cut is None or place is None else (place, cut)
        return build_meta_student(config.student, dtype=dtype, seed=config.seed, fresh=plan.fresh, pruned=pruned), specs
    student = build_student(
        config.student, dtype=dtype, device=config.device, seed=config.seed, fresh=plan.fresh, pruned=part
    )
    verify(student.model, "the student", pack=plan.config.data.pack)
    return student, specs


def student_dtype(precision: str) -> torch.dtype:
    """Returns the type of the student's weights under a precision of its arithmetic."""
    return torch.float64 if precision == "float64" else torch.float32


def _cut_for_all(
    plan: DistillPlan, data: DocumentSet, folder: Path, say: Callable[[str], object], ranks: RankGroup
) -> tuple[Path, PruneMask]:
    """A student that is cut by the first process, which holds the teacher whole for it, and the folder where all find
    it."""
    place = folder / "cut"

    def make() -> None:
        model, cut = prune_student(plan, None, data, folder, say)
        model.save_pretrained(place)
        write_mask(place, cut)

    ranks.on_rank0(make)
    cut = read_mask(place)
    if cut is None:
        raise StorageError(
            f"the student that was cut is not in {place}",
            {"folder": place, "found there": "no cut.json"},
            why="The first process cuts it, and the others read it from the run's folder.",
            fix="Put `out` on a file system that all hosts share.",
        )
    return place, cut


def asked_in_training(plan: DistillPlan, teacher: Teacher | None) -> Teacher | None:
    """The teacher as it is asked while training: None where no objective needs it."""
    config = plan.config
    if not needs_teacher(config.objectives):
        return None
    if not isinstance(teacher, StoredTeacher):
        return teacher
    signals = any(
        objective.needs_teacher for objective in config.objectives if not isinstance(objective, HiddenObjective)
    )
    return StoredTeacher(teacher.store, teacher.layers, signals=signals)


def build_stream(
    plan: DistillPlan,
    documents: DocumentSet,
    data: AnyData | StoredDataConfig,
    *,
    tokens: int,
    epochs: int | None,
    ranks: RankGroup = SINGLE_RANK,
) -> BatchStream:
    """The steps of at most ``tokens`` positions over some documents, read as ``data`` says."""
    return BatchStream(
        documents,
        length=plan.length,
        pack=data.pack,
        shuffle=data.shuffle,
        tokens=tokens,
        micro_tokens=plan.micro_tokens,
        seed=plan.config.seed,
        epochs=epochs,
        pad_token=pad_token(plan),
        part=RankSlice(ranks.rank, ranks.world_size),
    )


def pad_token(plan: DistillPlan) -> int:
    """The padding token's id, or 0 where the tokenizer has none; what stands on padding does not matter."""
    token: Any = plan.tokenizer.pad_token_id
    return token if isinstance(token, int) else 0


def build_state(
    plan: DistillPlan,
    student: Student,
    specs: Sequence[HiddenSpec],
    stream: Prefetcher,
    num_steps: int,
    ranks: RankGroup = SINGLE_RANK,
) -> TrainState:
    """The state before the first step. It seeds torch's own generator."""
    config = plan.config
    module = StudentStep(
        student.model,
        build_objectives(config.objectives),
        vocab_size=plan.vocab_size,
        logits_bytes=plan.logits_bytes,
        precision=getattr(torch, config.precision),
        hidden=[HiddenLoss(spec, seed=config.seed + number) for number, spec in enumerate(specs)],
        hidden_weights=hidden_weights(config.objectives),
    )
    module.hidden.to(student_dtype(config.precision))
    parallel: nn.Module | None = None
    if isinstance(config.parallel, FsdpConfig):
        offload = config.parallel.offload and config.device != "cpu"
        shard_trained(
            module,
            student.model,
            module.hidden.values(),
            ranks,
            precision=module.precision,
            reshard=config.parallel.reshard,
            offload=offload,
        )
        materialize_sharded(module, config.device, offload=offload)
        student.model.tie_weights()
        assert student.fill is not None
        student.fill()
        device = torch.device(config.device)
        module.within(lambda: verify(student.model, "the student", pack=config.data.pack, device=device))
        reshard(module)
    else:
        module.to(config.device)
        if ranks.world_size > 1:
            parallel = replicate(module, ranks, has_unused=not module.objectives)  # then the head gets no gradient
    optimizer = build_optimizer(module, config.optimizer)
    torch.manual_seed(config.seed + ranks.rank)
    return TrainState(
        module=module,
        optimizer=optimizer,
        schedule=build_schedule(optimizer, config.optimizer, num_steps),
        stream=stream,
        frozen_saved=student.adapters is None,
        ranks=ranks,
        parallel=parallel,
        place=torch.device(config.device),
        late=next(module.parameters()).device.type == "cuda",
    )


def fit_to(state: TrainState, specs: Sequence[HiddenSpec], teacher: Teacher | None, step: Iterable[MicroBatch]) -> None:
    """Lets the objectives that measure first see a step."""
    if teacher is not None and any(spec.measures_first for spec in specs):
        fit_to_first_step(state.module, teacher.forward, step, state.ranks, device=state.device)

"""From a plan to what a step needs: the teacher, the student, the student step and its optimizer."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from stillroom.data.dataloader import DocumentSet
from stillroom.distill.plan import DistillPlan
from stillroom.distributed.config import FsdpConfig
from stillroom.distributed.group import SINGLE_RANK, RankGroup
from stillroom.distributed.init import SINGLE_PROCESS, DistContext
from stillroom.distributed.sharding import materialize_sharded, replicate, reshard, shard_teacher, shard_trained
from stillroom.errors import MismatchError, StorageError
from stillroom.losses.config import HiddenObjective, ObjectiveConfig
from stillroom.losses.objective import build_objectives, hidden_weights, needs_teacher
from stillroom.models import loading, safetensors_io
from stillroom.models.hidden_states import verify
from stillroom.pruning.importance import text_batches
from stillroom.pruning.prune import CUT_FILE, PruneMask, choose_mask, prune_model, read_mask, report, write_mask
from stillroom.runs import same_model, write_json
from stillroom.teachers.base import ServerTeacher, StoredTeacher, Teacher
from stillroom.teachers.config import ServerTeacherConfig, StoreTeacherConfig
from stillroom.teachers.live import LiveTeacher, RemoteTeacher
from stillroom.training.hidden_objective import HiddenLoss, HiddenSpec, layers_of
from stillroom.training.prefetch import Prefetcher
from stillroom.training.state import TrainState, build_optimizer, build_schedule
from stillroom.training.step import StudentStep
from stillroom.training.student import Student, build_student


def build_teacher(
    plan: DistillPlan, context: DistContext = SINGLE_PROCESS, documents: DocumentSet | None = None
) -> Teacher | None:
    """Builds the teacher as this process sees it; None where the recipe has none.

    Args:
        documents: those that are trained on, which a server is asked about.
    """
    teacher, device = plan.config.teacher, plan.config.device
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
    settings: dict[str, Any] = {
        "dtype": getattr(torch, teacher.dtype),
        "attention": None if teacher.attention == "auto" else teacher.attention,
        "trust_remote_code": teacher.trust_remote_code,
    }
    elsewhere = context.num_teachers > 0 and not context.is_teacher
    if teacher.placement == "whole" and not elsewhere:
        model = loading.load_model(
            teacher.model, device=device, revision=teacher.revision, quantization=teacher.quantization, **settings
        )
    else:
        assert plan.teacher_config is not None
        model = loading.build_meta_model(plan.teacher_config, **settings)
        folder = loading.local_folder(teacher.model, teacher.revision)
        if elsewhere:
            return RemoteTeacher(context, loading.load_head(model, folder, device), settings["dtype"])
        model.requires_grad_(False)
        offload = teacher.placement == "offloaded" and device != "cpu"
        shard_teacher(model, context.group, offload=offload)
        materialize_sharded(model, device, offload=offload)
        model.tie_weights()
        safetensors_io.load_weights(model, folder)
    verify(model, "the teacher", pack=plan.config.data.pack, device=torch.device(device))
    return LiveTeacher(model)


def asked_in_training(objectives: Sequence[ObjectiveConfig], teacher: Teacher | None) -> Teacher | None:
    """Returns the teacher as it is asked while training: None where no objective needs it."""
    if not needs_teacher(objectives):
        return None
    if not isinstance(teacher, StoredTeacher):
        return teacher
    signals = any(one.needs_teacher for one in objectives if not isinstance(one, HiddenObjective))
    return StoredTeacher(teacher.store, teacher.layers, signals=signals)


def build_pair(
    plan: DistillPlan,
    teacher: Teacher | None,
    data: DocumentSet,
    folder: Path,
    say: Callable[[str], object],
    ranks: RankGroup = SINGLE_RANK,
) -> tuple[Student, tuple[HiddenSpec, ...]]:
    """Builds the student, and returns what the objectives of inner states compare of it and of the teacher, which will
    tell it.

    A student that is to be sharded has no values yet; it gets them in ``build_state``.

    Args:
        data: the documents that are trained on; a student that is cut out of its teacher is chosen by them.
        folder: remembers how such a student was cut.
        say: is told what was found.
    """
    config, is_cut = plan.config, plan.student.cut is not None
    sharded, pruned = isinstance(config.parallel, FsdpConfig), None
    if is_cut and sharded:
        place = folder / "cut"
        pruned = place, _cut_for_all(partial(prune_student, plan, None, data, folder, say), place, ranks)
    elif is_cut:
        whole = getattr(config.teacher, "placement", None) == "whole"
        live = teacher.model if isinstance(teacher, LiveTeacher) and whole else None
        pruned = cut_once(partial(prune_student, plan, live, data, folder, say), ranks)
    specs = () if plan.hidden is None else plan.hidden.specs(None if pruned is None else pruned[1])
    if teacher is not None:
        teacher.set_outputs(*layers_of(specs, 1))
    student = build_student(
        config.student,
        dtype=student_dtype(config.precision),
        device="meta" if sharded else config.device,
        seed=config.seed,
        fresh=plan.student.config if plan.student.kind == "new" else None,
        pruned=pruned,
    )
    if not sharded:
        verify(student.model, "the student", pack=config.data.pack)
    return student, specs


def cut_once(
    prune: Callable[[PruneMask | None], tuple[PreTrainedModel, PruneMask]], ranks: RankGroup
) -> tuple[PreTrainedModel, PruneMask]:
    """Returns the student as the first process of all cuts it, which alone chooses and writes what is kept, whether the
    hosts share a disk or not; the others are told."""
    first = ranks.on_rank0(lambda: prune(None))
    cut = ranks.all_gather(first and first[1])[0]
    return ranks.on_every_rank(lambda: first or prune(cut))


def _cut_for_all(prune: Callable[[], tuple[PreTrainedModel, PruneMask]], place: Path, ranks: RankGroup) -> PruneMask:
    """Has the first process, which holds the teacher whole for it, cut the student and write it into a folder, where
    all find it."""

    def make() -> None:
        model, cut = prune()
        with safetensors_io.new_model_folder(place) as written:
            model.save_pretrained(written)
            write_mask(written, cut)

    ranks.on_rank0(make)
    if (cut := read_mask(place)) is None:
        raise StorageError(
            f"the student that was cut is not in {place}",
            {"folder": place, "found there": "no cut.json"},
            why="The first process cuts it, and the others read it from the run's folder.",
            fix="Put `out` on a file system that all hosts share.",
        )
    return cut


def prune_student(
    plan: DistillPlan,
    teacher: PreTrainedModel | None,
    documents: DocumentSet,
    folder: Path,
    say: Callable[[str], object],
    told: PruneMask | None = None,
) -> tuple[PreTrainedModel, PruneMask]:
    """Returns the student as a part of its teacher, in float32 on the CPU, and what was kept.

    Args:
        teacher: the live teacher, if it is loaded: it is what is measured, where it is what the student is cut from.
        documents: those that are trained on; the first of them are measured on.
        folder: the run's, which remembers what was chosen: a resumed run has the same student.
        say: is told what is found.
        told: what is kept, where another process has chosen it.

    Raises:
        MismatchError: the run began with a part of another model.
    """
    student, pruning = plan.config.student, plan.student.cut
    assert plan.student.source is not None
    assert pruning is not None
    source, revision = plan.student.source
    fingerprint = loading.fingerprint(source, pruning.teacher)
    code = student.trust_remote_code
    whole: Any = loading.load_model(source, dtype="auto", revision=revision, trust_remote_code=code)
    cut = told or read_mask(folder)
    if cut is not None:
        check_same(folder, "model to cut the student from", cut.teacher, fingerprint)
    else:
        batches: Any = ()
        if pruning.measured:
            batches = text_batches(
                documents,
                number=pruning.cut.documents,
                length=plan.length,
                pack=plan.config.data.pack,
                batch_tokens=plan.micro_tokens,
                pad_token=plan.pad_token,
            )
        measured: Any = whole if teacher is None or getattr(student.init, "model", None) is not None else teacher
        cut = choose_mask(pruning, measured.to(plan.config.device), list(batches), teacher=fingerprint, say=say)
        write_json(folder / CUT_FILE, cut.to_json())
    part = prune_model(whole, cut, pruning).cpu().float()  # pyright: ignore[reportArgumentType]
    say(f"the student is a part of {source}\n" + report(cut, pruning, *map(loading.num_parameters, (whole, part))))
    return part, cut


def check_same(folder: Path, name: str, before: object, now: object) -> None:
    """Raises MismatchError where a thing is not what the run in a folder began with."""
    if not same_model(before, now):
        raise MismatchError(
            f"the run in {folder} began with another {name}",
            {"then": before, "now": now},
            why="What lies there has changed, so the run would be half of one thing and half of another.",
            fix="Put back what was there, or choose another `out`.",
        )


def student_dtype(precision: str) -> torch.dtype:
    """Returns the type of the student's weights under a precision of its arithmetic."""
    return torch.float64 if precision == "float64" else torch.float32


def build_state(
    plan: DistillPlan,
    student: Student,
    specs: Sequence[HiddenSpec],
    stream: Prefetcher,
    num_steps: int,
    ranks: RankGroup = SINGLE_RANK,
) -> TrainState:
    """Builds the state before the first step. It seeds torch's own generator."""
    config, model = plan.config, student.model
    module = StudentStep(
        model,
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
            model,
            module.hidden.values(),
            ranks,
            precision=module.precision,
            reshard=config.parallel.reshard,
            offload=offload,
        )
        materialize_sharded(module, config.device, offload=offload)
        model.tie_weights()
        assert student.fill is not None
        student.fill()
        device = torch.device(config.device)
        module.within(lambda: verify(model, "the student", pack=config.data.pack, device=device))
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

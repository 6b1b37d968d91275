"""`stillroom distill`: student + (live teacher or none) + data -> model."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from stillroom.data.config import AnyData, StoredDataConfig
from stillroom.data.dataloader import DocumentSet
from stillroom.data.dataset import Documents, prepare
from stillroom.distill.build import (
    asked_in_training,
    build_pair,
    build_state,
    build_stream,
    build_teacher,
    compared_layers,
    fit_to,
)
from stillroom.distill.config import DistillConfig
from stillroom.distill.plan import DistillPlan, make_plan
from stillroom.distributed.config import FsdpConfig
from stillroom.distributed.failures import FailureReport, reported_once
from stillroom.distributed.init import (
    DistContext,
    began,
    destroy_distributed,
    init_distributed,
    launcher,
    restart_count,
)
from stillroom.errors import Interrupted, MismatchError
from stillroom.losses.config import ObjectiveConfig
from stillroom.losses.objective import build_objectives, hidden_weights, needs_teacher, scheduled
from stillroom.models import loading
from stillroom.runs import Metrics, RunFolder, RunFolderView, check_place, deferred_interrupts, versions
from stillroom.store.reader import Store
from stillroom.teachers.base import ServerTeacher, StoredTeacher, Teacher
from stillroom.teachers.config import LiveTeacherConfig, StoreTeacherConfig
from stillroom.teachers.live import LiveTeacher, RemoteTeacher, serve
from stillroom.tokenizers import fingerprint, template_fingerprint
from stillroom.tracking import check, track
from stillroom.training.checkpoint import Checkpoints
from stillroom.training.hidden_objective import layers_of
from stillroom.training.loop import Measure, Scheduled, train
from stillroom.training.prefetch import Prefetcher
from stillroom.training.state import TrainState
from stillroom.training.step import StudentStep
from stillroom.training.student import Student
from stillroom.training.validation import measure_held_out
from stillroom.verbs import Report, recorded

FREE_TO_CHANGE = (
    "tracking", "checkpoints.every", "checkpoints.keep", "out", "batch.micro_tokens", "logits_bytes", "device",
    "data.cache", "parallel", "teacher.placement", "teacher.ranks", "checkpoints.background", "student.compile",
    "export",
)  # fmt: skip
"""Settings that change nothing of what is learnt, but for rounding, so a resumed run may have others."""


def run(
    config: DistillConfig, *, resume: bool = False, overwrite: bool = False, report: Report = lambda *_: None
) -> dict[str, Any]:
    """Trains the student and writes ``out/model``; returns what run.json says, in the first process of several.

    Args:
        resume: go on with the run in ``out``, from its last checkpoint; begin it where there is none.
        overwrite: delete what is in ``out`` first.
        report: is told of each step, for a progress line.

    Raises:
        StillroomError: something that the user can mend; what was written before is whole.
        KeyboardInterrupt: Ctrl-C; while training, the state was saved first.
    """
    check(config.tracking)
    with together(config) as context:
        failures = FailureReport(context.world)
        first = context.world.is_rank0
        with reported_once(failures):
            record = _run(config, context, failures, resume, overwrite, report if first else _silent)
        return record if first else {}


def _silent(*_: object) -> None:
    """What all but the first process report."""


def _run(
    config: DistillConfig, context: DistContext, failures: FailureReport, resume: bool, overwrite: bool, report: Report
) -> dict[str, Any]:
    world, ranks = context.world, context.group
    launchers = sorted(set(world.all_gather(launcher())))
    if world.any_rank(restart_count() > 0) and world.all_gather(began(config.out, launchers))[0]:  # torchrun goes on
        resume, overwrite = True, False

    def look() -> DistillPlan:
        check_place(config.out, may_exist=resume or overwrite)
        return make_plan(config, context)

    plan = world.on_every_rank(look, must_be_same)
    config = plan.config
    folder = world.on_rank0(
        lambda: RunFolder(
            config.out, config.model_dump(mode="json"), resume=resume, overwrite=overwrite, free=FREE_TO_CHANGE
        )
    )
    with folder or RunFolderView(config.out) as folder:
        folder.share(world.all_gather)
        if folder.done:
            report("note", {"text": f"the run in {folder.path} is done already"})
            return folder.record
        if world.world_size > 1:
            here = {"train": context.num_trainers, "teach": context.num_teachers}
            folder.update(status="started", launchers=launchers, processes=here)
        if context.is_teacher:
            return teach(plan, context)
        data: Documents | Store | None = plan.store
        if data is None:
            data = ranks.local_rank0_first(lambda: _prepare(config.data, plan, report))
        held_out: Documents | Store | None = plan.held_out_store
        if plan.held_out is not None and held_out is None:
            held_out = ranks.local_rank0_first(lambda: _prepare(plan.held_out, plan, report))  # pyright: ignore
        measured = needs_teacher(config.objectives) or config.held_out is not None or context.num_teachers > 0
        teacher = build_teacher(plan, context, data) if measured else None
        with leaving(teacher):
            return _distill(plan, context, failures, teacher, (data, held_out), folder, report)


def _distill(
    plan: DistillPlan,
    context: DistContext,
    failures: FailureReport,
    teacher: Teacher | None,
    texts: tuple[Documents | Store, Documents | Store | None],
    folder: RunFolder | RunFolderView,
    report: Report,
) -> dict[str, Any]:
    config, ranks, (data, held_out) = plan.config, context.group, texts
    student, specs = build_pair(plan, teacher, data, folder.path, lambda text: report("note", {"text": text}), ranks)
    facts = _facts(plan, student, teacher, data, held_out)
    ranks.on_every_rank(lambda: facts, lambda facts: {f"files ({name})": fact for name, fact in facts.items()})
    ranks.on_rank0(lambda: _check_same_things(folder, facts))
    folder.update(status="started", **facts)

    stream = build_stream(plan, data, config.data, tokens=config.batch.tokens, epochs=config.epochs, ranks=ranks)
    num_steps = config.steps or stream.num_steps()
    assert num_steps is not None  # a config has either steps or epochs
    asked = asked_in_training(plan, teacher)
    state = build_state(plan, student, specs, Prefetcher(stream, asked), num_steps, ranks)
    checkpoints = Checkpoints(
        folder.path / "checkpoints",
        keep=config.checkpoints.keep,
        ranks=ranks,
        background=config.checkpoints.background is True,
    )
    if (latest := ranks.all_gather(checkpoints.latest())[0]) is not None:
        checkpoints.load(state, latest)
        report("note", {"text": f"resumed after step {state.step} of {num_steps}, from {latest}"})
    elif any(spec.measures_first for spec in specs):
        begin = state.stream.state()
        fit_to(state, specs, asked, next(state.stream))
        state.stream.restore(begin)  # the first step is made as if nobody had seen it
    _train(plan, state, num_steps, (asked, teacher), held_out, checkpoints, (folder, failures), report)

    results = _results(state)
    if config.checkpoints.best and state.best:
        checkpoints.load(state, checkpoints.at(int(state.best["step"])))
        report("note", {"text": f"exporting the best step, {state.step}"})
        results |= {"exported_step": state.step, "held_out": state.held_out}
    report("note", {"text": f"writing {folder.path / 'model'}"})
    student.save(folder.path / "model", plan.tokenizer, ranks, dtype=getattr(torch, config.export.dtype))
    folder.update(status="done", **results)
    return folder.record


def _check_same_things(folder: RunFolder | RunFolderView, facts: Mapping[str, dict[str, Any]]) -> None:
    """A resumed run goes on with the models, the tokenizer and the data that it began with."""
    for name, fact in facts.items():
        before, now = folder.record.get(name, {}).get("fingerprint"), fact.get("fingerprint")
        if before is not None and before != now:
            raise MismatchError(
                f"the run in {folder.path} began with another {name.replace('_', ' ')}",
                {"then": before, "now": now},
                why="What lies there has changed, so the run would be half of one thing and half of another.",
                fix="Put back what was there, or choose another `out`.",
            )


def _prepare(data: AnyData | StoredDataConfig, plan: DistillPlan, report: Report) -> Documents:
    assert not isinstance(data, StoredDataConfig)  # its documents are the store's
    documents = prepare(
        data,
        plan.tokenizer,
        template=plan.template,
        report=lambda rows: report("tokenise", {"rows": rows, "path": data.path}),
    )
    dropped = {k: v for k, v in documents.counts.items() if v and k.startswith(("cut", "split", "dropped"))}
    told = ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in dropped.items())
    report("note", {"text": f"{data.path}: {len(documents)} documents, {documents.counts['tokens_learnt']} tokens to "
                            f"learn{'; ' + told if told else ''}"})  # fmt: skip
    return documents


def _train(
    plan: DistillPlan,
    state: TrainState,
    num_steps: int,
    teachers: tuple[Teacher | None, Teacher | None],
    held_out: DocumentSet | None,
    checkpoints: Checkpoints,
    place: tuple[RunFolder | RunFolderView, FailureReport],
    report: Report,
) -> None:
    """The loop, with its metrics written to metrics.jsonl and to the trackers.

    Args:
        teachers: the one that training asks, and the one that measuring does.
        place: the run's folder, and where each step is noted.
    """
    config = plan.config
    (asked, teacher), (folder, failures) = teachers, place
    measure = None
    if held_out is not None and plan.held_out is not None:
        judge = teacher
        if plan.held_out_store is not None and isinstance(teacher, StoredTeacher):
            judge = StoredTeacher(plan.held_out_store, teacher.layers)
        if isinstance(teacher, ServerTeacher):
            judge = teacher.of(held_out)
        measure = partial(_measure, plan, state, judge, held_out, plan.held_out)
    first = state.ranks.is_rank0
    metrics = Metrics(folder.path / "metrics.jsonl", after=state.step) if first else None
    tracker = track(config.tracking if first else (), folder.path, folder.record["config"], after=state.step)

    def record(values: dict[str, Any]) -> None:
        failures.at(f"step {values['step']}")
        if metrics is None:
            return
        metrics.append(values)
        flat = {"train": values} if "held_out" not in values else {"held_out": values["held_out"]}
        tracker.log({f"{kind}/{k}": v for kind, pairs in flat.items() for k, v in pairs.items()}, values["step"])

    try:
        with recorded(folder, partial(_results, state)):
            if plan.cut is not None and measure is not None and "held_out_before" not in folder.record:
                _measure_before(measure, folder, record, report)
            train(
                state,
                asked,
                num_steps=num_steps,
                clip=config.optimizer.clip,
                checkpoints=checkpoints,
                checkpoint_every=config.checkpoints.every,
                measure=measure,
                measure_every=None if config.held_out is None else config.held_out.every,
                keep_best=config.checkpoints.best,
                record=record,
                report=report,
                objectives=partial(_now, config.objectives) if scheduled(config.objectives) else None,
            )
    finally:
        state.stream.close()
        if metrics is not None:
            metrics.close()
        tracker.close()


def _measure_before(
    measure: Measure, folder: RunFolder | RunFolderView, record: Callable[[dict[str, Any]], None], report: Report
) -> None:
    """What a student that starts as a part of its teacher can do before it is trained."""
    if (measured := measure(lambda: False)) is not None:
        record({"step": 0, "held_out": measured})
        report("held_out", {"step": 0, **measured})
        folder.update(held_out_before=measured)


def _now(configs: Sequence[ObjectiveConfig], progress: float) -> Scheduled:
    return build_objectives(configs, progress), hidden_weights(configs, progress)


def _measure(
    plan: DistillPlan,
    state: TrainState,
    teacher: Teacher | None,
    documents: DocumentSet,
    data: AnyData | StoredDataConfig,
    stop: Callable[[], bool],
) -> dict[str, float] | None:
    tokens = plan.micro_tokens * state.ranks.world_size
    steps = build_stream(plan, documents, data, tokens=tokens, epochs=1, ranks=state.ranks)
    assert isinstance(state.module, StudentStep)
    return measure_held_out(state.module, teacher, steps, plan.config.device, stop, state.ranks)


def _facts(
    plan: DistillPlan,
    student: Student,
    teacher: Teacher | None,
    data: Documents | Store,
    held_out: Documents | Store | None,
) -> dict[str, Any]:
    """What run.json says of the things that went in."""
    config = plan.config
    facts: dict[str, dict[str, Any]] = {
        "tokenizer": {"fingerprint": fingerprint(plan.tokenizer)},
        "student": {
            "num_parameters": loading.num_parameters(student.model),
            "num_trained": loading.num_parameters(student.model, trained_only=True),
        },
        "data": {"fingerprint": data.fingerprint, **data.counts},
    }
    if student.cut is not None:
        facts["student"]["cut"] = {"from": student.cut.teacher, "layers": list(student.cut.layers)}
    if config.student.model is not None:
        facts["student"]["fingerprint"] = loading.fingerprint(config.student.model, student.model.config)
    if plan.template is not None:
        facts["template"] = {"fingerprint": template_fingerprint(plan.template)}
    if held_out is not None:
        facts["held_out_data"] = {"fingerprint": held_out.fingerprint, **held_out.counts}
    if plan.store is not None:
        facts["teacher"] = {"fingerprint": plan.store.manifest.teacher.fingerprint}
        facts["store"] = {"fingerprint": plan.store.fingerprint}
    elif not isinstance(config.teacher, StoreTeacherConfig | None) and plan.teacher_config is not None:
        facts["teacher"] = {"fingerprint": loading.fingerprint(config.teacher.model, plan.teacher_config)}
        if isinstance(teacher, LiveTeacher):
            facts["teacher"]["num_parameters"] = loading.num_parameters(teacher.model)
    return facts


def _results(state: TrainState) -> dict[str, Any]:
    results: dict[str, Any] = {
        "steps": state.step,
        "num_kept": state.num_tokens,
        "time_s": round(state.time_s, 3),
    }
    if state.held_out:
        results["held_out"] = state.held_out
    if state.best:
        results["best"] = state.best
    if torch.cuda.is_available():
        results["peak_cuda_bytes"] = torch.cuda.max_memory_allocated()
    return results


def must_be_same(plan: DistillPlan) -> dict[str, object]:
    """What must be the same in all processes before anything is loaded."""
    config = plan.config.model_dump(mode="json", exclude={"data": {"cache"}})
    found = versions()
    return {
        **{f"versions of {name}": found.get(name, "none") for name in ("python", "stillroom", "torch", "transformers")},
        "settings": config,
        "tokenizers": fingerprint(plan.tokenizer),
    }


def teach(plan: DistillPlan, context: DistContext) -> dict[str, Any]:
    """Runs the teacher for the processes that train, until they have left."""
    teacher = build_teacher(plan, context)
    assert isinstance(teacher, LiveTeacher)
    assert isinstance(plan.config.teacher, LiveTeacherConfig)
    teacher.set_outputs(*layers_of(compared_layers(plan, None), 1))
    with deferred_interrupts() as interrupted:  # those that train are told, and say when to stop
        serve(teacher, context, plan.config.device, interrupted, together=plan.config.teacher.placement != "whole")
    return {}


@contextmanager
def leaving(teacher: Teacher | None) -> Iterator[None]:
    """Tells a teacher on processes of its own when it is no longer needed: after the run, or when it is interrupted."""
    try:
        yield
    except Interrupted:
        if isinstance(teacher, RemoteTeacher):
            teacher.leave()
        raise
    if isinstance(teacher, RemoteTeacher):
        teacher.leave()


@contextmanager
def together(config: DistillConfig) -> Iterator[DistContext]:
    """The processes that were started together, until the end of the run."""
    teacher, parallel = config.teacher, config.parallel
    live = teacher if isinstance(teacher, LiveTeacherConfig) else None
    number = config.device.partition(":")[2]
    context = init_distributed(
        "cuda" if config.device.startswith(("auto", "cuda")) and torch.cuda.is_available() else "cpu",
        timeout_s=getattr(parallel, "timeout_s", 60.0),
        sharded=isinstance(parallel, FsdpConfig) or (live is not None and live.placement in ("sharded", "offloaded")),
        replicas=parallel.replicas if isinstance(parallel, FsdpConfig) else 1,
        num_teachers=(live.ranks or 0) if live is not None else 0,
        device=int(number) if number.isdecimal() else None,
    )
    try:
        yield context
    except BaseException:
        if context.world.world_size == 1:
            destroy_distributed()
        raise  # groups of which a process is lost cannot be left in good order
    else:
        destroy_distributed()

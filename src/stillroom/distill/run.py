"""`stillroom distill`: student + (live teacher or none) + data -> model."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from stillroom.data.chat_templates import NEVER_STOPS, learns_to_stop
from stillroom.data.config import AnyData
from stillroom.data.dataset import Documents, prepare
from stillroom.distill.build import asked_in_training, build_pair, build_state, build_teacher, check_same
from stillroom.distill.config import DistillConfig
from stillroom.distill.plan import DistillPlan, make_plan
from stillroom.distributed.config import FsdpConfig
from stillroom.distributed.failures import FailureReport, reported_once
from stillroom.distributed.group import RankGroup
from stillroom.distributed.init import (
    DistContext,
    began,
    destroy_distributed,
    init_distributed,
    launcher,
    restart_count,
)
from stillroom.errors import DataError, Interrupted
from stillroom.losses.objective import build_objectives, hidden_weights, needs_teacher, scheduled
from stillroom.models import loading
from stillroom.runs import Metrics, RunFolder, RunFolderView, check_place, deferred_interrupts
from stillroom.store.format import PROMISE
from stillroom.store.reader import Store
from stillroom.teachers.base import ServerTeacher, StoredTeacher, Teacher
from stillroom.teachers.config import LiveTeacherConfig
from stillroom.teachers.live import LiveTeacher, RemoteTeacher, serve
from stillroom.tokenizers import fingerprint, template_fingerprint
from stillroom.tracking import check, track
from stillroom.training.checkpoint import Checkpoints
from stillroom.training.hidden_objective import fit_to_first_step, layers_of
from stillroom.training.loop import train
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
"""Settings that change nothing of what is learned, but for rounding, so a resumed run may have others."""


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
    live = config.teacher if isinstance(config.teacher, LiveTeacherConfig) else None
    on_cuda = config.device.startswith(("auto", "cuda")) and torch.cuda.is_available()
    shards_teacher = live is not None and live.placement in ("sharded", "offloaded")
    number = config.device.partition(":")[2]
    context = init_distributed(
        "cuda" if on_cuda else "cpu",
        timeout_s=getattr(config.parallel, "timeout_s", 60.0),
        sharded=isinstance(config.parallel, FsdpConfig) or shards_teacher,
        replicas=getattr(config.parallel, "replicas", 1),
        num_teachers=(live.ranks or 0) if live is not None else 0,
        device=int(number) if number.isdecimal() else None,
    )
    failures, first = FailureReport(context.world), context.world.is_rank0
    try:
        with reported_once(failures):
            record = _run(config, context, failures, resume, overwrite, report if first else lambda *_: None)
    except BaseException:
        if context.world.world_size == 1:
            destroy_distributed()
        raise  # groups of which a process is lost cannot be left in good order
    destroy_distributed()
    return record if first else {}


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

    plan = world.on_every_rank(look, DistillPlan.same_everywhere)
    settings = plan.config.model_dump(mode="json")
    folder = world.on_rank0(
        lambda: RunFolder(config.out, settings, resume=resume, overwrite=overwrite, free=FREE_TO_CHANGE)
    )
    with folder or RunFolderView(config.out) as folder:
        folder.share(world.all_gather)
        if folder.done:
            report("note", {"text": f"the run in {folder.path} is done already"})
            return folder.record
        if world.world_size > 1:
            here = {"train": context.num_trainers, "teach": context.num_teachers}
            folder.update(status="started", launchers=launchers, processes=here)
        for store in (plan.store, plan.held_out_store):
            if store is not None and store.manifest.promised:
                raise DataError(
                    f"the store {store.path} is promised, and not there yet",
                    {"engine of its manifest": PROMISE},
                    why="It stands for what a capture will make, so that other runs can be planned, and has no rows.",
                    fix="Make the capture, and name its store.",
                )
        if context.is_teacher:
            return teach(plan, context)
        texts: dict[str, Documents | Store | None] = {"data": plan.store, "held_out": plan.held_out_store}
        for name, data in plan.texts():
            texts[name] = ranks.local_rank0_first(partial(_prepare, data, plan.tokenizer, plan.template, report))
        data, held_out = texts["data"], texts["held_out"]
        assert data is not None
        measured = needs_teacher(config.objectives) or held_out is not None or context.num_teachers > 0
        teacher = build_teacher(plan, context, data) if measured else None
        with leaving(teacher):
            return _distill(plan, ranks, failures, teacher, data, held_out, folder, report)


def _distill(
    plan: DistillPlan,
    ranks: RankGroup,
    failures: FailureReport,
    teacher: Teacher | None,
    data: Documents | Store,
    held_out: Documents | Store | None,
    folder: RunFolder | RunFolderView,
    report: Report,
) -> dict[str, Any]:
    def say(text: str) -> None:
        report("note", {"text": text})

    def check_facts() -> None:
        """A resumed run goes on with the models, the tokenizer and the data that it began with."""
        for name, fact in facts.items():
            if (before := folder.record.get(name, {}).get("fingerprint")) is not None:
                check_same(folder.path, name.replace("_", " "), before, fact.get("fingerprint"))

    config = plan.config
    if learns_to_stop(plan.tokenizer, plan.template) is False:
        say(f"warning: {NEVER_STOPS}")
    student, specs = build_pair(plan, teacher, data, folder.path, say, ranks)
    facts = _facts(plan, student, teacher, data, held_out)
    ranks.on_every_rank(lambda: facts, lambda facts: {f"files ({name})": fact for name, fact in facts.items()})
    ranks.on_rank0(check_facts)
    folder.update(status="started", **facts)

    shuffle, tokens = config.data.shuffle, config.batch.tokens
    stream = plan.stream(data, tokens=tokens, epochs=config.epochs, shuffle=shuffle, ranks=ranks)
    num_steps = config.steps or stream.num_steps()
    assert num_steps is not None  # a config has either steps or epochs
    asked = asked_in_training(config.objectives, teacher)
    state = build_state(plan, student, specs, Prefetcher(stream, asked), num_steps, ranks)
    background = config.checkpoints.background is True
    checkpoints = Checkpoints(
        folder.path / "checkpoints", keep=config.checkpoints.keep, ranks=ranks, background=background
    )
    if (latest := ranks.all_gather(checkpoints.latest())[0]) is not None:
        checkpoints.load(state, latest)
        say(f"resumed after step {state.step} of {num_steps}, from {latest}")
    elif asked is not None and any(spec.measures_first for spec in specs):
        begin = state.stream.state()
        fit_to_first_step(state.module, asked.forward, next(state.stream), ranks, device=state.device)
        state.stream.restore(begin)  # the first step is made as if nobody had seen it
    _train(plan, state, num_steps, (asked, teacher), held_out, checkpoints, (folder, failures), report)

    results = _results(state)
    if config.checkpoints.best and state.best:
        checkpoints.load(state, checkpoints.at(int(state.best["step"])))
        say(f"exporting the best step, {state.step}")
        results |= {"exported_step": state.step, "held_out": state.held_out}
    say(f"writing {folder.path / 'model'}")
    student.save(folder.path / "model", plan.tokenizer, ranks, dtype=getattr(torch, config.export.dtype))
    folder.update(status="done", **results)
    return folder.record


def _prepare(data: AnyData, tokenizer: PreTrainedTokenizerBase, template: str | None, report: Report) -> Documents:
    def tell(rows: int) -> None:
        report("tokenise", {"rows": rows, "path": data.path})

    documents = prepare(data, tokenizer, template=template, report=tell)
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
    held_out: Documents | Store | None,
    checkpoints: Checkpoints,
    place: tuple[RunFolder | RunFolderView, FailureReport],
    report: Report,
) -> None:
    """Runs the loop, with its metrics written to metrics.jsonl and to the trackers.

    Args:
        teachers: the one that training asks, and the one that measuring does.
        place: the run's folder, and where each step is noted.
    """
    config, ranks, module = plan.config, state.ranks, state.module
    (asked, judge), (folder, failures) = teachers, place
    if held_out is not None and isinstance(judge, ServerTeacher):
        judge = judge.of(held_out)
    if plan.held_out_store is not None and isinstance(judge, StoredTeacher):
        judge = StoredTeacher(plan.held_out_store, judge.layers)

    def measure(stop: Callable[[], bool]) -> dict[str, float] | None:
        assert held_out is not None
        assert isinstance(module, StudentStep)
        steps = plan.stream(held_out, tokens=plan.micro_tokens * ranks.world_size, epochs=1, ranks=ranks)
        return measure_held_out(module, judge, steps, config.device, stop, ranks)

    metrics = Metrics(folder.path / "metrics.jsonl", state.step, state.metrics) if ranks.is_rank0 else None
    if metrics is not None:
        checkpoints.seal_metrics = metrics.seal
    trackers = config.tracking if ranks.is_rank0 else ()
    tracker = track(trackers, folder.path, folder.record["config"], after=state.step)

    def record(values: dict[str, Any]) -> None:
        failures.at(f"step {values['step']}")
        if metrics is None:
            return
        metrics.append(values)
        flat = {"train": values} if "held_out" not in values else {"held_out": values["held_out"]}
        tracker.log({f"{kind}/{k}": v for kind, pairs in flat.items() for k, v in pairs.items()}, values["step"])

    def objectives_at(progress: float) -> tuple[Any, ...]:
        return build_objectives(config.objectives, progress), hidden_weights(config.objectives, progress)

    try:
        with recorded(folder, partial(_results, state)):
            is_part = plan.student.cut is not None and held_out is not None
            if is_part and "held_out_before" not in folder.record and (before := measure(lambda: False)) is not None:
                record({"step": 0, "held_out": before})
                report("held_out", {"step": 0, **before})
                folder.update(held_out_before=before)
            train(
                state,
                asked,
                num_steps=num_steps,
                clip=config.optimizer.clip,
                checkpoints=checkpoints,
                checkpoint_every=config.checkpoints.every,
                measure=None if held_out is None else measure,
                measure_every=None if config.held_out is None else config.held_out.every,
                keep_best=config.checkpoints.best,
                record=record,
                report=report,
                objectives=objectives_at if scheduled(config.objectives) else None,
            )
    finally:
        state.stream.close()
        if metrics is not None:
            metrics.close()
        tracker.close()


def _facts(
    plan: DistillPlan,
    student: Student,
    teacher: Teacher | None,
    data: Documents | Store,
    held_out: Documents | Store | None,
) -> dict[str, Any]:
    """Returns what run.json says of the things that went in."""
    described: dict[str, Any] = {
        "num_parameters": loading.num_parameters(student.model),
        "num_trained": loading.num_parameters(student.model, trained_only=True),
    }
    facts: dict[str, dict[str, Any]] = {
        "tokenizer": {"fingerprint": fingerprint(plan.tokenizer)},
        "student": described,
        "data": {"fingerprint": data.fingerprint, **data.counts},
    }
    if student.cut is not None:
        described["cut"] = {"from": student.cut.teacher, "layers": list(student.cut.layers)}
    if plan.config.student.model is not None:
        described["fingerprint"] = loading.fingerprint(plan.config.student.model, student.model.config)
    if plan.template is not None:
        facts["template"] = {"fingerprint": template_fingerprint(plan.template)}
    if held_out is not None:
        facts["held_out_data"] = {"fingerprint": held_out.fingerprint, **held_out.counts}
    if plan.teacher_fingerprint is not None:
        facts["teacher"] = {"fingerprint": plan.teacher_fingerprint}
    if plan.store is not None:
        facts["store"] = {"fingerprint": plan.store.fingerprint}
    if isinstance(teacher, LiveTeacher):
        facts["teacher"]["num_parameters"] = loading.num_parameters(teacher.model)
    return facts


def _results(state: TrainState) -> dict[str, Any]:
    results: dict[str, Any] = {"steps": state.step, "num_kept": state.num_tokens, "time_s": round(state.time_s, 3)}
    results |= {name: found for name in ("held_out", "best") if (found := getattr(state, name))}
    if torch.cuda.is_available():
        results["peak_cuda_bytes"] = torch.cuda.max_memory_allocated()
    return results


def teach(plan: DistillPlan, context: DistContext) -> dict[str, Any]:
    """Runs the teacher for the processes that train, until they have left."""
    teacher, config = build_teacher(plan, context), plan.config
    assert isinstance(teacher, LiveTeacher)
    assert isinstance(config.teacher, LiveTeacherConfig)
    teacher.set_outputs(*layers_of(() if plan.hidden is None else plan.hidden.specs(), 1))
    with deferred_interrupts() as interrupted:  # those that train are told, and say when to stop
        serve(teacher, context, config.device, interrupted, together=config.teacher.placement != "whole")
    return {}


@contextmanager
def leaving(teacher: Teacher | None) -> Iterator[None]:
    """Tells a teacher on processes of its own when it is no longer needed: after the run, or when it is interrupted."""
    leave = teacher.leave if isinstance(teacher, RemoteTeacher) else lambda: None
    try:
        yield
    except Interrupted:
        leave()
        raise
    leave()

"""`stillroom distill`: student + (live teacher or none) + data -> model."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch

from stillroom import models
from stillroom.data.config import AnyData
from stillroom.data.documents import Documents, prepare
from stillroom.data.stream import DocumentSet
from stillroom.distill.ahead import ReadAhead
from stillroom.distill.build import (
    AnyTeacher,
    asked_in_training,
    build_pair,
    build_state,
    build_stream,
    build_teacher,
    fit_to,
)
from stillroom.distill.checkpoint import Checkpoints, TrainState
from stillroom.distill.config import DistillConfig, StoredData, StoreTeacher
from stillroom.distill.held_out import measure_held_out
from stillroom.distill.loop import Measure, Report, Scheduled, train
from stillroom.distill.meeting import Meeting, attempt
from stillroom.distill.objective_config import ObjectiveConfig
from stillroom.distill.objectives import build_objectives, hidden_weights, needs_teacher, scheduled
from stillroom.distill.plan import Plan, make_plan
from stillroom.distill.roll import Roll, told_once
from stillroom.distill.served import ServedTeacher
from stillroom.distill.student import Student
from stillroom.distill.teacher import LiveTeacher, StoredTeacher
from stillroom.distill.together import began, launcher, leaving, must_be_same, teach, together
from stillroom.errors import MismatchError
from stillroom.runs import Metrics, Onlooker, RunFolder, check_place
from stillroom.store.reader import Store
from stillroom.tokenizers import fingerprint, template_fingerprint
from stillroom.tracking import check, track

FREE_TO_CHANGE = (
    "tracking", "checkpoints.every", "checkpoints.keep", "out", "batch.micro_tokens", "logits_bytes", "device",
    "data.cache", "parallel", "teacher.placement", "teacher.ranks", "checkpoints.background", "student.compile",
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
    with together(config) as meeting:
        roll = Roll(meeting.everybody)
        first = meeting.everybody.first
        with told_once(roll):
            record = _run(config, meeting, roll, resume, overwrite, report if first else _silent)
        return record if first else {}


def _silent(*_: object) -> None:
    """What all but the first process report."""


def _run(
    config: DistillConfig, meeting: Meeting, roll: Roll, resume: bool, overwrite: bool, report: Report
) -> dict[str, Any]:
    everybody, processes = meeting.everybody, meeting.mine
    launchers = sorted(set(everybody.gather(launcher())))
    if everybody.any(attempt() > 0) and everybody.gather(began(config.out, launchers))[0]:  # torchrun goes on
        resume, overwrite = True, False

    def look() -> Plan:
        check_place(config.out, may_exist=resume or overwrite)
        return make_plan(config, meeting)

    plan = everybody.agree(look, must_be_same)
    config = plan.config
    folder = everybody.first_does(
        lambda: RunFolder(
            config.out, config.model_dump(mode="json"), resume=resume, overwrite=overwrite, free=FREE_TO_CHANGE
        )
    )
    with folder or Onlooker(config.out) as folder:
        folder.share(everybody.gather)
        if folder.done:
            report("note", {"text": f"the run in {folder.path} is done already"})
            return folder.record
        if everybody.size > 1:
            here = {"train": meeting.num_students, "teach": meeting.num_teachers}
            folder.update(status="started", launchers=launchers, processes=here)
        if meeting.teaches:
            return teach(plan, meeting)
        data: Documents | Store | None = plan.store
        if data is None:
            data = processes.in_turn(lambda: _prepare(config.data, plan, report))
        held_out: Documents | Store | None = plan.held_out_store
        if plan.held_out is not None and held_out is None:
            held_out = processes.in_turn(lambda: _prepare(plan.held_out, plan, report))  # pyright: ignore
        measured = needs_teacher(config.objectives) or config.held_out is not None or meeting.num_teachers > 0
        teacher = build_teacher(plan, meeting, data) if measured else None
        with leaving(teacher):
            return _distill(plan, meeting, roll, teacher, (data, held_out), folder, report)


def _distill(
    plan: Plan,
    meeting: Meeting,
    roll: Roll,
    teacher: AnyTeacher | None,
    texts: tuple[Documents | Store, Documents | Store | None],
    folder: RunFolder | Onlooker,
    report: Report,
) -> dict[str, Any]:
    config, processes, (data, held_out) = plan.config, meeting.mine, texts
    student, specs = build_pair(
        plan, teacher, data, folder.path, lambda text: report("note", {"text": text}), processes
    )
    facts = _facts(plan, student, teacher, data, held_out)
    processes.agree(lambda: facts, lambda facts: {f"files ({name})": fact for name, fact in facts.items()})
    processes.first_does(lambda: _check_same_things(folder, facts))
    folder.update(status="started", **facts)

    stream = build_stream(
        plan, data, config.data, tokens=config.batch.tokens, epochs=config.epochs, processes=processes
    )
    num_steps = config.steps or stream.num_steps()
    assert num_steps is not None  # a config has either steps or epochs
    asked = asked_in_training(plan, teacher)
    state = build_state(plan, student, specs, ReadAhead(stream, asked), num_steps, processes)
    checkpoints = Checkpoints(
        folder.path / "checkpoints",
        keep=config.checkpoints.keep,
        processes=processes,
        background=config.checkpoints.background is True,
    )
    if (latest := processes.gather(checkpoints.latest())[0]) is not None:
        checkpoints.load(state, latest)
        report("note", {"text": f"resumed after step {state.step} of {num_steps}, from {latest}"})
    elif any(spec.measures_first for spec in specs):
        begin = state.stream.state()
        fit_to(state, specs, asked, next(state.stream))
        state.stream.restore(begin)  # the first step is made as if nobody had seen it
    _train(plan, state, num_steps, (asked, teacher), held_out, checkpoints, (folder, roll), report)

    results = _results(state)
    if config.checkpoints.best and state.best:
        checkpoints.load(state, checkpoints.at(int(state.best["step"])))
        report("note", {"text": f"exporting the best step, {state.step}"})
        results |= {"exported_step": state.step, "held_out": state.held_out}
    report("note", {"text": f"writing {folder.path / 'model'}"})
    student.save(folder.path / "model", plan.tokenizer, processes)
    folder.update(status="done", **results)
    return folder.record


def _check_same_things(folder: RunFolder | Onlooker, facts: Mapping[str, dict[str, Any]]) -> None:
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


def _prepare(data: AnyData | StoredData, plan: Plan, report: Report) -> Documents:
    assert not isinstance(data, StoredData)  # its documents are the store's
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
    plan: Plan,
    state: TrainState,
    num_steps: int,
    teachers: tuple[AnyTeacher | None, AnyTeacher | None],
    held_out: DocumentSet | None,
    checkpoints: Checkpoints,
    place: tuple[RunFolder | Onlooker, Roll],
    report: Report,
) -> None:
    """The loop, with its metrics written to metrics.jsonl and to the trackers.

    Args:
        teachers: the one that training asks, and the one that measuring does.
        place: the run's folder, and where each step is noted.
    """
    config = plan.config
    (asked, teacher), (folder, roll) = teachers, place
    measure = None
    if held_out is not None and plan.held_out is not None:
        judge = teacher
        if plan.held_out_store is not None and isinstance(teacher, StoredTeacher):
            judge = StoredTeacher(plan.held_out_store, teacher.layers)
        if isinstance(teacher, ServedTeacher):
            judge = teacher.of(held_out)
        measure = partial(_measure, plan, state, judge, held_out, plan.held_out)
    first = state.processes.first
    metrics = Metrics(folder.path / "metrics.jsonl", after=state.step) if first else None
    tracker = track(config.tracking if first else (), folder.path, folder.record["config"], after=state.step)

    def record(values: dict[str, Any]) -> None:
        roll.at(f"step {values['step']}")
        if metrics is None:
            return
        metrics.append(values)
        flat = {"train": values} if "held_out" not in values else {"held_out": values["held_out"]}
        tracker.log({f"{kind}/{k}": v for kind, pairs in flat.items() for k, v in pairs.items()}, values["step"])

    try:
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
    except BaseException as error:
        status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        with suppress(OSError):  # what went wrong is told by the error that is under way
            folder.update(status=status, **_results(state))
        raise
    finally:
        state.stream.close()
        if metrics is not None:
            metrics.close()
        tracker.close()


def _measure_before(
    measure: Measure, folder: RunFolder | Onlooker, record: Callable[[dict[str, Any]], None], report: Report
) -> None:
    """What a student that starts as a part of its teacher can do before it is trained."""
    if (measured := measure(lambda: False)) is not None:
        record({"step": 0, "held_out": measured})
        report("held_out", {"step": 0, **measured})
        folder.update(held_out_before=measured)


def _now(configs: Sequence[ObjectiveConfig], progress: float) -> Scheduled:
    return build_objectives(configs, progress), hidden_weights(configs, progress)


def _measure(
    plan: Plan,
    state: TrainState,
    teacher: AnyTeacher | None,
    documents: DocumentSet,
    data: AnyData | StoredData,
    stop: Callable[[], bool],
) -> dict[str, float] | None:
    assert plan.config.batch.micro_tokens != "auto"
    tokens = plan.config.batch.micro_tokens * state.processes.size
    steps = build_stream(plan, documents, data, tokens=tokens, epochs=1, processes=state.processes)
    return measure_held_out(state.module, teacher, steps, plan.config.device, stop, state.processes)


def _facts(
    plan: Plan,
    student: Student,
    teacher: AnyTeacher | None,
    data: Documents | Store,
    held_out: Documents | Store | None,
) -> dict[str, Any]:
    """What run.json says of the things that went in."""
    config = plan.config
    facts: dict[str, dict[str, Any]] = {
        "tokenizer": {"fingerprint": fingerprint(plan.tokenizer)},
        "student": {
            "num_parameters": models.num_parameters(student.model),
            "num_trained": models.num_parameters(student.model, trained_only=True),
        },
        "data": {"fingerprint": data.fingerprint, **data.counts},
    }
    if student.cut is not None:
        facts["student"]["cut"] = {"from": student.cut.teacher, "layers": list(student.cut.layers)}
    if config.student.model is not None:
        facts["student"]["fingerprint"] = models.fingerprint(config.student.model, student.model.config)
    if plan.template is not None:
        facts["template"] = {"fingerprint": template_fingerprint(plan.template)}
    if held_out is not None:
        facts["held_out_data"] = {"fingerprint": held_out.fingerprint, **held_out.counts}
    if plan.store is not None:
        facts["teacher"] = {"fingerprint": plan.store.manifest.teacher.fingerprint}
        facts["store"] = {"fingerprint": plan.store.fingerprint}
    elif not isinstance(config.teacher, StoreTeacher | None) and plan.teacher_config is not None:
        facts["teacher"] = {"fingerprint": models.fingerprint(config.teacher.model, plan.teacher_config)}
        if isinstance(teacher, LiveTeacher):
            facts["teacher"]["num_parameters"] = models.num_parameters(teacher.model)
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

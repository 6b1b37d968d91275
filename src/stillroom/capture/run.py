"""`stillroom capture`: teacher + text -> store."""

import hashlib
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from stillroom.capture.answers import answered, prompts
from stillroom.capture.config import DECIDES_ANSWERS, FREE_TO_CHANGE, CaptureConfig, Generate, Part, Transformers
from stillroom.capture.hidden import size_text, window_documents
from stillroom.capture.model import CapturedSignal, ModelTeacher
from stillroom.capture.plan import CapturePlan, make_plan
from stillroom.capture.windows import Document, windows
from stillroom.capture.workers import check_shared, named, part_of, part_range, worker_share
from stillroom.data.dataset import Documents, prepare
from stillroom.errors import OutOfMemoryError
from stillroom.models import loading
from stillroom.models.hidden_states import verify
from stillroom.runs import RunFolder, check_place, deferred_interrupts, ended, redact, versions
from stillroom.store.config import TopK, TopP, side_columns
from stillroom.store.format import TOKENIZER, Manifest, SourceInfo, format_of
from stillroom.store.quantize import hidden_bytes_per_position
from stillroom.store.writer import StoreWriter
from stillroom.tokenizers import fingerprint, template_fingerprint

if TYPE_CHECKING:
    from stillroom.capture.server import ServerCaptureTeacher

Report = Callable[[str, Mapping[str, Any]], None]


def run(
    config: CaptureConfig, *, resume: bool = False, overwrite: bool = False, report: Report = lambda *_: None
) -> dict[str, Any]:
    """Asks the teacher, and writes ``out/store``, or that of its part in ``out``; returns what run.json says.

    Args:
        resume: go on with the capture in ``out``, from its last whole shard; begin it where there is none.
        overwrite: delete what is in ``out`` first.
        report: is told of what is done, for a progress line.

    Raises:
        StillroomError: something that the user can mend; what was written before is whole.
        KeyboardInterrupt: Ctrl-C; what was captured so far is in the store.
    """
    part = part_of(config)
    with named(part):
        return _run(config, part, resume, overwrite, report if part is None else _named(report, part))


def _named(report: Report, part: Part) -> Report:
    return lambda event, values: report(event, {**values, "part": str(part)})


def _run(config: CaptureConfig, part: Part | None, resume: bool, overwrite: bool, report: Report) -> dict[str, Any]:
    check_shared(config.out, part)
    place = Path(config.out) if part is None else Path(config.out, part.folder)
    check_place(place, may_exist=resume or overwrite)
    plan = make_plan(config)
    config = plan.config
    settings = config.model_dump(mode="json")
    free = [name for name in FREE_TO_CHANGE if config.generate is None or name not in DECIDES_ANSWERS]
    folder = RunFolder(place, settings, resume=resume, overwrite=overwrite, free=free)
    with folder:
        if folder.done:
            report("note", {"text": f"the capture in {folder.path} is done already"})
            return folder.record
        documents = prepare(
            config.data,
            plan.tokenizer,
            template=plan.template,
            report=lambda rows: report("tokenise", {"rows": rows, "path": config.data.path}),
        )
        teacher = _teacher(plan)
        manifest = _manifest(plan, documents)
        facts = {
            "teacher": {"fingerprint": manifest.teacher.fingerprint},
            "tokenizer": {"fingerprint": manifest.tokenizer.fingerprint},
            "data": {"fingerprint": documents.fingerprint, **documents.counts},
        }
        folder.update(status="started", **facts)
        if config.hidden is not None:
            will = worker_share(config, documents, plan.teacher_config)
            text = size_text(config, plan.teacher_config, (will.documents, will.positions))
            report("note", {"text": f"hidden states: {text}"})
        store = folder.path / "store"
        with StoreWriter(store, manifest, shard_positions=config.shard_positions) as writer:
            plan.tokenizer.save_pretrained(store / TOKENIZER)
            spent = _Spent(folder.record, teacher)
            try:
                _capture(plan, documents, teacher, writer, report)
            except BaseException as error:
                status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
                with suppress(OSError):  # what went wrong is told by the error that is under way
                    folder.update(status=status, **spent.so_far())
                raise
            results = _results(writer.manifest)
            folder.update(status="done", **results, **spent.so_far())
        return folder.record


def _teacher(plan: CapturePlan) -> "ModelTeacher | ServerCaptureTeacher":
    config, teacher = plan.config, plan.config.teacher
    engine, signal, columns = teacher.engine, config.signal, teacher.columns
    assert columns != "auto"
    if not isinstance(engine, Transformers):
        assert isinstance(signal, TopK | TopP)  # the config demands it
        from stillroom.capture.server import ServerCaptureTeacher

        asked = ServerCaptureTeacher(teacher.model, engine, signal, plan.tokenizer, columns=columns, seed=config.seed)
        asked.engine.check()
        return asked
    model = loading.load_model(
        teacher.model,
        dtype=getattr(torch, engine.dtype),
        device=engine.device,
        attention=None if engine.attention == "auto" else engine.attention,
        revision=teacher.revision,
        trust_remote_code=teacher.trust_remote_code,
        quantization=engine.quantization,
    )
    verify(model, "the teacher", pack=config.data.pack)
    pad = plan.tokenizer.pad_token_id
    return ModelTeacher(
        model,
        engine,
        signal,
        columns=columns,
        length=config.data.length,
        pack=config.data.pack,
        seed=config.seed,
        pad_token=pad if isinstance(pad, int) else 0,
        hidden=config.hidden,
    )


def _manifest(plan: CapturePlan, documents: Documents) -> Manifest:
    """What the store is to be."""
    config, teacher = plan.config, plan.config.teacher
    assert teacher.columns != "auto"
    if plan.teacher_config is not None:
        print_of_teacher = loading.fingerprint(teacher.model, plan.teacher_config)
    else:
        print_of_teacher = f"served as {teacher.model}"
    print_of_data = documents.fingerprint
    if config.generate is not None:
        asked = f"{print_of_data} {config.generate.model_dump_json()} {print_of_teacher} {config.seed}"
        print_of_data = hashlib.sha256(asked.encode()).hexdigest()[:32]
    text = None if config.hidden is None or plan.teacher_config is None else plan.teacher_config.get_text_config()
    return Manifest(
        format=format_of(config.hidden),
        complete=False,
        teacher=SourceInfo(name=teacher.model, fingerprint=print_of_teacher),
        engine=teacher.engine.kind,
        tokenizer=SourceInfo(name=teacher.tokenizer or teacher.model, fingerprint=fingerprint(plan.tokenizer)),
        template=template_fingerprint(plan.template),
        data=SourceInfo(name=redact(config.data.path), fingerprint=print_of_data),
        part=(config.part.index, config.part.of) if isinstance(config.part, Part) else (0, 1),
        num_columns=teacher.columns,
        length=config.data.length,
        signal=config.signal,
        side=tuple(side_columns(config.signal)),
        seed=config.seed,
        versions=versions(),
        hidden=config.hidden,
        hidden_width=0 if text is None else text.hidden_size,
        num_layers=0 if text is None else text.num_hidden_layers,
    )


def _capture(
    plan: CapturePlan,
    documents: Documents,
    teacher: "ModelTeacher | ServerCaptureTeacher",
    writer: StoreWriter,
    report: Report,
) -> None:
    """Window by window; what one says is put away by a thread of its own while the teacher reads the next."""
    config = plan.config
    first, stop = part_range(config, documents, plan.teacher_config)
    answers = 1 if config.generate is None else config.generate.answers
    done, tokens, start = writer.num_documents, 0, time.monotonic()
    before = done
    if done:
        report("note", {"text": f"resumed after {done} documents, which are in whole shards"})
    size = window_documents(config, plan.teacher_config)
    first_window = first + done // answers // size * size
    skip = done - (first_window - first) * answers
    asked = "finishing these documents, then saving; press Ctrl-C again to stop at once, without saving"
    with (
        ThreadPoolExecutor(1) as later,
        deferred_interrupts(lambda: report("note", {"text": asked})) as interrupted,
    ):
        pending: deque[Future[None]] = deque()
        for window in windows(documents, first_window, stop, size):
            wanted = _written(window, teacher, config.generate, config.data.length)
            if not isinstance(teacher, ModelTeacher):  # which would say something else in another batch
                wanted, skip = wanted[skip:], 0
            with _enough_memory(config):
                said = teacher.say(wanted)[skip:]
            wanted, skip = wanted[skip:], 0
            pending.append(later.submit(_put_away, writer, wanted, said))
            done, tokens = done + len(wanted), tokens + sum(len(document.tokens) for document in wanted)
            while len(pending) > 2 or (pending and pending[0].done()):
                pending.popleft().result()
            seconds = time.monotonic() - start
            values = {"first": before, "done": done, "total": (stop - first) * answers, "time_s": seconds}
            report("capture", {**values, "tokens_per_s": tokens / seconds, **_usage(teacher)})
            if interrupted():
                break
        for future in pending:
            future.result()
        if interrupted():
            writer.flush()
            whose = f"{config.part}: " if isinstance(config.part, Part) else ""
            raise ended(
                interrupted.number,
                f"{whose}interrupted after {writer.num_documents} of {(stop - first) * answers} documents, saved",
            )
        writer.finish()


def _written(
    window: list[Document], teacher: "ModelTeacher | ServerCaptureTeacher", generate: Generate | None, length: int
) -> list[Document]:
    """The documents to ask about: those of the data, or what the teacher answers to them."""
    if generate is None:
        return window
    asked = prompts(window, generate, length)
    return answered(asked, teacher.answer(asked, generate), generate)


def _put_away(writer: StoreWriter, documents: Sequence[Document], said: Sequence[CapturedSignal]) -> None:
    for document, (signal, error, hidden) in zip(documents, said, strict=True):
        writer.add(document.number, document.tokens, document.loss_mask, signal, error, hidden)


@contextmanager
def _enough_memory(config: CaptureConfig) -> Iterator[None]:
    """Turns a device's running out of memory into an error of the user's."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        engine = config.teacher.engine
        assert isinstance(engine, Transformers)  # a server has its own memory
        raise OutOfMemoryError(
            "the device has too little memory for a batch",
            {"teacher.engine.batch_tokens": engine.batch_tokens, "device": str(error).split(". ")[0][:160]},
            why="What is in whole shards is kept.",
            fix="Lower teacher.engine.batch_tokens or teacher.engine.logits_bytes, and go on with --resume.",
        ) from error


def _usage(teacher: "ModelTeacher | ServerCaptureTeacher") -> dict[str, Any]:
    """What a server was asked so far."""
    if isinstance(teacher, ModelTeacher):
        return {}
    usage = teacher.engine.usage
    return {
        "requests": usage.requests,
        "retries": usage.retries,
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "cost": teacher.cost,
    }


class _Spent:
    """The time that a capture took and what a server was asked, with what was spent before it was interrupted."""

    def __init__(self, record: Mapping[str, Any], teacher: "ModelTeacher | ServerCaptureTeacher") -> None:
        self.teacher, self.start = teacher, time.monotonic()
        self.time_s, self.usage = record.get("time_s", 0.0), record.get("usage", {})

    def so_far(self) -> dict[str, Any]:
        usage = {name: number + self.usage.get(name, 0) for name, number in _usage(self.teacher).items()}
        spent: dict[str, Any] = {"time_s": round(self.time_s + time.monotonic() - self.start, 3)}
        return {**spent, "usage": usage} if usage else spent


def _results(manifest: Manifest) -> dict[str, Any]:
    config = manifest.hidden
    hidden = (
        {}
        if config is None
        else {"hidden_bytes_per_position": hidden_bytes_per_position(config, manifest.hidden_width)}
    )
    return {
        "store": {
            "fingerprint": manifest.fingerprint,
            "documents": manifest.documents,
            "positions": manifest.positions,
            "size_bytes": manifest.size_bytes,
            "bytes_per_position": round(manifest.size_bytes / max(1, manifest.positions), 3),
            **hidden,
            "entries_per_position": round((manifest.entries + manifest.draws) / max(1, manifest.positions), 3),
            "codec_error_nats": manifest.codec_error_nats,
        }
    }

"""`stillroom capture`: teacher + text -> store."""

import time
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from stillroom.capture.config import (
    DECIDES_ANSWERS,
    FREE_TO_CHANGE,
    CaptureConfig,
    Generate,
    TeacherConfig,
    Transformers,
)
from stillroom.capture.parts import check_shared, named, part_of, part_range
from stillroom.capture.plan import make_plan
from stillroom.capture.signals import CapturedSignal, Document, SignalCapture, answered, prompts, windows
from stillroom.data.chat_templates import NEVER_STOPS, end_of_turn, learns_to_stop
from stillroom.data.config import AnyData
from stillroom.data.dataset import Documents, prepare
from stillroom.errors import OutOfMemoryError
from stillroom.models import loading
from stillroom.models.generation import Stops, end_tokens, own_stops
from stillroom.models.hidden_states import verify
from stillroom.runs import RunFolder, check_place, deferred_interrupts, ended
from stillroom.store.config import AnySignal, HiddenStatesConfig, TopK, TopP
from stillroom.store.format import TOKENIZER, Manifest
from stillroom.store.quantize import hidden_bytes_per_position
from stillroom.store.writer import StoreWriter
from stillroom.teachers.base import ServerTeacher
from stillroom.teachers.config import ServerTeacherConfig
from stillroom.teachers.live import LiveTeacher
from stillroom.verbs import Report, recorded


def run(
    config: CaptureConfig, *, resume: bool = False, overwrite: bool = False, report: Report = lambda *_: None
) -> dict[str, Any]:
    """Runs the teacher, and writes ``out/store``, or that of its part in ``out``; returns what run.json holds.

    Args:
        resume: go on with the capture in ``out``, from its last whole shard; begin it where there is none.
        overwrite: delete what is in ``out`` first.
        report: is called with what is done, for a progress line.

    Raises:
        StillroomError: something that the user can mend; what was written before is whole.
        KeyboardInterrupt: Ctrl-C; what was captured so far is in the store.
    """
    part = part_of(config.part)

    def told(event: str, values: Mapping[str, Any]) -> None:
        report(event, values if part is None else {**values, "part": str(part)})

    def tokenized(rows: int) -> None:
        told("tokenise", {"rows": rows, "path": config.data.path})

    with named(part):
        check_shared(config.out, part)
        place = Path(config.out) if part is None else Path(config.out, part.folder)
        check_place(place, may_exist=resume or overwrite)
        plan = make_plan(config)
        config, generate, engine = plan.config, plan.config.generate, plan.config.teacher.engine
        free = [name for name in FREE_TO_CHANGE if generate is None or name not in DECIDES_ANSWERS]
        with RunFolder(place, config.model_dump(mode="json"), resume=resume, overwrite=overwrite, free=free) as folder:
            if folder.done:
                told("note", {"text": f"the capture in {folder.path} is done already"})
                return folder.record
            documents = prepare(config.data, plan.tokenizer, template=plan.template, report=tokenized)
            capture = build_capture(
                config.teacher,
                plan.tokenizer,
                config.data,
                config.signal,
                seed=config.seed,
                vocab_size=plan.vocab_size,
                hidden=config.hidden,
                template=plan.template,
            )
            manifest = plan.manifest(documents.fingerprint)
            folder.update(
                status="started",
                teacher={"fingerprint": manifest.teacher.fingerprint},
                tokenizer={"fingerprint": manifest.tokenizer.fingerprint},
                data={"fingerprint": documents.fingerprint, **documents.counts},
            )
            if learns_to_stop(plan.tokenizer, plan.template) is False:
                told("note", {"text": f"warning: {NEVER_STOPS}"})
            if config.hidden is not None:
                told("note", {"text": f"hidden states: {plan.hidden_text(plan.share(documents))}"})
            prices = (0.0, 0.0) if isinstance(engine, Transformers) else (engine.prompt_price, engine.completion_price)
            store, spent = folder.path / "store", _Spent(folder.record, capture.teacher, prices)
            with StoreWriter(store, manifest, shard_positions=config.shard_positions) as writer:
                plan.tokenizer.save_pretrained(store / TOKENIZER)
                with recorded(folder, spent.so_far):
                    first, stop = part_range(part, documents, plan.window, generate)
                    _capture(capture, documents, range(first, stop), plan.window, generate, writer, spent, told)
                folder.update(status="done", **_results(writer.manifest), **spent.so_far())
            return folder.record


def build_capture(
    teacher: TeacherConfig,
    tokenizer: PreTrainedTokenizerBase,
    data: AnyData,
    signal: AnySignal,
    *,
    seed: int,
    vocab_size: int,
    hidden: HiddenStatesConfig | None,
    template: str | None = None,
) -> SignalCapture:
    """Loads the teacher, or finds its server, and gives it what to capture.

    Args:
        teacher: with every "auto" resolved.
        template: the chat template, whose end of turn ends an answer.
    """
    engine, given = teacher.engine, {}
    if isinstance(engine, Transformers):
        model = loading.load_model(
            teacher.model,
            dtype=getattr(torch, engine.dtype),
            device=engine.device,
            attention=None if engine.attention == "auto" else engine.attention,
            revision=teacher.revision,
            trust_remote_code=teacher.trust_remote_code,
            quantization=engine.quantization,
        )
        verify(model, "the teacher", pack=data.pack)
        asked = LiveTeacher(model, () if hidden is None else hidden.layers)
        given = engine.model_dump(include={"batch_tokens", "logits_bytes"})
        given["ends"] = end_tokens(model, tokenizer, end_of_turn(tokenizer, template))
        given["stops"] = Stops(own_stops(model), tokenizer)
    else:
        assert isinstance(signal, TopK | TopP)  # the config demands it
        server = ServerTeacherConfig(
            kind="server",
            model=teacher.model,
            dialect=engine.kind,
            top=signal.k if isinstance(signal, TopK) else signal.most,
            **engine.model_dump(include={"url", "concurrency", "retries", "timeout_s", "key_variable"}),
        )
        asked = ServerTeacher(server, tokenizer, None, vocab_size)
        asked.engine.check()
    pad = tokenizer.pad_token_id
    return SignalCapture(
        asked,
        signal,
        vocab_size=vocab_size,
        seed=seed,
        length=data.length,
        pack=data.pack,
        pad_token=pad if isinstance(pad, int) else 0,
        hidden=hidden,
        **given,
    )


def _capture(
    capture: SignalCapture,
    documents: Documents,
    taken: range,
    size: int,
    generate: Generate | None,
    writer: StoreWriter,
    spent: "_Spent",
    report: Report,
) -> None:
    """Goes through the documents in windows of ``size``; a thread of its own writes one while the teacher reads one."""
    num_answers = 1 if generate is None else generate.answers
    total = len(taken) * num_answers
    done = before = writer.num_documents
    tokens, start = 0, time.monotonic()
    if done:
        report("note", {"text": f"resumed after {done} documents, which are in whole shards"})
    first_window = taken.start + done // num_answers // size * size
    skip = done - (first_window - taken.start) * num_answers
    saving = "finishing these documents, then saving; press Ctrl-C again to stop at once, without saving"

    def write(window: list[Document], captured: list[CapturedSignal]) -> None:
        for document, (signal, error, hidden) in zip(window, captured, strict=True):
            writer.add(document.number, document.tokens, document.loss_mask, signal, error, hidden)

    with ThreadPoolExecutor(1) as later, deferred_interrupts(lambda: report("note", {"text": saving})) as interrupted:
        pending: deque[Future[None]] = deque()
        for window in windows(documents, first_window, taken.stop, size):
            if generate is not None:
                asked = prompts(window, generate, capture.length)
                window = answered(asked, capture.answers(asked, generate), generate)
            if isinstance(capture.teacher, ServerTeacher):  # a live one's output would differ in another batch
                window, skip = window[skip:], 0
            try:
                captured = capture.capture(window)[skip:]
            except torch.OutOfMemoryError as error:
                raise OutOfMemoryError(
                    "the device has too little memory for a batch",
                    {"teacher.engine.batch_tokens": capture.batch_tokens, "device": str(error).split(". ")[0][:160]},
                    why="What is in whole shards is kept.",
                    fix="Lower teacher.engine.batch_tokens or teacher.engine.logits_bytes, and go on with --resume.",
                ) from error
            window, skip = window[skip:], 0
            pending.append(later.submit(write, window, captured))
            done, tokens = done + len(window), tokens + sum(len(document.tokens) for document in window)
            while len(pending) > 2 or (pending and pending[0].done()):
                pending.popleft().result()
            seconds = time.monotonic() - start
            values = {"first": before, "done": done, "total": total, "time_s": seconds}
            report("capture", {**values, "tokens_per_s": tokens / seconds, **spent.usage()})
            if interrupted():
                break
        for future in pending:
            future.result()
        if interrupted():
            writer.flush()
            raise ended(interrupted.number, f"interrupted after {writer.num_documents} of {total} documents, saved")
        writer.finish()


class _Spent:
    """The time and the server's usage of a capture, with what was spent before it was interrupted.

    Args:
        prices: of a million tokens read and written.
    """

    def __init__(
        self, record: Mapping[str, Any], teacher: LiveTeacher | ServerTeacher, prices: tuple[float, float]
    ) -> None:
        self.teacher, self.prices, self.start = teacher, prices, time.monotonic()
        self.time_s, self.before = record.get("time_s", 0.0), record.get("usage", {})

    def usage(self) -> dict[str, Any]:
        """Returns what a server was asked in this run; nothing for a live teacher."""
        if isinstance(self.teacher, LiveTeacher):
            return {}
        usage, (prompt_price, completion_price) = self.teacher.engine.usage, self.prices
        cost = (usage.prompt_tokens * prompt_price + usage.completion_tokens * completion_price) / 1e6
        return {**vars(usage), "cost": cost}

    def so_far(self) -> dict[str, Any]:
        usage = {name: number + self.before.get(name, 0) for name, number in self.usage().items()}
        spent: dict[str, Any] = {"time_s": round(self.time_s + time.monotonic() - self.start, 3)}
        return {**spent, "usage": usage} if usage else spent


def _results(manifest: Manifest) -> dict[str, Any]:
    hidden = {}
    if (config := manifest.hidden) is not None:
        hidden["hidden_bytes_per_position"] = hidden_bytes_per_position(config, manifest.hidden_width)
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

"""The plan of a capture: every "auto" resolved, everything checked that headers tell. Writes nothing."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from stillroom.capture.config import CaptureConfig, Part, TeacherConfig, Transformers
from stillroom.capture.estimate import LOGITS_BYTES, costs, kinds
from stillroom.capture.parts import own_device, part_of, part_range
from stillroom.capture.signals import window_documents
from stillroom.config import BATCH_TOKENS, format_setting, is_local, replace
from stillroom.data.config import cache_folder
from stillroom.data.dataset import Documents, prepared
from stillroom.data.formats import needs_template
from stillroom.data.sources import open_source
from stillroom.errors import ConfigError
from stillroom.estimates.headers import Headers
from stillroom.estimates.report import bytes_text
from stillroom.layers import check_layers
from stillroom.models import loading
from stillroom.models.quantization import check_quantizable
from stillroom.runs import check_outside, redact, versions
from stillroom.store.config import side_columns
from stillroom.store.format import PROMISE, TOKENIZER, Manifest, SourceInfo, format_of, write_manifest
from stillroom.store.quantize import hidden_bytes_per_position
from stillroom.tokenizers import (
    compare,
    fingerprint,
    has_tokenizer,
    load_tokenizer,
    required_vocab_size,
    template_fingerprint,
)
from stillroom.verbs import (
    VerbPlan,
    check_row,
    check_vocabulary,
    costs_on,
    files_of,
    has_bfloat16,
    required_template,
    tokenized_file,
)


class WorkerShare(NamedTuple):
    """The data that a capture reads and stores."""

    first: int
    """The first document of the data."""
    stop: int
    """Their end."""
    documents: int
    """Documents that will be stored."""
    tokens: int
    """Tokens of the data that are read."""
    positions: int
    """Positions that will be stored; where the teacher writes them, at most."""


@dataclass(frozen=True)
class CapturePlan(VerbPlan[CaptureConfig]):
    tokenizer: PreTrainedTokenizerBase
    template: str | None
    """The chat template that rows go through, where they do."""
    teacher_config: PretrainedConfig | None
    """None for a server."""
    vocab_size: int
    """The columns of the teacher's head that make up its distribution."""

    @property
    def out(self) -> str:
        return str(self.config.folder)

    @property
    def hidden_bytes(self) -> int:
        """The size of the hidden states of one position, exactly; 0 where none are kept."""
        hidden, teacher = self.config.hidden, self.teacher_config
        if hidden is None or teacher is None:
            return 0
        return hidden_bytes_per_position(hidden, teacher.get_text_config().hidden_size)

    @property
    def window(self) -> int:
        """The number of documents that the teacher reads together."""
        return window_documents(self.config.data.length, self.config.generate, self.hidden_bytes)

    @cached_property
    def documents(self) -> Documents | None:
        """The data, where they are tokenized already."""
        data = self.config.data
        return prepared(data, self.tokenizer, template=self.template) if is_local(data.path) else None

    @cached_property
    def _share(self) -> WorkerShare | None:
        return None if self.documents is None else self.share(self.documents)

    def share(self, documents: Documents) -> WorkerShare:
        """Returns what of the data this run reads and stores."""
        generate = self.config.generate
        first, stop = part_range(part_of(self.config.part), documents, self.window, generate)
        count, tokens = stop - first, int(documents.lengths[first:stop].sum())
        if generate is not None:
            count *= generate.answers
            positions = count * generate.max_tokens
        elif count == len(documents):
            positions = documents.counts["tokens_learnt"]
        else:
            positions = sum(int(documents.target_mask(i)[1:].sum()) for i in range(first, stop))
        return WorkerShare(first, stop, count, tokens, positions)

    def hidden_text(self, share: WorkerShare | None) -> str | None:
        """Returns the size of a share's hidden states in words; None where none are kept."""
        if (hidden := self.config.hidden) is None:
            return None
        layers, each = ", ".join(map(str, hidden.layers)), self.hidden_bytes
        text = f"layers {layers} in {hidden.format}, {each:,} bytes a position"
        if share is None:
            return f"{text}; in all: not known before the data are tokenized"
        most = "" if self.config.generate is None else "at most "
        size = f"{share.positions * each:,} bytes ({share.positions * each / 2**20:,.1f} MiB)"
        return f"{text}; {share.documents:,} documents, {most}{share.positions:,} positions: {most}{size}"

    def promise(self, folder: Path) -> None:
        if isinstance(self.config.part, Part):  # what others read is the joined store
            return
        config, found = self.config.data, self.documents
        data = (
            hashlib.sha256(config.model_dump_json().encode()).hexdigest()[:32] if found is None else found.fingerprint
        )
        store = folder / "store"
        self.tokenizer.save_pretrained(store / TOKENIZER)
        write_manifest(store, self.manifest(data).model_copy(update={"engine": PROMISE, "complete": True}))

    def manifest(self, data: str) -> Manifest:
        """Returns the manifest of the store, with no shards yet; ``data`` is the fingerprint of the documents."""
        config, teacher = self.config, self.config.teacher
        print_of_teacher, text = f"served as {teacher.model}", None
        if self.teacher_config is not None:
            print_of_teacher = loading.fingerprint(teacher.model, self.teacher_config)
            text = None if config.hidden is None else self.teacher_config.get_text_config()
        print_of_data = data
        if config.generate is not None:
            asked = f"{print_of_data} {config.generate.model_dump_json()} {print_of_teacher} {config.seed}"
            print_of_data = hashlib.sha256(asked.encode()).hexdigest()[:32]
        return Manifest(
            format=format_of(config.hidden),
            complete=False,
            teacher=SourceInfo(name=teacher.model, fingerprint=print_of_teacher),
            engine=teacher.engine.kind,
            tokenizer=SourceInfo(name=teacher.tokenizer or teacher.model, fingerprint=fingerprint(self.tokenizer)),
            template=template_fingerprint(self.template),
            data=SourceInfo(name=redact(config.data.path), fingerprint=print_of_data),
            part=(config.part.index, config.part.of) if isinstance(config.part, Part) else (0, 1),
            num_columns=self.vocab_size,
            length=config.data.length,
            signal=config.signal,
            side=tuple(side_columns(config.signal)),
            seed=config.seed,
            versions=versions(),
            hidden=config.hidden,
            hidden_width=0 if text is None else text.hidden_size,
            num_layers=0 if text is None else text.num_hidden_layers,
        )

    def details(self) -> dict[str, Any]:
        """Returns which part of the data this run captures, and how much that is; nothing where it takes all."""
        if not isinstance(part := self.config.part, Part):
            return {}
        if (found := self.documents) is None or (will := self._share) is None:
            return {"part": f"{part}, from 0: how much that is is not known before the data are tokenized"}
        most = "" if self.config.generate is None else "at most "
        there = (
            f", from {will.first:,} to {will.stop - 1:,}" if will.documents else ": there are fewer windows than parts"
        )
        config, teacher = self.config, self.teacher_config
        width = None if teacher is None else teacher.get_text_config().hidden_size
        each = sum(kind.bytes_per_position for kind in kinds(config.signal, self.vocab_size, config.hidden, width))
        shares = {
            "which": f"{part}, from 0",
            "documents": f"{will.stop - will.first:,} of {len(found):,}{there}",
            "tokens": f"{will.tokens:,} of {int(found.lengths.sum()):,}",
            "positions": f"{most}{will.positions:,}",
            "bytes": f"{most}{bytes_text(each * will.positions)}, at {each:,.1f} a position",
        }
        return {"part": shares}

    def costs(self) -> dict[str, Any] | str:
        engine = self.config.teacher.engine
        device = engine.device if isinstance(engine, Transformers) else "cpu"
        positions = None if self._share is None or self.config.generate is not None else self._share.positions
        headers = Headers.of({"teacher": self.teacher_config}, num_tokens=positions)
        return costs_on(device, lambda hardware: costs(self.config, headers, hardware))

    def reads(self) -> dict[str, str]:
        teacher = self.config.teacher
        where = teacher.model if isinstance(teacher.engine, Transformers) else redact(teacher.engine.url)
        found = {"teacher": where, "data": files_of(self.config.data)}
        return found if teacher.tokenizer is None else {**found, "tokenizer": teacher.tokenizer}

    def writes(self) -> dict[str, str]:
        data, out = self.config.data, self.config.folder
        cached = (
            tokenized_file(data, self.tokenizer, self.template) if is_local(data.path) else f"in {cache_folder(data)}"
        )
        found = {"tokenized data": cached, "run": str(out / "run.json"), "store": str(out / "store")}
        hidden = self.hidden_text(self._share)
        return found if hidden is None else {**found, "hidden states": hidden}


def make_plan(config: CaptureConfig) -> CapturePlan:
    """Resolves and checks a config from headers alone.

    Raises:
        MissingError: a model, a tokenizer, a data file or a device is not there.
        MismatchError: the tokenizer is not the teacher's own, or has tokens that the teacher has no column for; or
            hidden.layers names a layer that it does not have.
        ConfigError: settings contradict what the headers say.
    """
    part, teacher, engine, data = part_of(config.part), config.teacher, config.teacher.engine, config.data
    shown_length, remote_code = format_setting(config, "data.length"), teacher.trust_remote_code
    if isinstance(engine, Transformers):
        engine = _resolved(engine, data.length, shown_length)
    tokenizer = load_tokenizer(
        teacher.tokenizer or teacher.model,
        revision=teacher.revision if teacher.tokenizer is None else None,
        trust_remote_code=remote_code,
    )
    whose = teacher.tokenizer or f"the teacher's own, by default ({teacher.model})"
    needed, width, teacher_config = required_vocab_size(tokenizer), None, None
    if isinstance(engine, Transformers):
        teacher_config = loading.read_config(teacher.model, revision=teacher.revision, trust_remote_code=remote_code)
        if (kind := engine.quantization) is not None:
            check_quantizable(teacher_config, kind, "the teacher")
        text = teacher_config.get_text_config()
        width = text.vocab_size
        fix = "Use the tokenizer that the teacher was trained with."
        check_vocabulary(tokenizer, teacher_config, "the teacher", tokenizer_name=whose, fix=fix)
        _check_own(teacher, tokenizer)
        if config.hidden is not None:
            check_layers(config.hidden.layers, text.num_hidden_layers, "teacher", "hidden.layers")
        loading.check_length(data.length, teacher_config, "teacher", shown_length)
    columns = needed if teacher.columns == "auto" else teacher.columns
    if columns < needed or (width is not None and columns > width):
        raise ConfigError(
            f"teacher.columns={columns} cannot be kept",
            {"possible": f"{needed} (all tokens of the tokenizer) to {width or needed}", "asked for": columns},
            why="Each token must have a column, and each column must be the teacher's.",
            fix="Set teacher.columns=auto.",
        )
    template = required_template(tokenizer, data, tokenizer_name=whose) if needs_template(data) else None
    if is_local(data.path):
        open_source(data)  # which says where it is not there
    folder, cache = str(cache_folder(data)), "data.cache, by default," if data.cache == "auto" else "data.cache"
    paths = {"teacher.model": teacher.model, "teacher.tokenizer": teacher.tokenizer, "data.path": data.path}
    check_outside(config.out, {**paths, cache: folder})
    values = {"data.cache": folder, "teacher.columns": columns, "teacher.engine": engine.model_dump()}
    config = replace(config, {**values, "part": None if part is None else part.model_dump()})
    return CapturePlan(config, tokenizer, template, teacher_config, columns)


def _resolved(engine: Transformers, length: int, shown_length: object) -> Transformers:
    """The engine with every "auto" resolved, but for the attention kernel's."""
    device = loading.resolve_device(own_device(engine.device), "teacher.engine.device")
    values: dict[str, object] = {"device": device}
    if engine.dtype == "auto":
        values["dtype"] = "bfloat16" if has_bfloat16(device) else "float32"
    if engine.batch_tokens == "auto":
        values["batch_tokens"] = max(length, BATCH_TOKENS)
    else:
        check_row("teacher.engine.batch_tokens", engine.batch_tokens, length, shown_length)
    if engine.logits_bytes == "auto":
        values["logits_bytes"] = LOGITS_BYTES.get(torch.device(device).type, LOGITS_BYTES["cuda"])
    return engine.model_copy(update=values)


def _check_own(teacher: TeacherConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises MismatchError where the teacher has a tokenizer of its own that makes other ids than the one named."""
    if teacher.tokenizer is None or not has_tokenizer(teacher.model, revision=teacher.revision):
        return
    own = load_tokenizer(teacher.model, revision=teacher.revision, trust_remote_code=teacher.trust_remote_code)
    compare(
        tokenizer,
        own,
        ("teacher.tokenizer", "teacher's own"),
        roles=False,
        fix="Leave out teacher.tokenizer; it is for a teacher that comes without one, and for its own with another "
        "chat template or other special tokens.",
    )

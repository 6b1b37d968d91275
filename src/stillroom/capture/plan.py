"""The plan of a capture: every "auto" resolved, everything checked that headers tell. Writes nothing."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from stillroom.capture.config import CaptureConfig, Part, TeacherConfig, Transformers
from stillroom.capture.estimate import LOGITS_BYTES, costs, kinds
from stillroom.capture.windows import window_documents
from stillroom.capture.workers import WorkerShare, own_device, part_of, position_bytes, size_text, worker_share
from stillroom.config import BATCH_TOKENS, format_setting, is_local, replace
from stillroom.data.dataset import Documents, cache_folder, prepared
from stillroom.data.formats import needs_template
from stillroom.data.sources import open_source
from stillroom.errors import ConfigError
from stillroom.estimates.headers import Headers
from stillroom.estimates.report import bytes_text
from stillroom.layers import check_layers
from stillroom.models import loading
from stillroom.models.quantization import check_quantizable
from stillroom.runs import check_outside, redact
from stillroom.tokenizers import compare, has_tokenizer, load_tokenizer, required_vocab_size
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


@dataclass(frozen=True)
class CapturePlan(VerbPlan[CaptureConfig]):
    tokenizer: PreTrainedTokenizerBase
    template: str | None
    """The chat template that rows go through, where they do."""
    teacher_config: PretrainedConfig | None
    """None for a server."""
    vocab_size: int
    """The columns of the teacher's head that make up its distribution."""

    def details(self) -> dict[str, Any]:
        return {"part": self.part()} if isinstance(self.config.part, Part) else {}

    def part(self) -> dict[str, str] | str:
        """Returns which part of the data this run captures, and how much that is."""
        found, will = self._documents, self._share
        if found is None or will is None:
            return f"{self.config.part}, from 0: how much that is is not known before the data are tokenised"
        most = "at most " if self.config.generate is not None else ""
        which = (
            f", from {will.first:,} to {will.stop - 1:,}" if will.documents else ": there are fewer windows than parts"
        )
        shares = {
            "which": f"{self.config.part}, from 0",
            "documents": f"{will.stop - will.first:,} of {len(found):,}{which}",
            "tokens": f"{will.tokens:,} of {int(found.lengths.sum()):,}",
            "positions": f"{most}{will.positions:,}",
        }
        try:
            each = sum(kind.bytes_per_position for kind in kinds(self.config, self._known()))
        except ConfigError as error:
            return {**shares, "bytes": f"not told: {error.what}"}
        return {**shares, "bytes": f"{most}{bytes_text(each * will.positions)}, at {each:,.1f} a position"}

    def costs(self) -> dict[str, Any] | str:
        engine = self.config.teacher.engine
        device = engine.device if isinstance(engine, Transformers) else "cpu"
        return costs_on(device, lambda hardware: costs(self.config, self._known(), hardware))

    def _known(self) -> Headers:
        sure = self._share is not None and self.config.generate is None
        positions = self._share.positions if self._share is not None and sure else None
        return Headers.of({"teacher": self.teacher_config}, num_tokens=positions)

    @cached_property
    def _documents(self) -> Documents | None:
        """The data, where they are tokenised already."""
        data = self.config.data
        return prepared(data, self.tokenizer, template=self.template) if is_local(data.path) else None

    @cached_property
    def _share(self) -> WorkerShare | None:
        found, config = self._documents, self.config
        size = position_bytes(config.hidden, self.teacher_config)
        window = window_documents(config.data.length, config.generate, size)
        return None if found is None else worker_share(part_of(config.part), found, window, config.generate)

    def reads(self) -> dict[str, str]:
        teacher = self.config.teacher
        where = teacher.model if isinstance(teacher.engine, Transformers) else redact(teacher.engine.url)
        found = {"teacher": where, "data": files_of(self.config.data)}
        return found if teacher.tokenizer is None else {**found, "tokenizer": teacher.tokenizer}

    def writes(self) -> dict[str, str]:
        data, out = self.config.data, self.config.folder
        cached = f"in {cache_folder(data)}"
        if is_local(data.path):
            cached = tokenized_file(data, self.tokenizer, self.template)
        found = {"tokenised data": cached, "run": str(out / "run.json"), "store": str(out / "store")}
        if (hidden := self.config.hidden) is not None:
            will = self._share
            counts = None if will is None else (will.documents, will.positions)
            size, at_most = position_bytes(hidden, self.teacher_config), self.config.generate is not None
            found["hidden states"] = size_text(hidden, size, counts, at_most=at_most)
        return found

    @property
    def out(self) -> str:
        return str(self.config.folder)


def make_plan(config: CaptureConfig) -> CapturePlan:
    """Resolves and checks a config from headers alone.

    Raises:
        MissingError: a model, a tokenizer, a data file or a device is not there.
        MismatchError: the tokenizer is not the teacher's own, or has tokens that the teacher has no column for; or
            hidden.layers names a layer that it does not have.
        ConfigError: settings contradict what the headers say.
    """
    given, config = config, _resolve(config)
    teacher = config.teacher
    engine = teacher.engine
    remote_code = teacher.trust_remote_code
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
        width = teacher_config.get_text_config().vocab_size
        fix = "Use the tokenizer that the teacher was trained with."
        check_vocabulary(tokenizer, teacher_config, "the teacher", tokenizer_name=whose, fix=fix)
        _check_own(teacher, tokenizer)
        if config.hidden is not None:
            check_layers(
                config.hidden.layers, teacher_config.get_text_config().num_hidden_layers, "teacher", "hidden.layers"
            )
        loading.check_length(config.data.length, teacher_config, "teacher", format_setting(given, "data.length"))
    columns = needed if teacher.columns == "auto" else teacher.columns
    if columns < needed or (width is not None and columns > width):
        raise ConfigError(
            f"teacher.columns={columns} cannot be kept",
            {"possible": f"{needed} (all tokens of the tokenizer) to {width or needed}", "asked for": columns},
            why="Each token must have a column, and each column must be the teacher's.",
            fix="Set teacher.columns=auto.",
        )
    config = replace(config, {"teacher.columns": columns})
    template = required_template(tokenizer, config.data, tokenizer_name=whose) if needs_template(config.data) else None
    if is_local(config.data.path):
        open_source(config.data)  # which says where it is not there
    cache = "data.cache" if given.data.cache != "auto" else "data.cache, by default,"
    paths = {"teacher.model": teacher.model, "teacher.tokenizer": teacher.tokenizer, "data.path": config.data.path}
    check_outside(config.out, {**paths, cache: config.data.cache})
    return CapturePlan(config, tokenizer, template, teacher_config, columns)


def _resolve(config: CaptureConfig) -> CaptureConfig:
    import torch

    part = part_of(config.part)
    values: dict[str, object] = {
        "data.cache": str(cache_folder(config.data)),
        "part": None if part is None else part.model_dump(),
    }
    engine = config.teacher.engine
    if isinstance(engine, Transformers):
        device = loading.resolve_device(own_device(engine.device), "teacher.engine.device")
        kind = torch.device(device).type
        values["teacher.engine.device"] = device
        if engine.dtype == "auto":
            values["teacher.engine.dtype"] = "bfloat16" if has_bfloat16(device) else "float32"
        if engine.batch_tokens == "auto":
            values["teacher.engine.batch_tokens"] = max(config.data.length, BATCH_TOKENS)
        else:
            shown = format_setting(config, "data.length")
            check_row("teacher.engine.batch_tokens", engine.batch_tokens, config.data.length, shown)
        if engine.logits_bytes == "auto":
            values["teacher.engine.logits_bytes"] = LOGITS_BYTES.get(kind, LOGITS_BYTES["cuda"])
    return replace(config, values)


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

"""The plan of a capture: every "auto" resolved, everything checked that headers tell. Writes nothing."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from stillroom.capture.config import CaptureConfig, Part, TeacherConfig, Transformers
from stillroom.capture.costs import LOGITS_BYTES, CaptureHeaders, costs, kinds
from stillroom.capture.windows import window_documents
from stillroom.capture.workers import WorkerShare, own_device, part_of, position_bytes, size_text, worker_share
from stillroom.config import format_setting, is_local, replace
from stillroom.data.dataset import Documents, cache_folder, cache_path, prepared
from stillroom.data.formats import needs_template
from stillroom.data.sources import open_source
from stillroom.errors import ConfigError, MismatchError, MissingError
from stillroom.estimates.architecture import read_architecture
from stillroom.estimates.dry_run import costs_here
from stillroom.estimates.report import bytes_text
from stillroom.layers import check_layers
from stillroom.models import loading
from stillroom.models.quantization import check_quantizable
from stillroom.recipe import to_yaml
from stillroom.runs import check_outside, redact
from stillroom.tokenizers import compare, has_tokenizer, load_tokenizer, required_vocab_size, template_of


@dataclass(frozen=True)
class CapturePlan:
    config: CaptureConfig
    """With every "auto" resolved."""
    tokenizer: PreTrainedTokenizerBase
    template: str | None
    """The chat template that rows go through, where they do."""
    teacher_config: PretrainedConfig | None
    """None for a server."""

    def __str__(self) -> str:
        """The resolved settings, and what a run reads and writes, as YAML."""
        values = redact(self.config.model_dump(mode="json"))
        part = {"part": self.part()} if isinstance(self.config.part, Part) else {}
        return to_yaml(
            {"config": values, **part, "reads": self.reads(), "writes": self.writes(), "costs": self.costs()}
        )

    def part(self) -> dict[str, str] | str:
        """Which part of the data this run captures, and how much that is."""
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
        """Memory, arithmetic, time and storage on the device of the run; or why they are not told."""
        engine = self.config.teacher.engine
        device = engine.device if isinstance(engine, Transformers) else "cpu"
        return costs_here(
            loading.device_name(device), loading.device_memory(device),
            lambda hardware: costs(self.config, self._known(), hardware),
        )  # fmt: skip

    def _known(self) -> CaptureHeaders:
        teacher = None if self.teacher_config is None else self.teacher_config.to_dict()
        sure = self._share is not None and self.config.generate is None
        return CaptureHeaders(
            None if teacher is None else read_architecture(teacher, "the teacher"),
            self._share.positions if self._share is not None and sure else None,
        )

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
        """The models and files that a run reads, by what they are for."""
        teacher, data = self.config.teacher, self.config.data
        where = teacher.model if isinstance(teacher.engine, Transformers) else redact(teacher.engine.url)
        files = open_source(data).files if is_local(data.path) else []
        found = {"teacher": where, "data": ", ".join(map(str, files)) or f"{data.path} on the hub"}
        return found if teacher.tokenizer is None else {**found, "tokenizer": teacher.tokenizer}

    def writes(self) -> dict[str, str]:
        """The files that a run writes, by what they are."""
        data, out = self.config.data, self.config.folder
        cached = f"in {cache_folder(data)}"
        if is_local(data.path):
            path = cache_path(data, self.tokenizer, self.template)
            cached = f"{path} ({'there already' if path.exists() else 'new'})"
        found = {"tokenised data": cached, "run": str(out / "run.json"), "store": str(out / "store")}
        if (hidden := self.config.hidden) is not None:
            will = self._share
            counts = None if will is None else (will.documents, will.positions)
            size, at_most = position_bytes(hidden, self.teacher_config), self.config.generate is not None
            found["hidden states"] = size_text(hidden, size, counts, at_most=at_most)
        if out.exists():
            found["note"] = f"{out} exists: it needs --resume or --overwrite"
        return found


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
    needed, width, teacher_config = required_vocab_size(tokenizer), None, None
    if isinstance(engine, Transformers):
        teacher_config = loading.read_config(teacher.model, revision=teacher.revision, trust_remote_code=remote_code)
        if (kind := engine.quantization) is not None:
            check_quantizable(teacher_config, kind, "the teacher")
        width = teacher_config.get_text_config().vocab_size
        _check_width(needed, width, _whose(teacher))
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
    template = _template(config, tokenizer)
    if is_local(config.data.path):
        open_source(config.data)  # which says where it is not there
    _check_outside(config, "data.cache" if given.data.cache != "auto" else "data.cache, by default,")
    return CapturePlan(config, tokenizer, template, teacher_config)


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
        half = kind == "cuda" and torch.cuda.is_bf16_supported()
        values["teacher.engine.device"] = device
        if engine.dtype == "auto":
            values["teacher.engine.dtype"] = "bfloat16" if half else "float32"
        if engine.batch_tokens == "auto":
            values["teacher.engine.batch_tokens"] = max(config.data.length, 16384)
        elif engine.batch_tokens < config.data.length:
            raise ConfigError(
                "teacher.engine.batch_tokens is less than a row",
                {
                    "teacher.engine.batch_tokens": engine.batch_tokens,
                    "data.length": format_setting(config, "data.length"),
                },
                why="A row goes through the teacher whole.",
                fix=f"Set it to at least {config.data.length}.",
            )
        if engine.logits_bytes == "auto":
            values["teacher.engine.logits_bytes"] = LOGITS_BYTES.get(kind, LOGITS_BYTES["cuda"])
    return replace(config, values)


def _whose(teacher: TeacherConfig) -> str:
    """The tokenizer of a capture, as an error names it."""
    return teacher.tokenizer or f"the teacher's own, by default ({teacher.model})"


def _check_width(needed: int, width: int, whose: str) -> None:
    if needed > width:
        raise MismatchError(
            "the tokenizer has tokens that the teacher has no column for",
            {"tokenizer": f"{needed} tokens: {whose}", "the teacher's head": f"{width} columns"},
            why="The teacher would read ids that it does not have.",
            fix="Use the tokenizer that the teacher was trained with.",
        )


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


def _template(config: CaptureConfig, tokenizer: PreTrainedTokenizerBase) -> str | None:
    if not needs_template(config.data):
        return None
    template = template_of(tokenizer)
    if template is None:
        raise MissingError(
            "the tokenizer has no chat template",
            {"tokenizer": _whose(config.teacher), "data.format": config.data.format},
            why="Without one nobody knows how a conversation becomes text for the teacher.",
            fix="Give the tokenizer a chat_template.jinja, or use data.format=prompt_completion or text.",
        )
    return template


def _check_outside(config: CaptureConfig, cache: str) -> None:
    """Nothing that is read lies in the folder that is written, where --overwrite would delete it; ``cache`` is what an
    error calls that setting."""
    paths = {
        "teacher.model": config.teacher.model,
        "teacher.tokenizer": config.teacher.tokenizer,
        "data.path": config.data.path,
        cache: config.data.cache,
    }
    check_outside(config.out, paths)

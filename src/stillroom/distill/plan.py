"""The plan of a distillation: every "auto" resolved, everything checked that headers tell. Writes nothing."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from stillroom.config import BATCH_TOKENS, LOGITS_BYTES, is_local, replace
from stillroom.data.config import AnyData, StoredDataConfig
from stillroom.data.dataset import cache_folder, prepared
from stillroom.data.formats import needs_template
from stillroom.data.sources import open_source
from stillroom.distill.config import DistillConfig
from stillroom.distill.estimate import costs
from stillroom.distill.hidden_plan import HiddenPlan, plan_hidden
from stillroom.distill.parallel import memory_of_a_process, resolve_parallel
from stillroom.distill.stored_plan import (
    check_columns,
    check_held_out,
    check_missing,
    check_served,
    load_stored_tokenizer,
    open_store,
    shown_length,
    stored_template,
)
from stillroom.distill.student_plan import cut_from, export_dtype, origin_of, student_parts
from stillroom.distributed.init import SINGLE_PROCESS, DistContext
from stillroom.errors import ConfigError, MismatchError
from stillroom.estimates.headers import Headers
from stillroom.models import loading
from stillroom.models.folder import check_folder
from stillroom.models.quantization import check_quantizable
from stillroom.models.safetensors_io import save_promise
from stillroom.pruning.plan import PruningPlan
from stillroom.pruning.prune import promised_mask, write_mask
from stillroom.runs import check_outside
from stillroom.store.reader import Store
from stillroom.teachers.config import LiveTeacherConfig, ServerTeacherConfig, StoreTeacherConfig
from stillroom.tokenizers import compare, load_tokenizer, required_vocab_size, template_fingerprint, template_of
from stillroom.training.student import end_as
from stillroom.verbs import (
    VerbPlan,
    check_vocabulary,
    costs_on,
    files_of,
    has_bfloat16,
    no_template,
    tokenized_file,
)


@dataclass(frozen=True)
class DistillPlan(VerbPlan[DistillConfig]):
    tokenizer: PreTrainedTokenizerBase
    """The student's."""
    template: str | None
    """The chat template that rows go through, where they do."""
    student_config: PretrainedConfig
    fresh: PretrainedConfig | None
    """The config of a new student with random weights."""
    teacher_config: PretrainedConfig | None
    held_out: AnyData | StoredDataConfig | None
    """The settings of the held-out data: those of the training data, at another path and in its own order."""
    length: int
    """Tokens of a row."""
    micro_tokens: int
    """Tokens that go through the student at once."""
    logits_bytes: int
    """The budget for logits that are held at a time."""
    vocab_size: int | None
    """The columns of the heads that are compared; None is all."""
    store: Store | None = None
    """The store that the student learns from."""
    held_out_store: Store | None = None
    hidden: HiddenPlan | None = None
    """The layers that the objectives over hidden states compare."""
    cut: PruningPlan | None = None
    """The part of its teacher that a pruned student starts as."""

    @property
    def cut_from(self) -> str | None:
        """The model that a student is pruned from, where it is."""
        return cut_from(self.config)

    def details(self) -> dict[str, Any]:
        cut = {} if self.cut is None else {"cut": self.cut.facts()}
        return cut if self.hidden is None else {**cut, "layers": self.hidden.texts()}

    def costs(self) -> dict[str, Any] | str:
        return costs_on(self.config.device, lambda hardware: costs(self.config, self._known(), hardware))

    def known(self) -> Headers | None:
        """Returns what headers tell of the models; None where a size is not known."""
        try:
            return self._known()
        except ConfigError:
            return None

    def _known(self) -> Headers:
        return Headers.of(
            {"student": self.student_config, "teacher": self.teacher_config},
            store=None if self.store is None else self.store.manifest.model_dump(),
            num_tokens=self._num_tokens(),
        )

    def _num_tokens(self) -> float | None:
        """Tokens in one pass over the data, where they are tokenised already."""
        if self.store is not None:
            return float(self.store.manifest.tokens)
        data = self.config.data
        if isinstance(data, StoredDataConfig) or not is_local(data.path):
            return None
        documents = prepared(data, self.tokenizer, template=self.template)
        return None if documents is None else float(documents.counts["tokens"])

    def reads(self) -> dict[str, str]:
        config, found = self.config, {}
        if isinstance(config.teacher, LiveTeacherConfig):
            found["teacher"] = _model_text(config.teacher.model)
        if isinstance(config.teacher, ServerTeacherConfig):
            found["teacher"] = f"{config.teacher.model} at {config.teacher.url}"
        for name, store in (("store", self.store), ("held_out", self.held_out_store)):
            if store is not None:
                m = store.manifest
                found[name] = f"{store.path} ({m.documents} documents, {m.size_bytes / 2**20:.1f} MiB)"
        if config.student.model is not None:
            found["student"] = _model_text(config.student.model)
        if (source := self.cut_from) is not None:
            found["cut from"] = _model_text(source)
        if config.student.tokenizer is not None:
            found["tokenizer"] = config.student.tokenizer
        return {**found, **{name: files_of(data) for name, data in self._data()}}

    def writes(self) -> dict[str, str]:
        found = {}
        for name, data in self._data():
            found[f"tokenised {name}"] = f"in {cache_folder(data)}"
            if is_local(data.path):
                found[f"tokenised {name}"] = tokenized_file(data, self.tokenizer, self.template)
        out = Path(self.config.out)
        return {
            **found,
            "run": f"{out / 'run.json'}, {out / 'metrics.jsonl'}",
            "checkpoints": str(out / "checkpoints"),
            "model": str(out / "model"),
        }

    def promise(self, folder: Path) -> None:
        student, folder = self.config.student, folder / "model"
        if student.lora is not None and student.lora.export == "adapter":
            return
        code = student.trust_remote_code
        dtype = getattr(torch, self.config.export.dtype)
        model = loading.build_meta_model(self.student_config, dtype=dtype, trust_remote_code=code)
        end_as(model, self.tokenizer)
        save_promise(model, folder, dtype)
        self.tokenizer.save_pretrained(folder)
        if self.cut is not None and self.cut_from is not None:
            write_mask(folder, promised_mask(self.cut, loading.fingerprint(self.cut_from, self.cut.teacher)))

    def _data(self) -> list[tuple[str, AnyData]]:
        named = (("data", self.config.data), ("held_out", self.held_out))
        return [(name, data) for name, data in named if data is not None and not isinstance(data, StoredDataConfig)]


def make_plan(config: DistillConfig, context: DistContext = SINGLE_PROCESS) -> DistillPlan:
    """Resolves and checks a config from headers alone.

    Args:
        context: the processes that will make the run.

    Raises:
        MissingError: a model, a tokenizer, a data file, a device or a package is not there.
        MismatchError: the tokenizers, the chat templates or the heads of teacher and student do not fit.
    """
    given, config = config, _resolve_device(config)
    _check_outside(config, given)
    store, held_out_store, config = _stores(config, given)
    length, micro_tokens = _row(config)
    logits_bytes = LOGITS_BYTES if config.logits_bytes == "auto" else config.logits_bytes
    config = replace(config, {"batch.micro_tokens": micro_tokens, "logits_bytes": logits_bytes})
    tokenizer, teacher_tokenizer = _tokenizers(config, store)
    teacher_config = None
    if isinstance(teacher := config.teacher, LiveTeacherConfig):
        teacher_config = loading.read_config(
            teacher.model, revision=teacher.revision, trust_remote_code=teacher.trust_remote_code
        )
        if teacher.quantization is not None:
            check_quantizable(teacher_config, teacher.quantization, "the teacher")
    cut, fresh, student_config = student_parts(config.student, teacher_config, tokenizer)
    if config.export.dtype == "auto":
        config = replace(config, {"export.dtype": export_dtype(config, cut, student_config)})
    whose_tokenizer = _whose_tokenizer(config)
    fix = "Use the tokenizer that the model was trained with, or set vocab_size in student.init.settings."
    for who, model in (("the student", student_config), ("the teacher", teacher_config)):
        if model is not None:
            check_vocabulary(tokenizer, model, who, tokenizer_name=whose_tokenizer, fix=fix)
            loading.check_length(length, model, who.removeprefix("the "), shown_length(config, given))
    config, vocab_size = _vocab_size(config, student_config, teacher_config, tokenizer)
    if store is not None:
        check_columns(store, student_config, tokenizer, whose_tokenizer)
        vocab_size = store.manifest.num_columns
        whose, template = None, stored_template(store, tokenizer, teacher_tokenizer)
    else:
        whose, template = _template(config.data, tokenizer, teacher_tokenizer)
    if template is not None:
        tokenizer.chat_template = template  # the student is served with what it was trained on
        config = config if whose is None else replace(config, {"data.template": whose})
    origin = origin_of(config, teacher_config, store, cut)
    if isinstance(config.teacher, ServerTeacherConfig):
        check_served(config, config.teacher)
    config, hidden = plan_hidden(config, student_config, teacher_config, store, origin)
    if hidden is not None and held_out_store is not None:
        plan_hidden(config, student_config, None, held_out_store, origin)  # which is measured on the same layers
    plan = DistillPlan(
        config,
        tokenizer,
        template,
        student_config,
        fresh,
        teacher_config,
        _held_out(config),
        length,
        micro_tokens,
        logits_bytes,
        vocab_size,
        store,
        held_out_store,
        hidden,
        cut,
    )
    for _, data in plan._data():
        if is_local(data.path):
            open_source(data)  # which says where it is not there
    room = memory_of_a_process(config.device)
    return dataclasses.replace(plan, config=resolve_parallel(config, plan.known(), context, room))


def _row(config: DistillConfig) -> tuple[int, int]:
    """Returns the tokens of a row, and those that go through the student at once, once a store said its length."""
    length, micro_tokens = config.data.length, config.batch.micro_tokens
    assert isinstance(length, int)  # a store has filled it in
    if micro_tokens == "auto":
        micro_tokens = min(config.batch.tokens, max(length, BATCH_TOKENS))
    return length, micro_tokens


def _check_outside(config: DistillConfig, given: DistillConfig) -> None:
    """Nothing that is read lies in the folder that is written, where --overwrite would delete it."""
    student, init = config.student, config.student.init
    paths = {
        "teacher.model": config.teacher.model if isinstance(config.teacher, LiveTeacherConfig) else None,
        "teacher.path": config.teacher.path if isinstance(config.teacher, StoreTeacherConfig) else None,
        "student.model": student.model,
        "student.tokenizer": student.tokenizer,
        "student.init.like": getattr(init, "like", None),
        "student.init.model": getattr(init, "model", None),
        **_data_paths(config.data, given.data),
        "held_out.path": config.held_out.path if config.held_out else None,
    }
    check_outside(config.out, paths)


def _data_paths(data: AnyData | StoredDataConfig, given: AnyData | StoredDataConfig) -> dict[str, str]:
    if isinstance(data, StoredDataConfig):
        return {}
    by_default = ", by default," if getattr(given, "cache", None) == "auto" else ""
    return {"data.path": data.path, f"data.cache{by_default}": str(cache_folder(data))}


def _stores(config: DistillConfig, given: DistillConfig) -> tuple[Store | None, Store | None, DistillConfig]:
    """The store that is learnt from, the held-out one, and the settings with what they say filled in."""
    if not isinstance(config.teacher, StoreTeacherConfig) or not isinstance(config.data, StoredDataConfig):
        return None, None, config
    store = open_store(config.teacher.path, config, given)
    check_missing(store, config.objectives)
    length = store.manifest.length if config.data.length == "auto" else config.data.length
    config = replace(config, {"data.length": length})
    held_out = None
    if config.held_out is not None:
        held_out = open_store(config.held_out.path, config, given)
        check_held_out(store, held_out)
    return store, held_out, config


def _resolve_device(config: DistillConfig) -> DistillConfig:
    device = loading.resolve_device(config.device, "device")
    dtype = "bfloat16" if has_bfloat16(device) else "float32"
    values: dict[str, Any] = {"device": device}
    if not isinstance(config.data, StoredDataConfig):
        values["data.cache"] = str(cache_folder(config.data))
    if config.precision == "auto":
        values["precision"] = dtype
    if isinstance(config.teacher, LiveTeacherConfig) and config.teacher.dtype == "auto":
        values["teacher.dtype"] = dtype
    return replace(config, values)


def _tokenizers(
    config: DistillConfig, store: Store | None
) -> tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase | None]:
    """The student's tokenizer, and the teacher's; they turn every text into the same ids."""
    teacher, student = config.teacher, config.student
    of_teacher = None if store is None else load_stored_tokenizer(store)
    if isinstance(teacher, LiveTeacherConfig):
        of_teacher = load_tokenizer(
            teacher.model, revision=teacher.revision, trust_remote_code=teacher.trust_remote_code
        )
    elif isinstance(teacher, ServerTeacherConfig) and teacher.tokenizer is not None:
        of_teacher = load_tokenizer(teacher.tokenizer)
    own = None
    origin = student.model or getattr(student.init, "model", None)
    if origin is not None:
        own = load_tokenizer(origin, revision=student.revision, trust_remote_code=student.trust_remote_code)
    chosen = (
        load_tokenizer(student.tokenizer, trust_remote_code=student.trust_remote_code)
        if student.tokenizer is not None
        else own or of_teacher
    )
    assert chosen is not None  # the config demands a tokenizer where there is neither
    if own is not None and student.tokenizer is not None:
        compare(chosen, own, ("student.tokenizer", "student's own"), roles=False)
    if of_teacher is not None and chosen is not of_teacher:
        compare(of_teacher, chosen)
    return chosen, of_teacher


def _whose_tokenizer(config: DistillConfig) -> str:
    """The student's tokenizer, as an error names it."""
    student = config.student
    if student.tokenizer is not None:
        return student.tokenizer
    if student.model is not None:
        return f"the student's own, by default ({student.model})"
    return f"the {'store' if isinstance(config.teacher, StoreTeacherConfig) else 'teacher'}'s, by default"


def _vocab_size(
    config: DistillConfig,
    student: PretrainedConfig,
    teacher: PretrainedConfig | None,
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[DistillConfig, int | None]:
    """Returns how many columns of the heads are compared (None: all of the student's), and the settings with it."""
    needed = required_vocab_size(tokenizer)
    if not isinstance(config.teacher, LiveTeacherConfig) or teacher is None:
        return config, needed if isinstance(config.teacher, ServerTeacherConfig) else None
    widths = student.get_text_config().vocab_size, teacher.get_text_config().vocab_size
    columns = config.teacher.columns
    if columns == "auto":
        columns = widths[0] if widths[0] == widths[1] else needed
    if not needed <= columns <= min(widths):
        raise ConfigError(
            f"teacher.columns={columns} cannot be compared",
            {
                "possible": f"{needed} (all tokens of the tokenizer) to {min(widths)} (the narrower head)",
                "student": f"{widths[0]} columns",
                "teacher": f"{widths[1]} columns",
            },
            why="Each compared column must be in both heads, and each token must have one.",
            fix="Set teacher.columns=auto.",
        )
    return replace(config, {"teacher.columns": columns}), columns


def _template(
    data: AnyData | StoredDataConfig, student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase | None
) -> tuple[str | None, str | None]:
    """Returns whose chat template rows go through, and its text; None where they go through none."""
    if isinstance(data, StoredDataConfig) or not needs_template(data):
        return None, None
    ours, theirs = template_of(student), None if teacher is None else template_of(teacher)
    choice = data.template  # pyright: ignore[reportAttributeAccessIssue]
    if choice == "auto" and ours and theirs and ours != theirs:
        raise MismatchError(
            "teacher and student have different chat templates",
            {"teacher": template_fingerprint(theirs)[:16], "student": template_fingerprint(ours)[:16]},
            why="The same conversation would become other tokens for each, and one would read what it never saw.",
            fix="Say whose counts: data.template=teacher or data.template=student.",
        )
    whose = choice if choice != "auto" else "student" if ours else "teacher"
    template = ours if whose == "student" else theirs
    if template is None:
        values = {"data.template": choice, "teacher": "has one" if theirs else "none"}
        raise no_template({**values, "student": "has one" if ours else "none"})
    return whose, template


def _held_out(config: DistillConfig) -> AnyData | StoredDataConfig | None:
    if config.held_out is None:
        return None
    if isinstance(config.data, StoredDataConfig):
        return replace(config.data, {"shuffle": False})
    own = config.held_out.model_dump(include={"path", "split", "subset", "revision", "max_documents"})
    if config.held_out.path == config.data.path:
        own |= {name: own[name] or getattr(config.data, name) for name in ("subset", "revision")}
    return replace(config.data, {**own, "shuffle": False})


def _model_text(name: str) -> str:
    if not is_local(name):
        return f"{name} on the hub"
    size = sum(path.stat().st_size for path in check_folder(Path(name)))
    return f"{name} ({size / 2**20:.1f} MiB)"

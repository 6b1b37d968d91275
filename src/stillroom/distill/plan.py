"""The plan of a distillation: every "auto" resolved, everything checked that headers tell. Writes nothing."""

import dataclasses
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from stillroom.config import LOGITS_BYTES, is_local, replace
from stillroom.data.config import AnyData, StoredDataConfig, cache_folder
from stillroom.data.dataloader import BatchStream, DocumentSet, RankSlice
from stillroom.data.dataset import prepared
from stillroom.data.formats import needs_template
from stillroom.data.sources import open_source
from stillroom.distill.config import DistillConfig
from stillroom.distill.estimate import costs, memory_of_a_process, resolve_parallel
from stillroom.distill.hidden_plan import HiddenPlan, plan_hidden
from stillroom.distill.stored_plan import (
    check_columns,
    check_objectives,
    load_stored_tokenizer,
    open_stores,
    shown_length,
)
from stillroom.distill.student_plan import StudentPlan, plan_student
from stillroom.distributed.group import SINGLE_RANK, RankGroup
from stillroom.distributed.init import SINGLE_PROCESS, DistContext
from stillroom.errors import ConfigError, MismatchError
from stillroom.estimates.headers import Headers
from stillroom.models import loading
from stillroom.models.folder import check_folder
from stillroom.models.quantization import check_quantizable
from stillroom.models.safetensors_io import save_promise
from stillroom.pruning.prune import promised_mask, write_mask
from stillroom.runs import check_outside, versions
from stillroom.store.config import TopK
from stillroom.store.reader import Store
from stillroom.teachers.config import LiveTeacherConfig, ServerTeacherConfig, StoreTeacherConfig
from stillroom.tokenizers import (
    compare,
    fingerprint,
    load_tokenizer,
    required_vocab_size,
    template_fingerprint,
    template_of,
)
from stillroom.training.config import StudentConfig
from stillroom.training.student import end_as
from stillroom.verbs import VerbPlan, check_vocabulary, costs_on, files_of, has_bfloat16, no_template, tokenized_file


@dataclass(frozen=True)
class DistillPlan(VerbPlan[DistillConfig]):
    student: StudentPlan
    tokenizer: PreTrainedTokenizerBase
    """The student's."""
    template: str | None
    """The chat template that rows go through, where they do."""
    teacher_config: PretrainedConfig | None
    """The config of a live teacher."""
    teacher_fingerprint: str | None
    """None of a server, and where there is no teacher."""
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

    def details(self) -> dict[str, Any]:
        cut = {} if self.student.cut is None else {"cut": self.student.cut.facts()}
        return cut if self.hidden is None else {**cut, "layers": self.hidden.texts()}

    def costs(self) -> dict[str, Any] | str:
        return costs_on(self.config.device, lambda hardware: costs(self.config, self.known(), hardware))

    def known(self) -> Headers:
        """Returns what headers tell of the models and the data.

        Raises:
            ConfigError: `transformers` cannot build a model without code of its own.
        """
        num_tokens, data = None, self.config.data  # those of one pass, where they are tokenized already
        if self.store is not None:
            num_tokens = float(self.store.manifest.tokens) or None  # a promised one does not tell
        elif not isinstance(data, StoredDataConfig) and is_local(data.path):
            documents = prepared(data, self.tokenizer, template=self.template)
            num_tokens = None if documents is None else float(documents.counts["tokens"])
        return Headers.of(
            {"student": self.student.config, "teacher": self.teacher_config},
            store=None if self.store is None else self.store.manifest.model_dump(),
            num_tokens=num_tokens,
        )

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
        if self.student.source is not None:
            found["student" if self.student.cut is None else "cut from"] = _model_text(self.student.source[0])
        if config.student.tokenizer is not None:
            found["tokenizer"] = config.student.tokenizer
        return {**found, **{name: files_of(data) for name, data in self.texts()}}

    def writes(self) -> dict[str, str]:
        found = {}
        for name, data in self.texts():
            found[f"tokenized {name}"] = f"in {cache_folder(data)}"
            if is_local(data.path):
                found[f"tokenized {name}"] = tokenized_file(data, self.tokenizer, self.template)
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
        model = loading.build_meta_model(self.student.config, dtype=dtype, trust_remote_code=code)
        end_as(model, self.tokenizer)
        save_promise(model, folder, dtype)
        self.tokenizer.save_pretrained(folder)
        if (cut := self.student.cut) is not None and self.student.source is not None:
            write_mask(folder, promised_mask(cut, loading.fingerprint(self.student.source[0], cut.teacher)))

    def texts(self) -> list[tuple[str, AnyData]]:
        """Returns the data that are read as text, by their settings."""
        named = (("data", self.config.data), ("held_out", self.config.held_out_data))
        return [(name, data) for name, data in named if data is not None and not isinstance(data, StoredDataConfig)]

    def same_everywhere(self) -> dict[str, object]:
        """Returns what must be the same in all processes before anything is loaded."""
        found, named = versions(), ("python", "stillroom", "torch", "transformers")
        return {
            **{f"versions of {name}": found.get(name, "none") for name in named},
            "settings": self.config.model_dump(mode="json", exclude={"data": {"cache"}}),
            "tokenizers": fingerprint(self.tokenizer),
        }

    @property
    def pad_token(self) -> int:
        """The padding token's id, or 0 where the tokenizer has none; what stands on padding does not matter."""
        token: Any = self.tokenizer.pad_token_id
        return token if isinstance(token, int) else 0

    def stream(
        self,
        documents: DocumentSet,
        *,
        tokens: int,
        epochs: int | None,
        shuffle: bool = False,
        ranks: RankGroup = SINGLE_RANK,
    ) -> BatchStream:
        """Returns the steps of at most ``tokens`` positions over some documents."""
        return BatchStream(
            documents,
            length=self.length,
            pack=self.config.data.pack,
            shuffle=shuffle,
            tokens=tokens,
            micro_tokens=self.micro_tokens,
            seed=self.config.seed,
            epochs=epochs,
            pad_token=self.pad_token,
            part=RankSlice(ranks.rank, ranks.world_size),
        )


def make_plan(config: DistillConfig, context: DistContext = SINGLE_PROCESS) -> DistillPlan:
    """Resolves and checks a config from headers alone.

    Args:
        context: the processes that will make the run.

    Raises:
        MissingError: a model, a tokenizer, a data file, a device or a package is not there.
        MismatchError: the tokenizers, the chat templates or the heads of teacher and student do not fit.
    """
    teacher, data = config.teacher, config.data
    live = teacher if isinstance(teacher, LiveTeacherConfig) else None
    values = _of_this_machine(config)
    store, held_out_store, length = None, None, data.length
    if isinstance(teacher, StoreTeacherConfig) and isinstance(data, StoredDataConfig):
        held_out = None if config.held_out is None else config.held_out.path
        store, held_out_store, length = open_stores(teacher.path, held_out, config.objectives, data, config.batch)
    assert isinstance(length, int)  # a store has filled it in
    micro_tokens = config.batch.micro_tokens_of(length)
    logits_bytes = LOGITS_BYTES if config.logits_bytes == "auto" else config.logits_bytes
    values |= {"data.length": length, "batch.micro_tokens": micro_tokens, "logits_bytes": logits_bytes}

    stored = None if store is None else load_stored_tokenizer(store)
    tokenizer, teacher_tokenizer, whose_tokenizer = _tokenizers(teacher, config.student, stored)
    teacher_config = teacher_fingerprint = None
    if live is not None:
        remote_code = live.trust_remote_code
        teacher_config = loading.read_config(live.model, revision=live.revision, trust_remote_code=remote_code)
        teacher_fingerprint = loading.fingerprint(live.model, teacher_config)
        if live.quantization is not None:
            check_quantizable(teacher_config, live.quantization, "the teacher")
    student = plan_student(config.student, live, teacher_config, tokenizer)
    if config.export.dtype == "auto":
        values["export.dtype"] = student.export_dtype(config.precision)
    fix = "Use the tokenizer that the model was trained with, or set vocab_size in student.init.settings."
    for who, model in (("the student", student.config), ("the teacher", teacher_config)):
        if model is not None:
            check_vocabulary(tokenizer, model, who, tokenizer_name=whose_tokenizer, fix=fix)
            loading.check_length(length, model, who.removeprefix("the "), shown_length(length, data))

    template = vocab_size = None
    if isinstance(teacher, ServerTeacherConfig):
        vocab_size = required_vocab_size(tokenizer)
        check_objectives(config.objectives, TopK(kind="top_k", k=teacher.top, label=True), f"the server {teacher.url}")
    elif live is not None and teacher_config is not None:
        heads = [model.get_text_config().vocab_size for model in (student.config, teacher_config)]
        vocab_size = values["teacher.columns"] = _compared_columns(live.columns, heads, required_vocab_size(tokenizer))
    if store is not None:
        check_columns(store, student.config, tokenizer, whose_tokenizer)
        vocab_size, teacher_fingerprint = store.manifest.num_columns, store.manifest.teacher.fingerprint
        has_template = store.manifest.template != "none"
    else:
        has_template = not isinstance(data, StoredDataConfig) and needs_template(data)
    if has_template:
        whose, template = _template(data, tokenizer, teacher_tokenizer)
        if store is None:
            values["data.template"] = whose
        tokenizer.chat_template = template  # the student is served with what it was trained on

    origin = None if teacher_fingerprint is None else student.origin_in(teacher_fingerprint)
    compared = teacher_config if store is None else store
    objectives, hidden = plan_hidden(config.objectives, student.config, compared, origin)
    values["objectives"] = [objective.model_dump() for objective in objectives]
    if hidden is not None and held_out_store is not None:
        plan_hidden(objectives, student.config, held_out_store, origin)  # which is measured on the same layers
    plan = DistillPlan(
        replace(config, values),
        student,
        tokenizer,
        template,
        teacher_config,
        teacher_fingerprint,
        length,
        micro_tokens,
        logits_bytes,
        vocab_size,
        store,
        held_out_store,
        hidden,
    )
    for _, text in plan.texts():
        if is_local(text.path):
            open_source(text)  # which says where it is not there
    known = None  # where a model's size is not
    with suppress(ConfigError):
        known = plan.known()
    resolved = resolve_parallel(plan.config, known, context, memory_of_a_process(values["device"]))
    return dataclasses.replace(plan, config=resolved)


def _of_this_machine(config: DistillConfig) -> dict[str, Any]:
    """Returns the settings that follow from the devices and folders of this machine.

    Raises:
        MissingError: the device is not there.
        ConfigError: something that is read lies in the folder that is written.
    """
    data, teacher, paths = config.data, config.teacher, config.paths_read
    device = loading.resolve_device(config.device, "device")
    dtype = "bfloat16" if has_bfloat16(device) else "float32"
    values: dict[str, Any] = {"device": device}
    if config.precision == "auto":
        values["precision"] = dtype
    if isinstance(teacher, LiveTeacherConfig) and teacher.dtype == "auto":
        values["teacher.dtype"] = dtype
    if not isinstance(data, StoredDataConfig):
        values["data.cache"] = str(cache_folder(data))
        if config.held_out is not None:
            values["data.hash_range"] = config.held_out.rest(data).hash_range
        paths["data.cache, by default," if data.cache == "auto" else "data.cache"] = values["data.cache"]
    check_outside(config.out, paths)
    return values


def _tokenizers(
    teacher: LiveTeacherConfig | ServerTeacherConfig | StoreTeacherConfig | None,
    student: StudentConfig,
    stored: PreTrainedTokenizerBase | None,
) -> tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase | None, str]:
    """Returns the student's tokenizer, and the teacher's, which turn every text into the same ids; and the first's
    name in an error."""
    of_teacher, code = stored, student.trust_remote_code
    if isinstance(teacher, LiveTeacherConfig):
        of_teacher = load_tokenizer(
            teacher.model, revision=teacher.revision, trust_remote_code=teacher.trust_remote_code
        )
    elif isinstance(teacher, ServerTeacherConfig) and teacher.tokenizer is not None:
        of_teacher = load_tokenizer(teacher.tokenizer)
    source = student.model or getattr(student.init, "model", None)
    own = None if source is None else load_tokenizer(source, revision=student.revision, trust_remote_code=code)
    if student.tokenizer is not None:
        chosen, whose = load_tokenizer(student.tokenizer, trust_remote_code=code), student.tokenizer
        if own is not None:
            compare(chosen, own, ("student.tokenizer", "student's own"), roles=False)
    else:
        chosen = own or of_teacher
        whose = f"the {'store' if isinstance(teacher, StoreTeacherConfig) else 'teacher'}'s, by default"
        if student.model is not None:
            whose = f"the student's own, by default ({student.model})"
    assert chosen is not None  # the config demands a tokenizer where there is neither
    if of_teacher is not None and chosen is not of_teacher:
        compare(of_teacher, chosen)
    return chosen, of_teacher, whose


def _compared_columns(columns: int | str, heads: Sequence[int], needed: int) -> int:
    """Returns how many columns are compared of two heads, the student's and the teacher's.

    Args:
        columns: the number that is asked for, or auto.
        needed: the tokens of the tokenizer.
    """
    found = columns if isinstance(columns, int) else heads[0] if heads[0] == heads[1] else needed
    if not needed <= found <= min(heads):
        raise ConfigError(
            f"teacher.columns={found} cannot be compared",
            {
                "possible": f"{needed} (all tokens of the tokenizer) to {min(heads)} (the narrower head)",
                "student": f"{heads[0]} columns",
                "teacher": f"{heads[1]} columns",
            },
            why="Each compared column must be in both heads, and each token must have one.",
            fix="Set teacher.columns=auto.",
        )
    return found


def _template(
    data: AnyData | StoredDataConfig, student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase | None
) -> tuple[str, str]:
    """Returns whose chat template rows go through, and its text."""
    ours, theirs = template_of(student), None if teacher is None else template_of(teacher)
    choice: str = getattr(data, "template", "auto")
    if choice == "auto" and ours and theirs and ours != theirs:
        of_store = isinstance(data, StoredDataConfig)
        who = "store" if of_store else "teacher"
        raise MismatchError(
            f"{who} and student have different chat templates",
            {who: template_fingerprint(theirs)[:16], "student": template_fingerprint(ours)[:16]},
            why="The same conversation would become other tokens for each, and one would read what it never saw.",
            fix="Set student.tokenizer to the store's own, the folder `tokenizer` in it."
            if of_store
            else "Say whose counts: data.template=teacher or data.template=student.",
        )
    whose = choice if choice != "auto" else "student" if ours else "teacher"
    template = ours if whose == "student" else theirs
    if template is None:
        values = {"data.template": choice, "teacher": "has one" if theirs else "none"}
        raise no_template({**values, "student": "has one" if ours else "none"})
    return whose, template


def _model_text(name: str) -> str:
    if not is_local(name):
        return f"{name} on the hub"
    size = sum(path.stat().st_size for path in check_folder(Path(name)))
    return f"{name} ({size / 2**20:.1f} MiB)"

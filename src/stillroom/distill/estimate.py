"""The costs of a distillation: memory, arithmetic, time and money, from its settings and its models' configs alone; and
how it lies on its processes, where the settings leave that open."""

import dataclasses
import os
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from stillroom.config import LOGITS_BYTES, replace
from stillroom.distill.config import DistillConfig
from stillroom.distill.student_plan import plan_student
from stillroom.distributed.config import AutoParallelConfig, FsdpConfig, NoParallelConfig
from stillroom.distributed.init import DistContext
from stillroom.errors import ConfigError, OutOfMemoryError
from stillroom.estimates.flops import CAPTURE_SPEED, STORE_STEP, forward_flops, live_or_offline, training_flops
from stillroom.estimates.hardware import HEAP_SHARE, Hardware
from stillroom.estimates.headers import Headers, read_config, read_sizes
from stillroom.estimates.memory import Load, TeacherLoad, layer_bytes, memory, nearest
from stillroom.estimates.report import CostReport, bytes_text
from stillroom.estimates.sections import ARITHMETIC, add_memory, add_parameters, add_time, amount, fit
from stillroom.estimates.storage import stored
from stillroom.losses.config import Every, HiddenObjective, Last, LayerMap, Pairs, Uniform
from stillroom.models import loading
from stillroom.pruning.config import BestLayers, PruningConfig
from stillroom.store.format import MANIFEST, read_manifest
from stillroom.teachers.config import LiveTeacherConfig, ServerTeacherConfig, StoreTeacherConfig
from stillroom.training.config import StudentConfig

SPARE = 0.1
"""Share of a device's memory that a choice leaves free: plans are that far from what is measured."""

ENTRIES = 20.0
"""Entries of a position in a store that is not there yet: at most those of the default signal."""


def read_headers(config: DistillConfig) -> Headers:
    """The sizes of the student and of a live teacher, from their small files, and the manifest of a store that exists.

    Raises:
        MissingError, DataError: a model is not there, or not whole.
        ConfigError: its size is not known.
    """
    teacher, student, sizes, store, described = config.teacher, config.student, {}, None, None
    live = teacher if isinstance(teacher, LiveTeacherConfig) else None
    if live is not None:
        files, sizes["teacher"] = read_sizes(live.model, live.revision, "the teacher")
        described = AutoConfig.for_model(**files.config)
    elif isinstance(teacher, StoreTeacherConfig) and (file := Path(teacher.path) / MANIFEST).is_file():
        store = read_manifest(file.read_bytes(), teacher.path).model_dump()

    def read(name: str) -> PretrainedConfig:
        if name == getattr(student.init, "like", None):  # whose weights nobody reads
            return AutoConfig.for_model(**read_config(name, student.revision, "the model that the student is like"))
        return AutoConfig.for_model(**read_sizes(name, student.revision, "the student")[0].config)

    found = Headers.of({"student": plan_student(student, live, described, None, read).config}, store=store)
    tokens = None if store is None else float(store["tokens"])
    return dataclasses.replace(found, models={**found.models, **sizes}, num_tokens=tokens)


# --- what memory follows from ----------------------------------------------------------------------------------------
def load_of(config: DistillConfig, headers: Headers, hardware: Hardware) -> Load:
    """Returns what memory follows from, of a run on this hardware.

    Raises:
        ConfigError: the length of a row is not known, or an adapter's target is no linear layer.
    """
    student, lora, size = config.student, config.student.lora, headers.models["student"]
    store, live, length = headers.store or {}, headers.models.get("teacher"), config.data.length
    if length == "auto" and headers.store is None:
        raise ConfigError(
            "the length of a row is not known",
            {"data.length": "auto", "the store": "not there yet"},
            why="Activations, and so memory, follow from it.",
            fix="Set data.length to the length that the store will be captured with.",
        )
    length = int(store["length"]) if length == "auto" else length
    chosen = config.parallel.kind
    theirs = int(store.get("num_layers", 0)) if live is None else live.num_layers
    told = hardware.parallel == "auto" and hardware.num_devices > 1 and chosen in ("ddp", "fsdp")
    asked = config.held_out is not None or any(one.weight != 0 and one.needs_teacher for one in config.objectives)
    vocab_size: Any = getattr(config.teacher, "columns", "auto")
    if headers.store is not None:
        vocab_size = int(headers.store["num_columns"])
    elif vocab_size == "auto":
        vocab_size = min(size.vocab_size for size in headers.models.values())
    entries = float(config.teacher.top) if isinstance(config.teacher, ServerTeacherConfig) else 0.0
    if isinstance(config.teacher, StoreTeacherConfig):
        entries = store["entries"] / store["positions"] if store.get("positions") else ENTRIES
    teacher = None
    if isinstance(config.teacher, LiveTeacherConfig) and asked:
        single = config.teacher.dtype == "float32" or (config.teacher.dtype == "auto" and hardware.is_cpu)
        teacher = TeacherLoad(
            headers.models["teacher"],
            4 if single else 2,
            elsewhere=config.teacher.ranks is not None,
            whole=config.teacher.placement == "whole" or config.teacher.quantization is not None,
            quantization=config.teacher.quantization,
        )
    hidden = [objective for objective in config.objectives if isinstance(objective, HiddenObjective)]
    load = Load(
        size,
        length,
        min(config.batch.micro_tokens_of(length), config.batch.tokens),
        half=config.precision == "bfloat16" or (config.precision == "auto" and not hardware.is_cpu),
        checkpointing=student.gradient_checkpointing,
        masked=config.data.pack,
        flash=student.attention.startswith("flash"),
        vocab_size=vocab_size,
        logits_bytes=LOGITS_BYTES if config.logits_bytes == "auto" else config.logits_bytes,
        keeps_logits=hardware.is_cpu,
        states=hardware.states,
        frozen=size.frozen(student.freeze, adapters=lora is not None),
        adapter_parameters=0 if lora is None else size.adapter_parameters(lora.rank, lora.targets),
        teacher=teacher,
        stored_entries=entries,
        hidden_pairs=sum(num_pairs(one.layers, size.num_layers, theirs) for one in hidden),
        teacher_width=int(store.get("hidden_width", 0)) if live is None else live.hidden_size,
        objective=len(hidden) < len(config.objectives),
        driver_bytes=hardware.driver_bytes,
        heap_share=hardware.heap_share,
        num_devices=max(1, hardware.num_devices // getattr(config.parallel, "replicas", 1)),
        parallel=chosen if told else hardware.how_parallel,  # pyright: ignore[reportArgumentType]
    )
    number = -(-config.batch.tokens // (load.tokens * hardware.num_devices))
    return dataclasses.replace(load, micro_batches=max(1, number))


def num_pairs(layers: LayerMap, ours: int, theirs: int) -> int:
    """Returns how many pairs of so many layers of the student and the teacher a map makes."""
    match layers:
        case Pairs(pairs=pairs):
            return len(pairs)
        case Last(count=count):
            return count
        case Every(step=step):
            return min(ours, theirs // step)
        case Uniform(one_in=one_in):
            return -(-ours // one_in)
        case _:
            return ours


# --- many processes --------------------------------------------------------------------------------------------------
def resolve_parallel(
    config: DistillConfig, known: Headers | None, context: DistContext, memory_bytes: int
) -> DistillConfig:
    """Returns the settings with every "auto" that follows from the processes resolved: ``parallel``,
    ``teacher.placement`` and ``checkpoints.background``.

    Args:
        known: what headers tell of the models; None where a size is not known, and nothing is foreseen.
        memory_bytes: of one process.

    Raises:
        ConfigError: several processes were started for a run that is to have one.
        OutOfMemoryError: it will not fit.
    """
    size, teacher = context.num_trainers, config.teacher
    if isinstance(config.parallel, NoParallelConfig) and size > 1:
        raise ConfigError(
            f"{size} processes were started for a run of one",
            {"processes that train": size, "parallel.kind": "none"},
            why="Each would train the whole of it and write into the same folder.",
            fix="Set parallel.kind=auto, or start one process.",
        )

    def load(kind: Any) -> Load | None:
        device = "CPU" if config.device == "cpu" else "H100"  # whose speed does not matter here
        hardware = Hardware(device=device, num_devices=size, parallel=kind)
        return None if known is None else load_of(config, known, hardware)

    if isinstance(config.parallel, AutoParallelConfig):
        parallel: dict[str, object] = {"kind": "none"}
        if size > 1:
            whole = load("ddp")
            fits = whole is not None and memory(whole).total <= (1 - SPARE) * memory_bytes
            parallel = {"kind": "ddp" if fits else "fsdp", "timeout_s": config.parallel.timeout_s}
        config = replace(config, {"parallel": parallel})
    if isinstance(teacher, LiveTeacherConfig) and teacher.placement == "auto":
        sharded = isinstance(config.parallel, FsdpConfig) and size > 1
        if teacher.ranks is not None:
            weights = 0.0 if known is None else known.models["teacher"].total
            fits = weights * (2 if teacher.dtype == "bfloat16" else 4) <= (1 - 2 * SPARE) * memory_bytes
            sharded = not fits and context.num_teachers > 1
        whole_only = teacher.quantization is not None or not sharded
        config = replace(config, {"teacher.placement": "whole" if whole_only else "sharded"})
    if size > 1 and (need := load(config.parallel.kind)) is not None and not getattr(config.parallel, "offload", False):
        needed = memory(need).total
        if needed > memory_bytes * (1 + SPARE):
            raise OutOfMemoryError(
                f"the run does not fit {size} processes",
                {"needed in each": bytes_text(needed), "there": bytes_text(memory_bytes)},
                why="It would end at its first long batch if not at its first step.",
                fix=f"By the plan: {nearest(need, memory_bytes)}. With parallel={{kind: fsdp, offload: true}} the "
                "CPU's memory holds the training state.",
            )
    if config.checkpoints.background == "auto":
        config = replace(config, {"checkpoints.background": config.device.startswith("cuda")})
    return config


def memory_of_a_process(device: str) -> int:
    """Returns the bytes that one of this host's processes has for itself."""
    if (of_device := loading.device_memory(device)) is not None:
        return of_device
    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return pages // int(os.environ.get("LOCAL_WORLD_SIZE", "1") or 1)


# --- the report ------------------------------------------------------------------------------------------------------


def costs(config: DistillConfig, headers: Headers, hardware: Hardware, title: str = "distill") -> CostReport:
    """Parameters, memory, arithmetic, time and cost of a run; whether it fits; live or offline."""
    load = load_of(config, headers, hardware)
    single = not load.half or (load.teacher is not None and load.teacher.itemsize == 4)
    report = CostReport(title, assumptions=hardware.assumptions(single=single))
    add_parameters(report, "student", load.student)
    report.add("parameters", "trained", load.trained, "count")
    if "teacher" in headers.models:
        add_parameters(report, "teacher", headers.models["teacher"])
    need = memory(load)
    comes = dict.fromkeys(need.comes, f"at the {need.moment} of a step")
    fits, sentence = fit(add_memory(report, {**need.stays, **need.comes}, hardware, comes), hardware)
    report.advice.append(sentence)
    if not fits:
        report.advice.append(nearest(load, hardware.resolved().memory_bytes))
    of_pass = hardware.data_tokens or headers.num_tokens
    tokens, why = None, "the data are not tokenized yet: data_tokens=… tells how many are in one pass"
    if config.steps is not None:
        tokens, why = config.steps * config.batch.tokens, f"{config.steps:,} steps of at most {config.batch.tokens:,}"
    elif of_pass is not None and config.epochs is not None:
        tokens, why = config.epochs * of_pass, f"{config.epochs} x {of_pass:,.0f}"
    trained = training_flops(
        load.student, load.length, checkpointing=load.checkpointing, adapter_parameters=load.adapter_parameters,
        frozen=load.frozen,
    )  # fmt: skip
    asked = 0.0 if load.teacher is None else forward_flops(load.teacher.model, load.length)
    flops = {
        "student, forward": trained.forward,
        "student, backward": trained.backward,
        "student, recomputed": trained.recomputed,
        "teacher, forward": asked,
    }
    for name, value in flops.items():
        if value:
            report.add(ARITHMETIC, name, value, "FLOP")
    from_store = isinstance(config.teacher, StoreTeacherConfig)
    add_time(report, hardware, (trained.total + asked) * (STORE_STEP if from_store else 1.0), tokens, why)
    if load.teacher is not None and tokens is not None:
        _compare(report, load, trained.total, asked, tokens, config.epochs or 1, hardware)
    report.assumptions += _assumptions(load, config.student, has_held_out=config.held_out is not None)
    if isinstance(config.teacher, StoreTeacherConfig) and headers.store is None:
        report.assumptions.append(
            f"no store is at {config.teacher.path} yet: {ENTRIES:.0f} entries a position are assumed"
        )
    return report


def _compare(
    report: CostReport, load: Load, trained: float, asked: float, tokens: float, epochs: int, hardware: Hardware
) -> None:
    """A live teacher beside one whose output is stored once."""
    of_pass = tokens / epochs
    found = live_or_offline(asked, trained, of_pass, epochs, hardware.students)
    section = "live or offline"
    for name, flops in (("live", found.live), ("offline", found.offline)):
        told = amount(flops, hardware)
        note = f"{told.device_hours:,.3g} device-hours" + ("" if told.cost is None else f", ${told.cost:,.2f}")
        report.add(section, name, flops, "FLOP", note)
    report.add(
        section, "break-even", found.break_even, "number", "epochs times students from which on offline takes less"
        if found.break_even is not None else "never: reading a store costs more than this teacher",
    )  # fmt: skip
    kind = stored(load.vocab_size or load.student.vocab_size)
    report.add(section, "the store", of_pass * kind.bytes_per_position, "bytes",
               f"{kind.bytes_per_position:.1f} bytes a position; {kind.source}")  # fmt: skip
    better = "offline" if found.offline < found.live else "live"
    share = min(found.live, found.offline) / max(found.live, found.offline)
    report.advice.append(
        f"{better} takes less: {share:.0%} of the other's arithmetic, in {epochs} "
        f"epoch{'s' * (epochs > 1)} for {hardware.students} student{'s' * (hardware.students > 1)}"
    )
    report.assumptions.append(
        f"offline: a capture at {CAPTURE_SPEED:.0%} of a bare forward pass, a step from a store {STORE_STEP:.3f} times "
        "as long (both measured with tiny models, benchmarks/store.json)"
    )


def _assumptions(load: Load, student: StudentConfig, *, has_held_out: bool) -> list[str]:
    """Returns what the figures rest on."""
    squares = any(layer.squares for layer in load.student.shapes)
    square_bytes = layer_bytes(load.student, load.length, half=load.half) * load.tokens if squares else 0.0
    init = student.init
    measured = isinstance(init, PruningConfig) and (init.width is not None or isinstance(init.layers, BestLayers))
    sentences = {
        "a token's FLOPs: 2 for each entry of a matrix it is multiplied with, 2 · layers · query channels · length of "
        "attention (causal: half of the row); backward twice that; norms and the optimizer are left out": True,
        f"micro-batches of {load.tokens:,} tokens, all of which are learned, {load.micro_batches} of them in a step of "
        "a device; weights and gradients in float32": True,
        f"of activations that are freed, the C library keeps a share of {HEAP_SHARE:.0%}": load.heap_share,
        "several documents in a row: attention goes by a mask, kept by each layer": load.masked
        and not (load.flash or squares),
        f"a {load.student.family} keeps attention matrices of length by length: {square_bytes / 2**20:,.0f} MiB a "
        "layer": squares,
        "measuring what is held out takes time besides, which is not counted": has_held_out,
        "measuring what the student keeps takes time besides, which a plan of `prune` tells": measured,
        "frozen parameters have neither gradients nor moments; activations are counted as if all were trained": (
            student.freeze
        ),
        "experts are met evenly; all of their parameters are in memory": load.student.parts["experts"],
    }
    return [sentence for sentence, holds in sentences.items() if holds]

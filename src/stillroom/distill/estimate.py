"""What a distillation will need: memory, arithmetic, time and cost, from its settings and its models' configs alone."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from stillroom.config import BATCH_TOKENS, LOGITS_BYTES
from stillroom.distill.config import DistillConfig
from stillroom.distill.student_plan import student_parts
from stillroom.errors import ConfigError, DataError
from stillroom.estimates.flops import CAPTURE_SPEED, STORE_STEP, forward_flops, live_or_offline, training_flops
from stillroom.estimates.hardware import HEAP_SHARE, Hardware
from stillroom.estimates.headers import Headers, read_config, read_sizes
from stillroom.estimates.memory import Load, TeacherLoad, layer_bytes, memory, nearest
from stillroom.estimates.report import CostReport
from stillroom.estimates.sections import ARITHMETIC, add_memory, add_parameters, add_time, amount, fit
from stillroom.estimates.storage import stored
from stillroom.losses.config import Every, HiddenObjective, Last, Pairs, Uniform
from stillroom.pruning.config import BestLayers, PruningConfig
from stillroom.teachers.config import LiveTeacherConfig, ServerTeacherConfig, StoreTeacherConfig

ENTRIES = 20.0
"""Entries of a position in a store that is not there yet: at most those of the default signal."""


def read_headers(config: DistillConfig) -> Headers:
    """The sizes of the student and of a live teacher, from their small files, and the manifest of a store that exists.

    Raises:
        MissingError, DataError: a model is not there, or not whole.
        ConfigError: its size is not known.
    """
    teacher, student, sizes, store, teacher_config = config.teacher, config.student, {}, None, None
    if isinstance(teacher, LiveTeacherConfig):
        files, sizes["teacher"] = read_sizes(teacher.model, teacher.revision, "the teacher")
        teacher_config = AutoConfig.for_model(**files.config)
    elif isinstance(teacher, StoreTeacherConfig):
        store = _manifest(teacher.path)

    def read(name: str) -> PretrainedConfig:
        if name == getattr(student.init, "like", None):  # whose weights nobody reads
            return AutoConfig.for_model(**read_config(name, student.revision, "the model that the student is like"))
        return AutoConfig.for_model(**read_sizes(name, student.revision, "the student")[0].config)

    parts = student_parts(student, teacher_config, None, read)
    found = Headers.of({"student": parts[2]}, store=store)
    tokens = None if store is None else float(store.get("tokens", store["positions"]))
    return replace(found, models={**found.models, **sizes}, num_tokens=tokens)


def _manifest(path: str) -> Mapping[str, Any] | None:
    """The manifest of a store in a folder; None where none is there yet."""
    file = Path(path) / "manifest.json"
    if not file.is_file():
        return None
    try:
        values = json.loads(file.read_bytes())
        if all(isinstance(values[name], int) for name in ("positions", "length", "num_columns")):
            return values
        found = "other values"
    except (ValueError, TypeError, KeyError) as error:
        found = f"{type(error).__name__}: {error}"
    raise DataError(
        f"{file} is no manifest of a store",
        {"expected": "positions, length and num_columns", "found": found},
        why="They tell how much there is to learn.",
        fix="See what `stillroom store check` says of it.",
    )


# --- what memory follows from ----------------------------------------------------------------------------------------
def load_of(config: DistillConfig, headers: Headers, hardware: Hardware) -> Load:
    """What memory follows from, of a run on this hardware.

    Raises:
        ConfigError: the length of a row is not known, or an adapter's target is no linear layer.
    """
    student, lora, size = config.student, config.student.lora, headers.models["student"]
    teacher, store, length = _teacher_load(config, headers, hardware), headers.store or {}, config.data.length
    if length == "auto" and headers.store is None:
        raise ConfigError(
            "the length of a row is not known",
            {"data.length": "auto", "the store": "not there yet"},
            why="Activations, and so memory, follow from it.",
            fix="Set data.length to the length that the store will be captured with.",
        )
    length = int(store["length"]) if length == "auto" else length
    micro_tokens = max(length, BATCH_TOKENS) if config.batch.micro_tokens == "auto" else config.batch.micro_tokens
    live, chosen = headers.models.get("teacher"), config.parallel.kind
    theirs = int(store.get("num_layers", 0)) if live is None else live.num_layers
    told = hardware.parallel == "auto" and hardware.num_devices > 1 and chosen in ("ddp", "fsdp")
    load = Load(
        size,
        length,
        min(micro_tokens, config.batch.tokens),
        half=config.precision == "bfloat16" or (config.precision == "auto" and not hardware.is_cpu),
        checkpointing=student.gradient_checkpointing,
        masked=config.data.pack,
        flash=student.attention.startswith("flash"),
        vocab_size=_vocab_size(config, headers),
        logits_bytes=LOGITS_BYTES if config.logits_bytes == "auto" else config.logits_bytes,
        keeps_logits=hardware.is_cpu,
        states=hardware.states,
        frozen=size.frozen(student.freeze, adapters=lora is not None),
        adapter_parameters=0 if lora is None else size.adapter_parameters(lora.rank, lora.targets),
        teacher=teacher,
        stored_entries=_entries(config, headers),
        hidden_pairs=num_pairs(config, size.num_layers, theirs),
        teacher_width=int(store.get("hidden_width", 0)) if live is None else live.hidden_size,
        objective=any(not isinstance(objective, HiddenObjective) for objective in config.objectives),
        driver_bytes=hardware.driver_bytes,
        heap_share=hardware.heap_share,
        num_devices=max(1, hardware.num_devices // getattr(config.parallel, "replicas", 1)),
        parallel=chosen if told else hardware.how_parallel,  # pyright: ignore[reportArgumentType]
    )
    return replace(load, micro_batches=max(1, -(-config.batch.tokens // (load.tokens * hardware.num_devices))))


def num_pairs(config: DistillConfig, ours: int, theirs: int) -> int:
    """How many pairs of the student's and the teacher's layers the objectives of inner states compare."""
    total = 0
    for objective in config.objectives:
        if not isinstance(objective, HiddenObjective):
            continue
        match objective.layers:
            case Pairs(pairs=pairs):
                total += len(pairs)
            case Last(count=count):
                total += count
            case Every(step=step):
                total += min(ours, theirs // step)
            case Uniform(one_in=one_in):
                total += -(-ours // one_in)
            case _:
                total += ours
    return total


def _vocab_size(config: DistillConfig, headers: Headers) -> int | None:
    """The entries of the vocabulary that are compared; None for all of the student's."""
    if headers.store is not None:
        return int(headers.store["num_columns"])
    if isinstance(config.teacher, LiveTeacherConfig) and config.teacher.columns != "auto":
        return config.teacher.columns
    return min(size.vocab_size for size in headers.models.values())


def _teacher_load(config: DistillConfig, headers: Headers, hardware: Hardware) -> TeacherLoad | None:
    teacher = config.teacher
    used = any(objective.weight != 0 and objective.needs_teacher for objective in config.objectives)
    if not isinstance(teacher, LiveTeacherConfig) or not (used or config.held_out is not None):
        return None
    single = teacher.dtype == "float32" or (teacher.dtype == "auto" and hardware.is_cpu)
    return TeacherLoad(
        headers.models["teacher"],
        4 if single else 2,
        elsewhere=teacher.ranks is not None,
        whole=teacher.placement == "whole" or teacher.quantization is not None,
        quantization=teacher.quantization,
    )


def _entries(config: DistillConfig, headers: Headers) -> float:
    if isinstance(config.teacher, ServerTeacherConfig):
        return float(config.teacher.top)
    if not isinstance(config.teacher, StoreTeacherConfig):
        return 0.0
    if headers.store is None:
        return ENTRIES
    return int(headers.store.get("entries", 0)) / max(1, int(headers.store.get("positions", 0)))


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
    _add_time(report, config, headers, load, hardware)
    _assume(report, config, load)
    if isinstance(config.teacher, StoreTeacherConfig) and headers.store is None:
        report.assumptions.append(
            f"no store is at {config.teacher.path} yet: {ENTRIES:.0f} entries a position are assumed"
        )
    return report


def _add_time(report: CostReport, config: DistillConfig, headers: Headers, load: Load, hardware: Hardware) -> None:
    trained = training_flops(
        load.student, load.length, checkpointing=load.checkpointing, adapter_parameters=load.adapter_parameters,
        frozen=load.frozen,
    )  # fmt: skip
    asked = 0.0 if load.teacher is None else forward_flops(load.teacher.model, load.length)
    report.add(ARITHMETIC, "student, forward", trained.forward, "FLOP")
    report.add(ARITHMETIC, "student, backward", trained.backward, "FLOP")
    if trained.recomputed:
        report.add(ARITHMETIC, "student, recomputed", trained.recomputed, "FLOP")
    if asked:
        report.add(ARITHMETIC, "teacher, forward", asked, "FLOP")
    each = (trained.total + asked) * (STORE_STEP if isinstance(config.teacher, StoreTeacherConfig) else 1.0)
    of_pass = hardware.data_tokens or headers.num_tokens
    tokens, why = None, "the data are not tokenised yet: data_tokens=… tells how many are in one pass"
    if config.steps is not None:
        tokens, why = config.steps * config.batch.tokens, f"{config.steps:,} steps of at most {config.batch.tokens:,}"
    elif of_pass is not None and config.epochs is not None:
        tokens, why = config.epochs * of_pass, f"{config.epochs} x {of_pass:,.0f}"
    add_time(report, hardware, each, tokens, why)
    if load.teacher is not None and tokens is not None:
        _compare(report, load, trained.total, asked, tokens, config.epochs or 1, hardware)


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


def _assume(report: CostReport, config: DistillConfig, load: Load) -> None:
    report.assumptions += [
        "a token's FLOPs: 2 for each entry of a matrix it is multiplied with, 2 · layers · query channels · length of "
        "attention (causal: half of the row); backward twice that; norms and the optimizer are left out",
        f"micro-batches of {load.tokens:,} tokens, all of which are learnt, {load.micro_batches} of them in a step of "
        "a device; weights and gradients in float32",
    ]
    if load.heap_share:
        report.assumptions.append(f"of activations that are freed, the C library keeps a share of {HEAP_SHARE:.0%}")
    squares = any(layer.squares for layer in load.student.shapes)
    if load.masked and not load.flash and not squares:
        report.assumptions.append("several documents in a row: attention goes by a mask, kept by each layer")
    if squares:
        each = layer_bytes(load.student, load.length, half=load.half) * load.tokens / 2**20
        report.assumptions.append(
            f"a {load.student.family} keeps attention matrices of length by length: {each:,.0f} MiB a layer"
        )
    if config.held_out is not None:
        report.assumptions.append("measuring what is held out takes time besides, which is not counted")
    init = config.student.init
    if isinstance(init, PruningConfig) and (init.width is not None or isinstance(init.layers, BestLayers)):
        report.assumptions.append("measuring what the student keeps takes time besides, which a plan of `prune` tells")
    if config.student.freeze:
        report.assumptions.append(
            "frozen parameters have neither gradients nor moments; activations are counted as if all were trained"
        )
    if load.student.parts["experts"]:
        report.assumptions.append("experts are met evenly; all of their parameters are in memory")

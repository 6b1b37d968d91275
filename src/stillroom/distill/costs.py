"""What a distillation will need: memory, arithmetic, time and cost, from its settings and its models' configs alone."""

from dataclasses import replace

from stillroom.distill.config import DistillConfig
from stillroom.distill.headers import DistillHeaders, read_headers
from stillroom.errors import ConfigError
from stillroom.estimates.activations import layer_bytes
from stillroom.estimates.adapters import adapter_parameters
from stillroom.estimates.advice import nearest
from stillroom.estimates.estimate import CAPTURE_SPEED, STORE_STEP, live_or_offline
from stillroom.estimates.flops import forward_flops, training_flops
from stillroom.estimates.hardware import Hardware
from stillroom.estimates.memory import HEAP_SHARE, Adapters, Load, Parallel, TeacherLoad, memory, trained_parameters
from stillroom.estimates.report import CostReport
from stillroom.estimates.sections import ARITHMETIC, add_memory, add_parameters, add_time, amount, fit
from stillroom.estimates.storage import stored
from stillroom.losses.config import Every, HiddenObjective, Last, Pairs, Uniform
from stillroom.pruning.config import BestLayers, PruningConfig
from stillroom.teachers.config import LiveTeacherConfig, ServerTeacherConfig, StoreTeacherConfig

__all__ = ["DistillHeaders", "costs", "read_headers"]

LOGITS_BYTES = 256 * 2**20
"""What `logits_bytes=auto` is."""
ENTRIES = 20.0
"""Of a position in a store that is not there yet: the default signal's at the most."""


# --- what memory follows from -----------------------------------------------------------------------------------------


def num_pairs(config: DistillConfig, known: DistillHeaders) -> int:
    """How many pairs of layers the objectives of inner states compare."""
    ours, theirs, total = known.student.num_layers, known.teacher_layers, 0
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


def load_of(config: DistillConfig, known: DistillHeaders, hardware: Hardware) -> Load:
    """What memory follows from, of a run on this hardware."""
    student, lora = config.student, config.student.lora
    length = _length(config, known)
    micro_tokens = config.batch.micro_tokens
    if micro_tokens == "auto":
        micro_tokens = max(length, 16384)
    micro_tokens = min(micro_tokens, config.batch.tokens)
    half = config.precision == "bfloat16" or (config.precision == "auto" and not hardware.is_cpu)
    load = Load(
        known.student,
        length,
        micro_tokens,
        half=half,
        checkpointing=student.gradient_checkpointing,
        masked=known.documents_share_rows,
        flash=student.attention.startswith("flash"),
        columns=_columns(config, known),
        logits_bytes=LOGITS_BYTES if config.logits_bytes == "auto" else config.logits_bytes,
        keeps_logits=hardware.is_cpu,
        states=hardware.states,
        adapters=None if lora is None else Adapters(adapter_parameters(known.student, lora.rank, lora.targets)),
        teacher=_teacher_load(config, known, hardware),
        stored_entries=_entries(config, known),
        hidden_pairs=num_pairs(config, known),
        teacher_width=known.teacher_width,
        objective=any(not isinstance(objective, HiddenObjective) for objective in config.objectives),
        driver_bytes=hardware.driver_bytes,
        heap_share=hardware.heap_share,
        num_devices=max(1, hardware.num_devices // getattr(config.parallel, "replicas", 1)),
        parallel=_parallel(config, hardware),
    )
    return replace(load, micro_batches=max(1, -(-config.batch.tokens // (load.tokens * hardware.num_devices))))


def _parallel(config: DistillConfig, hardware: Hardware) -> Parallel:
    """How several devices divide the work: as the plan is told, or else the recipe."""
    chosen = config.parallel.kind
    if hardware.parallel == "auto" and hardware.num_devices > 1 and chosen in ("ddp", "fsdp"):
        return chosen  # pyright: ignore[reportReturnType]
    return hardware.how_parallel


def _length(config: DistillConfig, known: DistillHeaders) -> int:
    if config.data.length != "auto":
        return config.data.length
    if known.store is not None:
        return int(known.store["length"])
    raise ConfigError(
        "the length of a row is not known",
        {"data.length": "auto", "the store": "not there yet"},
        why="Activations, and so memory, follow from it.",
        fix="Set data.length to the length that the store will be captured with.",
    )


def _columns(config: DistillConfig, known: DistillHeaders) -> int | None:
    if known.store is not None:
        return int(known.store["num_columns"])
    if isinstance(config.teacher, LiveTeacherConfig) and config.teacher.columns != "auto":
        return config.teacher.columns
    return None if known.teacher is None else min(known.student.vocab_size, known.teacher.vocab_size)


def _teacher_load(config: DistillConfig, known: DistillHeaders, hardware: Hardware) -> TeacherLoad | None:
    teacher = config.teacher
    if not isinstance(teacher, LiveTeacherConfig) or known.teacher is None or not _asks_teacher(config):
        return None
    single = teacher.dtype == "float32" or (teacher.dtype == "auto" and hardware.is_cpu)
    return TeacherLoad(
        known.teacher,
        4 if single else 2,
        elsewhere=teacher.ranks is not None,
        whole=teacher.placement == "whole" or teacher.quantization is not None,
        quantization=teacher.quantization,
    )


def _asks_teacher(config: DistillConfig) -> bool:
    asked = any(objective.weight != 0 and objective.needs_teacher for objective in config.objectives)
    return asked or config.held_out is not None


def _entries(config: DistillConfig, known: DistillHeaders) -> float:
    if isinstance(config.teacher, ServerTeacherConfig):
        return float(config.teacher.top)
    if not isinstance(config.teacher, StoreTeacherConfig):
        return 0.0
    if known.store is None:
        return ENTRIES
    return int(known.store.get("entries", 0)) / max(1, int(known.store.get("positions", 0)))


# --- the report ------------------------------------------------------------------------------------------------------


def costs(config: DistillConfig, known: DistillHeaders, hardware: Hardware, title: str = "distill") -> CostReport:
    """Parameters, memory, arithmetic, time and cost of a run; whether it fits; live or offline."""
    load = load_of(config, known, hardware)
    single = not load.half or (load.teacher is not None and load.teacher.itemsize == 4)
    report = CostReport(title, assumptions=hardware.assumptions(single=single))
    add_parameters(report, "student", known.student)
    report.add("parameters", "trained", trained_parameters(load), "count")
    if known.teacher is not None:
        add_parameters(report, "teacher", known.teacher)
    _add_memory(report, load, hardware)
    _add_time(report, config, known, load, hardware)
    _assume(report, config, load)
    if isinstance(config.teacher, StoreTeacherConfig) and known.store is None:
        report.assumptions.append(
            f"no store is at {config.teacher.path} yet: {ENTRIES:.0f} entries a position are assumed"
        )
    return report


def _add_memory(report: CostReport, load: Load, hardware: Hardware) -> None:
    found = memory(load)
    total = add_memory(
        report, {**found.stays, **found.comes}, hardware,
        dict.fromkeys(found.comes, f"at the {found.moment} of a step"),
    )  # fmt: skip
    fits, sentence = fit(total, hardware)
    report.advice.append(sentence)
    if not fits:
        report.advice.append(nearest(load, hardware.found().memory_bytes))


def _add_time(report: CostReport, config: DistillConfig, known: DistillHeaders, load: Load, hardware: Hardware) -> None:
    adapters = None if load.adapters is None else load.adapters.num_parameters
    trained = training_flops(load.student, load.length, checkpointing=load.checkpointing, adapter_parameters=adapters)
    asked = 0.0 if load.teacher is None else forward_flops(load.teacher.model, load.length)
    report.add(ARITHMETIC, "student, forward", trained.forward, "FLOP")
    report.add(ARITHMETIC, "student, backward", trained.backward, "FLOP")
    if trained.recomputed:
        report.add(ARITHMETIC, "student, recomputed", trained.recomputed, "FLOP")
    if asked:
        report.add(ARITHMETIC, "teacher, forward", asked, "FLOP")
    each = (trained.total + asked) * (STORE_STEP if isinstance(config.teacher, StoreTeacherConfig) else 1.0)
    tokens, why = _num_tokens(config, known, hardware)
    add_time(report, hardware, each, tokens, why)
    if load.teacher is not None and tokens is not None:
        _compare(report, config, load, trained.total, asked, tokens, hardware)


def _num_tokens(config: DistillConfig, known: DistillHeaders, hardware: Hardware) -> tuple[float | None, str]:
    if config.steps is not None:
        return config.steps * config.batch.tokens, f"{config.steps:,} steps of at most {config.batch.tokens:,}"
    of_pass = hardware.data_tokens or known.num_tokens
    assert config.epochs is not None  # a config has either
    if of_pass is None:
        return None, "the data are not tokenised yet: data_tokens=… tells how many are in one pass"
    return config.epochs * of_pass, f"{config.epochs} x {of_pass:,.0f}"


def _compare(
    report: CostReport,
    config: DistillConfig,
    load: Load,
    trained: float,
    asked: float,
    tokens: float,
    hardware: Hardware,
) -> None:
    """Asking the teacher live beside asking it once."""
    epochs = config.epochs or 1
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
    kind = stored(load.columns or load.student.vocab_size)
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
    if load.masked and not load.flash and not load.student.kind.squares:
        report.assumptions.append("several documents in a row: attention goes by a mask, kept by each layer")
    if load.student.kind.squares:
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
        report.assumptions.append("student.freeze: frozen parameters are counted as if they were trained")
    if load.student.num_sparse_layers:
        report.assumptions.append("experts are met evenly; all of their parameters are in memory")

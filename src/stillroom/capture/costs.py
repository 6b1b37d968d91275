"""What a capture will need: memory, arithmetic, time and storage, from its settings and its teacher's config alone."""

from dataclasses import dataclass

from stillroom.capture.config import CaptureConfig, Transformers
from stillroom.errors import ConfigError
from stillroom.estimates.activations import passing_bytes
from stillroom.estimates.architecture import Architecture
from stillroom.estimates.estimate import CAPTURE_SPEED
from stillroom.estimates.flops import forward_flops
from stillroom.estimates.hardware import Hardware
from stillroom.estimates.kinds import add_kinds
from stillroom.estimates.quantized import weights_bytes
from stillroom.estimates.report import CostReport, bytes_text
from stillroom.estimates.sections import ARITHMETIC, add_memory, add_parameters, add_time, fit
from stillroom.estimates.storage import Kind, full, hidden_states, stored
from stillroom.estimates.weights import read_architecture_of
from stillroom.store.config import Full, HeadAndSample, Sampled, TopK

LOGITS_BYTES = {"cpu": 8 * 2**20, "cuda": 256 * 2**20}
"""What `logits_bytes=auto` is."""


@dataclass(frozen=True)
class CaptureHeaders:
    """What headers tell of a capture."""

    teacher: Architecture | None
    """None for a server, whose memory and arithmetic are its own."""
    num_positions: float | None = None
    """Positions that will be stored."""


def read_headers(config: CaptureConfig) -> CaptureHeaders:
    """The teacher's architecture, from its config.json and the headers of its weights."""
    if not isinstance(config.teacher.engine, Transformers):
        return CaptureHeaders(None)
    return CaptureHeaders(read_architecture_of(config.teacher.model, config.teacher.revision, "the teacher")[1])


def costs(config: CaptureConfig, known: CaptureHeaders, hardware: Hardware, title: str = "capture") -> CostReport:
    """Parameters, memory, arithmetic and time of asking the teacher, and what the store takes."""
    hardware.refuse("capture", ("states", "students"))
    report = CostReport(title)
    positions = hardware.data_tokens or known.num_positions
    if known.teacher is not None:
        report.assumptions += hardware.assumptions(single=_itemsize(config, hardware) == 4)
        add_parameters(report, "teacher", known.teacher)
        _add_memory(report, config, known.teacher, hardware)
        _add_time(report, config, known.teacher, hardware, positions)
    _add_storage(report, config, known, positions)
    return report


def _add_memory(report: CostReport, config: CaptureConfig, model: Architecture, hardware: Hardware) -> None:
    engine = config.teacher.engine
    assert isinstance(engine, Transformers)
    item = _itemsize(config, hardware)
    tokens = max(config.data.length, 16384) if engine.batch_tokens == "auto" else engine.batch_tokens
    logits = (
        LOGITS_BYTES["cpu" if hardware.is_cpu else "cuda"] if engine.logits_bytes == "auto" else engine.logits_bytes
    )
    parts = {
        "teacher's weights": weights_bytes(
            model, item, engine.quantization
        ),  # whole on each of several workers' devices
        "teacher's activations": tokens * passing_bytes(model, config.data.length, item, masked=config.data.pack),
        "last states": float(tokens * model.hidden_size * item),
        "logits and probabilities": 2.0 * max(logits, 4 * model.vocab_size),
        "driver and workspaces": float(hardware.driver_bytes),
    }
    if config.hidden is not None:
        parts["inner states"] = float(tokens * len(config.hidden.layers) * model.hidden_size * item)
    total = add_memory(report, parts, hardware)
    fits, sentence = fit(total, hardware)
    report.advice.append(sentence)
    if fits:
        return
    least = total - parts["teacher's activations"] * (1 - config.data.length / tokens)
    if least <= hardware.found().memory_bytes:
        report.advice.append(f"would fit with teacher.engine.batch_tokens={config.data.length}: {bytes_text(least)}")
    else:
        report.advice.append("a server that divides the teacher would do: teacher.engine.kind=vllm (top_k or top_p)")


def _itemsize(config: CaptureConfig, hardware: Hardware) -> int:
    engine = config.teacher.engine
    assert isinstance(engine, Transformers)
    return 4 if engine.dtype == "float32" or (engine.dtype == "auto" and hardware.is_cpu) else 2


def _add_time(
    report: CostReport, config: CaptureConfig, model: Architecture, hardware: Hardware, positions: float | None
) -> None:
    each = forward_flops(model, config.data.length)
    report.add(ARITHMETIC, "teacher, forward", each, "FLOP")
    why = "" if positions is not None else "the data are not tokenised yet: data_tokens=… tells how many there are"
    add_time(report, hardware, each / CAPTURE_SPEED, positions, why)
    report.assumptions.append(
        f"a capture runs at {CAPTURE_SPEED:.0%} of a bare forward pass, as measured with a tiny teacher "
        "(benchmarks/store.json)"
    )
    if config.generate is not None:
        report.assumptions.append(
            "answers are read as fast as any text: writing them takes longer, which is not counted"
        )


def _add_storage(report: CostReport, config: CaptureConfig, known: CaptureHeaders, positions: float | None) -> None:
    columns, kept = _columns(config, known), kinds(config, known)
    for kind in kept:
        report.add("this store, a position", kind.name, kind.bytes_per_position, "each", kind.source)
    if positions is not None:
        total = sum(kind.bytes_per_position for kind in kept)
        report.add("this store, a position", "in all", total * positions, "bytes", f"{positions:,.0f} positions")
    add_kinds(report, "beside it", columns, positions)


def kinds(config: CaptureConfig, known: CaptureHeaders) -> list[Kind]:
    """What is kept of a position: the signal, and hidden states where some are."""
    kept = [_kind(config, _columns(config, known))]
    if config.hidden is not None and known.teacher is not None:
        kept.append(hidden_states(known.teacher.hidden_size, len(config.hidden.layers), config.hidden.format))
    return kept


def _columns(config: CaptureConfig, known: CaptureHeaders) -> int:
    if config.teacher.columns != "auto":
        return config.teacher.columns
    if known.teacher is not None:
        return known.teacher.vocab_size
    raise ConfigError(
        "the columns of the teacher's head are not known",
        {"teacher.engine": config.teacher.engine.kind, "teacher.columns": "auto"},
        why="A server's config is not read, and the bytes of a position depend on its vocabulary.",
        fix="Set teacher.columns to the size of its vocabulary.",
    )


def _kind(config: CaptureConfig, columns: int) -> Kind:
    signal = config.signal
    if isinstance(signal, Full):
        return full(columns, 4)
    if isinstance(signal, TopK):
        return stored(columns, "top_k", signal.k)
    if isinstance(signal, Sampled):
        return stored(columns, "sampled", signal.draws)
    if isinstance(signal, HeadAndSample):
        default = (signal.head, signal.draws) == (12, 8)
        return stored(columns, "head_and_sample", None if default else signal.head + signal.draws)
    return stored(columns, "top_p", signal.most)

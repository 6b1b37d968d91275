"""The costs of a capture: memory, arithmetic, time and storage, from its settings and its teacher's config alone."""

from stillroom.capture.config import CaptureConfig, Transformers
from stillroom.config import BATCH_TOKENS
from stillroom.config import LOGITS_BYTES as DEFAULT_LOGITS_BYTES
from stillroom.data.config import AnyData
from stillroom.errors import ConfigError
from stillroom.estimates.flops import CAPTURE_SPEED, forward_flops
from stillroom.estimates.hardware import Hardware
from stillroom.estimates.headers import Headers, read_sizes
from stillroom.estimates.memory import passing_bytes, weights_bytes
from stillroom.estimates.model_size import ModelSize
from stillroom.estimates.report import CostReport, bytes_text
from stillroom.estimates.sections import ARITHMETIC, add_memory, add_parameters, add_time, fit
from stillroom.estimates.storage import Kind, add_kinds, full, hidden_states, stored
from stillroom.store.config import AnySignal, Full, HeadAndSample, HiddenStatesConfig, TopK, TopP

LOGITS_BYTES = {"cpu": 8 * 2**20, "cuda": DEFAULT_LOGITS_BYTES}
"""The value of `logits_bytes=auto`."""


def read_headers(config: CaptureConfig) -> Headers:
    """The teacher's size, from its config.json and the headers of its weights."""
    teacher = config.teacher
    if not isinstance(teacher.engine, Transformers):
        return Headers({})
    return Headers({"teacher": read_sizes(teacher.model, teacher.revision, "the teacher")[1]})


def costs(config: CaptureConfig, headers: Headers, hardware: Hardware, title: str = "capture") -> CostReport:
    """Parameters, memory, arithmetic and time of the teacher, and the size of the store."""
    hardware.refuse("capture", ("states", "students"))
    report = CostReport(title)
    positions = hardware.data_tokens or headers.num_tokens
    if (teacher := headers.models.get("teacher")) is not None:
        assert isinstance(config.teacher.engine, Transformers)
        layers = 0 if config.hidden is None else len(config.hidden.layers)
        _add_teacher(report, config.teacher.engine, config.data, layers, teacher, hardware)
        each = forward_flops(teacher, config.data.length)
        report.add(ARITHMETIC, "teacher, forward", each, "FLOP")
        why = "" if positions is not None else "the data are not tokenized yet: data_tokens=… tells how many there are"
        add_time(report, hardware, each / CAPTURE_SPEED, positions, why)
        report.assumptions.append(
            f"a capture runs at {CAPTURE_SPEED:.0%} of a bare forward pass, as measured with a tiny teacher "
            "(benchmarks/store.json)"
        )
        if config.generate is not None:
            text = "answers are read as fast as any text: writing them takes longer, which is not counted"
            report.assumptions.append(text)
    vocab_size = config.teacher.columns
    if vocab_size == "auto":
        if teacher is None:
            raise ConfigError(
                "the columns of the teacher's head are not known",
                {"teacher.engine": config.teacher.engine.kind, "teacher.columns": "auto"},
                why="A server's config is not read, and the bytes of a position depend on its vocabulary.",
                fix="Set teacher.columns to the size of its vocabulary.",
            )
        vocab_size = teacher.vocab_size
    kept = kinds(config.signal, vocab_size, config.hidden, None if teacher is None else teacher.hidden_size)
    for kind in kept:
        report.add("this store, a position", kind.name, kind.bytes_per_position, "each", kind.source)
    if positions is not None:
        total = sum(kind.bytes_per_position for kind in kept)
        report.add("this store, a position", "in all", total * positions, "bytes", f"{positions:,.0f} positions")
    add_kinds(report, "beside it", vocab_size, positions)
    return report


def _add_teacher(
    report: CostReport, engine: Transformers, data: AnyData, num_layers: int, model: ModelSize, hardware: Hardware
) -> None:
    """Adds the teacher's parameters, and the memory that it takes where it runs."""
    itemsize = 4 if engine.dtype == "float32" or (engine.dtype == "auto" and hardware.is_cpu) else 2
    report.assumptions += hardware.assumptions(single=itemsize == 4)
    add_parameters(report, "teacher", model)
    tokens = max(data.length, BATCH_TOKENS) if engine.batch_tokens == "auto" else engine.batch_tokens
    logits = engine.logits_bytes
    logits = LOGITS_BYTES["cpu" if hardware.is_cpu else "cuda"] if logits == "auto" else logits
    parts = {
        # Each of several workers has a whole teacher on its device.
        "teacher's weights": weights_bytes(model, itemsize, engine.quantization),
        "teacher's activations": tokens * passing_bytes(model, data.length, itemsize, masked=data.pack),
        "last states": float(tokens * model.hidden_size * itemsize),
        "logits and probabilities": 2.0 * max(logits, 4 * model.vocab_size),
        "driver and workspaces": float(hardware.driver_bytes),
        "inner states": float(tokens * num_layers * model.hidden_size * itemsize),
    }
    total = add_memory(report, parts, hardware)
    fits, sentence = fit(total, hardware)
    report.advice.append(sentence)
    if fits:
        return
    least = total - parts["teacher's activations"] * (1 - data.length / tokens)
    if least <= hardware.resolved().memory_bytes:
        report.advice.append(f"would fit with teacher.engine.batch_tokens={data.length}: {bytes_text(least)}")
    else:
        report.advice.append("a server that divides the teacher would do: teacher.engine.kind=vllm (top_k or top_p)")


def kinds(signal: AnySignal, vocab_size: int, hidden: HiddenStatesConfig | None, hidden_size: int | None) -> list[Kind]:
    """The parts of what is kept of a position: the signal, and hidden states where some are."""
    if isinstance(signal, Full):
        kept = [full(vocab_size, 4)]
    elif isinstance(signal, HeadAndSample):
        default = (signal.head, signal.draws) == (12, 8)
        kept = [stored(vocab_size, "head_and_sample", None if default else signal.head + signal.draws)]
    else:
        entries = signal.k if isinstance(signal, TopK) else signal.most if isinstance(signal, TopP) else signal.draws
        kept = [stored(vocab_size, signal.kind, entries)]
    if hidden is not None and hidden_size is not None:
        kept.append(hidden_states(hidden_size, len(hidden.layers), hidden.format))
    return kept

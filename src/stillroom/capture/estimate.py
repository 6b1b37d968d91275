"""What a capture will need: memory, arithmetic, time and storage, from its settings and its teacher's config alone."""

from stillroom.capture.config import CaptureConfig, Transformers
from stillroom.config import BATCH_TOKENS
from stillroom.config import LOGITS_BYTES as DEFAULT_LOGITS_BYTES
from stillroom.errors import ConfigError
from stillroom.estimates.flops import CAPTURE_SPEED, forward_flops
from stillroom.estimates.hardware import Hardware
from stillroom.estimates.headers import Headers, read_sizes
from stillroom.estimates.memory import passing_bytes, weights_bytes
from stillroom.estimates.model_size import ModelSize
from stillroom.estimates.report import CostReport, bytes_text
from stillroom.estimates.sections import ARITHMETIC, add_memory, add_parameters, add_time, fit
from stillroom.estimates.storage import Kind, add_kinds, full, hidden_states, stored
from stillroom.store.config import Full, HeadAndSample, Sampled, TopK

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
        engine = config.teacher.engine
        assert isinstance(engine, Transformers)
        itemsize = 4 if engine.dtype == "float32" or (engine.dtype == "auto" and hardware.is_cpu) else 2
        report.assumptions += hardware.assumptions(single=itemsize == 4)
        add_parameters(report, "teacher", teacher)
        _add_memory(report, config, engine, teacher, itemsize, hardware)
        each = forward_flops(teacher, config.data.length)
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
    kept = kinds(config, headers)
    for kind in kept:
        report.add("this store, a position", kind.name, kind.bytes_per_position, "each", kind.source)
    if positions is not None:
        total = sum(kind.bytes_per_position for kind in kept)
        report.add("this store, a position", "in all", total * positions, "bytes", f"{positions:,.0f} positions")
    add_kinds(report, "beside it", _vocab_size(config, headers), positions)
    return report


def _add_memory(
    report: CostReport, config: CaptureConfig, engine: Transformers, model: ModelSize, item: int, hardware: Hardware
) -> None:
    tokens = max(config.data.length, BATCH_TOKENS) if engine.batch_tokens == "auto" else engine.batch_tokens
    logits = (
        LOGITS_BYTES["cpu" if hardware.is_cpu else "cuda"] if engine.logits_bytes == "auto" else engine.logits_bytes
    )
    parts = {
        # Each of several workers has a whole teacher on its device.
        "teacher's weights": weights_bytes(model, item, engine.quantization),
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
    if least <= hardware.resolved().memory_bytes:
        report.advice.append(f"would fit with teacher.engine.batch_tokens={config.data.length}: {bytes_text(least)}")
    else:
        report.advice.append("a server that divides the teacher would do: teacher.engine.kind=vllm (top_k or top_p)")


def kinds(config: CaptureConfig, headers: Headers) -> list[Kind]:
    """What is kept of a position: the signal, and hidden states where some are.

    Raises:
        ConfigError: the teacher is a server whose vocabulary is not set.
    """
    vocab_size, signal, teacher = _vocab_size(config, headers), config.signal, headers.models.get("teacher")
    if isinstance(signal, Full):
        kept = [full(vocab_size, 4)]
    elif isinstance(signal, TopK):
        kept = [stored(vocab_size, "top_k", signal.k)]
    elif isinstance(signal, Sampled):
        kept = [stored(vocab_size, "sampled", signal.draws)]
    elif isinstance(signal, HeadAndSample):
        default = (signal.head, signal.draws) == (12, 8)
        kept = [stored(vocab_size, "head_and_sample", None if default else signal.head + signal.draws)]
    else:
        kept = [stored(vocab_size, "top_p", signal.most)]
    if config.hidden is not None and teacher is not None:
        kept.append(hidden_states(teacher.hidden_size, len(config.hidden.layers), config.hidden.format))
    return kept


def _vocab_size(config: CaptureConfig, headers: Headers) -> int:
    if config.teacher.columns != "auto":
        return config.teacher.columns
    if "teacher" in headers.models:
        return headers.models["teacher"].vocab_size
    raise ConfigError(
        "the columns of the teacher's head are not known",
        {"teacher.engine": config.teacher.engine.kind, "teacher.columns": "auto"},
        why="A server's config is not read, and the bytes of a position depend on its vocabulary.",
        fix="Set teacher.columns to the size of its vocabulary.",
    )

"""The costs of an evaluation: memory, arithmetic and time, from its settings and its models' configs alone."""

from collections.abc import Callable, Mapping, Sequence

from stillroom.config import BATCH_TOKENS, LOGITS_BYTES
from stillroom.data.config import DataConfig, most_tokens
from stillroom.estimates.flops import forward_flops
from stillroom.estimates.hardware import Hardware
from stillroom.estimates.headers import Headers, read_sizes
from stillroom.estimates.memory import logits_bytes, passing_bytes
from stillroom.estimates.model_size import ModelSize
from stillroom.estimates.report import CostReport, bytes_text
from stillroom.estimates.sections import ARITHMETIC, add_memory, add_parameters, add_time, fit
from stillroom.evaluate.config import EvaluateConfig

OF_TRAINING = ("states", "students", "num_devices", "parallel")
"""Settings of a plan that say nothing of an evaluation."""


def read_headers(config: EvaluateConfig) -> Headers:
    """The sizes of the models of this process, from each one's config.json and the headers of its weights.

    Raises:
        MissingError, DataError: a model is not there, or not whole.
        ConfigError: its size is not headers.
    """
    own = {name: model for name, model in config.models.items() if model.url is None}
    return Headers({name: read_sizes(m.model, m.revision, f"models.{name}")[1] for name, m in own.items()})


def costs(config: EvaluateConfig, headers: Headers, hardware: Hardware, title: str = "evaluate") -> CostReport:
    """Parameters of each model, memory where most is needed, and arithmetic and time of reading the text."""
    hardware.refuse("evaluate", OF_TRAINING)
    report, models, data = CostReport(title), headers.models, config.data
    in_float32 = ("float32", "auto") if hardware.is_cpu else ("float32",)
    itemsizes = {name: 4 if config.models[name].dtype in in_float32 else 2 for name in models}
    if models:
        report.assumptions += hardware.assumptions(single=4 in itemsizes.values())
    for name, model in models.items():
        add_parameters(report, name, model)
    for name, model in config.models.items():
        if model.url is not None:
            report.add("parameters", name, None, "count", "it is behind an address, whose memory and time are its own")
    teacher = config.teacher if config.teacher in models else None
    beside = {name: None if name == teacher or name in (headers.alone or ()) else teacher for name in models}

    def parts(name: str, batch_tokens: int) -> dict[str, float]:
        """The bytes on the device while a model reads: its weights and the teacher's, which stays once it is loaded."""
        held = dict.fromkeys([name] if data is None or teacher in (None, name) else [teacher, name])
        weights = {f"{one}'s weights": float(itemsizes[one] * models[one].total) for one in held}
        weights["driver and workspaces"] = float(hardware.driver_bytes)
        if data is None:
            return weights
        budget = LOGITS_BYTES if config.logits_bytes == "auto" else config.logits_bytes
        readers = [(models[one], itemsizes[one]) for one in (name, beside[name]) if one is not None]
        return weights | _passing(readers, data, batch_tokens, budget)

    if models:
        _add_memory(report, parts, beside, config.batch_tokens, data, hardware)
    if data is not None and models:
        _add_time(report, models, beside, data, hardware)
        if headers.alone is None and any(beside.values()):
            report.assumptions.append(
                "each model is taken to have the teacher's tokenizer, and so to be read beside the teacher; --dry-run "
                "of `evaluate` compares them"
            )
    for name, number in headers.questions.items():
        note = "questions to each model" if number is not None else "how many items lm-eval has is known once they load"
        report.add("tasks", name, number, "count", note)
    if config.tasks:
        report.assumptions.append(
            "tasks: how long their questions and answers are is known once they are tokenized, so neither their time "
            "nor the memory of their batches is told (batches are halved until they fit)"
        )
    return report


def _add_memory(
    report: CostReport,
    parts: Callable[[str, int], dict[str, float]],
    beside: Mapping[str, str | None],
    batch_tokens: int | str,
    data: DataConfig | None,
    hardware: Hardware,
) -> None:
    """The memory of each model, and of that which needs most by ``parts``, of a model and the tokens of a batch."""
    if not isinstance(batch_tokens, int):
        batch_tokens = max(0 if data is None else data.length, BATCH_TOKENS)
    needed = {name: parts(name, batch_tokens) for name in beside}
    for name, of in needed.items():
        with_it = "by itself" if beside[name] is None else f"beside {beside[name]}"
        with_it = "its weights alone" if data is None else with_it
        report.add("memory while each is asked", name, sum(of.values()), "bytes", with_it)
    most = max(needed, key=lambda name: sum(needed[name].values()))
    fits, sentence = fit(add_memory(report, needed[most], hardware), hardware)
    report.advice.append(f"{sentence} (most while {most} is asked)" if len(needed) > 1 else sentence)
    if fits or data is None:
        return
    least = sum(parts(most, data.length).values())
    if least <= hardware.resolved().memory_bytes:
        report.advice.append(f"would fit with batch_tokens={data.length}: {bytes_text(least)}")
    else:
        report.advice.append("no smaller batch is enough: a smaller dtype, or a device with more memory")


def _passing(
    readers: Sequence[tuple[ModelSize, int]], data: DataConfig, batch_tokens: int, logits: int
) -> dict[str, float]:
    """The bytes that one or two models, each with the size of a number, hold while they read a batch: the last states
    of both, and beside them the larger of what a layer needs for a moment and the logits."""
    layers = [batch_tokens * passing_bytes(size, data.length, item, masked=data.pack) for size, item in readers]
    vocab_size = min(size.vocab_size for size, _ in readers)
    return {
        "last states": float(sum(2 * batch_tokens * size.hidden_size * item for size, item in readers)),
        "activations": max(layers),
        "logits": logits_bytes(vocab_size, len(readers), logits, batch_tokens),
    }


def _add_time(
    report: CostReport,
    models: Mapping[str, ModelSize],
    beside: Mapping[str, str | None],
    data: DataConfig,
    hardware: Hardware,
) -> None:
    """Reading: each model once, and the teacher once more beside each that is compared with it."""
    each = 0.0
    for name, model in models.items():
        own, teacher = forward_flops(model, data.length), beside[name]
        report.add(ARITHMETIC, f"{name}, forward", own, "FLOP", "" if teacher is None else f"and {teacher}'s once more")
        each += own + (0.0 if teacher is None else forward_flops(models[teacher], data.length))
    tokens, why = most_tokens(data)
    if hardware.data_tokens is not None and (tokens is None or hardware.data_tokens <= tokens):
        tokens, why = hardware.data_tokens, "as data_tokens says"
    add_time(report, hardware, each, tokens, f"of the text, which all models read; {why}")
    report.assumptions.append(
        "all of the text's tokens are read, padding is not counted, and measuring each model's speed takes 5 s more at "
        "the most, which is not counted; nor are the loading of models and the bootstrap"
    )

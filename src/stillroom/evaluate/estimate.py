"""What an evaluation will need: memory, arithmetic and time, from its settings and its models' configs alone."""

from stillroom.config import BATCH_TOKENS, LOGITS_BYTES
from stillroom.data.config import most_tokens
from stillroom.estimates.flops import forward_flops
from stillroom.estimates.hardware import Hardware
from stillroom.estimates.headers import Headers, read_sizes
from stillroom.estimates.memory import logits_bytes, passing_bytes
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
    report = CostReport(title)
    if headers.models:
        single = any(_itemsize(config, name, hardware) == 4 for name in headers.models)
        report.assumptions += hardware.assumptions(single=single)
    for name, model in headers.models.items():
        add_parameters(report, name, model)
    for name, model in config.models.items():
        if model.url is not None:
            report.add("parameters", name, None, "count", "it is behind an address, whose memory and time are its own")
    if headers.models:
        _add_memory(report, config, headers, hardware)
    if config.data is not None and headers.models:
        _add_time(report, config, headers, hardware)
    _add_tasks(report, config, headers)
    return report


def _beside(config: EvaluateConfig, headers: Headers, name: str) -> str | None:
    """The teacher, where a model reads the text beside it."""
    teacher = config.teacher
    return teacher if teacher in headers.models and name != teacher and name not in (headers.alone or ()) else None


def _add_memory(report: CostReport, config: EvaluateConfig, headers: Headers, hardware: Hardware) -> None:
    needed = {name: _parts(config, headers, name, hardware) for name in headers.models}
    section = "memory while each is asked"
    for name, parts in needed.items():
        other = _beside(config, headers, name)
        beside = "by itself" if other is None else f"beside {other}"
        report.add(section, name, sum(parts.values()), "bytes", beside if config.data else "its weights alone")
    most = max(needed, key=lambda name: sum(needed[name].values()))
    total = add_memory(report, needed[most], hardware)
    fits, sentence = fit(total, hardware)
    report.advice.append(f"{sentence} (most while {most} is asked)" if len(needed) > 1 else sentence)
    if fits or config.data is None:
        return
    smaller = config.model_copy(update={"batch_tokens": config.data.length})
    least = sum(_parts(smaller, headers, most, hardware).values())
    if least <= hardware.resolved().memory_bytes:
        report.advice.append(f"would fit with batch_tokens={config.data.length}: {bytes_text(least)}")
    else:
        report.advice.append("no smaller batch is enough: a smaller dtype, or a device with more memory")


def _parts(config: EvaluateConfig, headers: Headers, name: str, hardware: Hardware) -> dict[str, float]:
    """What lies on the device at once while a model reads: its weights and the teacher's, which stays once it is
    loaded; and the larger of what a layer needs for a moment and the logits, beside the last states of both."""
    teacher = config.teacher if config.data is not None and config.teacher in headers.models else None
    held = dict.fromkeys([name] if teacher in (None, name) else [teacher, name])
    items = {one: _itemsize(config, one, hardware) for one in held}
    found = {f"{one}'s weights": float(items[one] * headers.models[one].total) for one in held}
    found["driver and workspaces"] = float(hardware.driver_bytes)
    if config.data is None:
        return found
    n = max(config.data.length, BATCH_TOKENS) if config.batch_tokens == "auto" else config.batch_tokens
    readers = [name, *([beside] if (beside := _beside(config, headers, name)) is not None else [])]
    budget = LOGITS_BYTES if config.logits_bytes == "auto" else config.logits_bytes
    vocab_size = min(headers.models[one].vocab_size for one in readers)
    found["last states"] = float(sum(2 * n * headers.models[one].hidden_size * items[one] for one in readers))
    found["activations"] = max(
        n * passing_bytes(headers.models[one], config.data.length, items[one], masked=config.data.pack)
        for one in readers
    )
    found["logits"] = logits_bytes(vocab_size, len(readers), budget, n)
    return found


def _itemsize(config: EvaluateConfig, name: str, hardware: Hardware) -> int:
    dtype = config.models[name].dtype
    return 4 if dtype == "float32" or (dtype == "auto" and hardware.is_cpu) else 2


def _add_time(report: CostReport, config: EvaluateConfig, headers: Headers, hardware: Hardware) -> None:
    """Reading: each model once, and the teacher once more beside each that is compared with it."""
    assert config.data is not None
    length, each = config.data.length, 0.0
    for name, model in headers.models.items():
        own = forward_flops(model, length)
        beside = _beside(config, headers, name)
        report.add(ARITHMETIC, f"{name}, forward", own, "FLOP", "" if beside is None else f"and {beside}'s once more")
        each += own + (0.0 if beside is None else forward_flops(headers.models[beside], length))
    tokens, why = most_tokens(config.data)
    if hardware.data_tokens is not None and (tokens is None or hardware.data_tokens <= tokens):
        tokens, why = hardware.data_tokens, "as data_tokens says"
    add_time(report, hardware, each, tokens, f"of the text, which all models read; {why}")
    report.assumptions += [
        "all of the text's tokens are read, padding is not counted, and measuring each model's speed takes 5 s more at "
        "the most, which is not counted; nor are the loading of models and the bootstrap",
    ]
    if headers.alone is None and any(_beside(config, headers, name) for name in headers.models):
        report.assumptions.append(
            "each model is taken to have the teacher's tokenizer, and so to be read beside the teacher; --dry-run of "
            "`evaluate` compares them"
        )


def _add_tasks(report: CostReport, config: EvaluateConfig, headers: Headers) -> None:
    for name, number in headers.questions.items():
        note = "questions to each model" if number is not None else "how many items lm-eval has is known once they load"
        report.add("tasks", name, number, "count", note)
    if config.tasks:
        report.assumptions.append(
            "tasks: how long their questions and answers are is known once they are tokenised, so neither their time "
            "nor the memory of their batches is told (batches are halved until they fit)"
        )

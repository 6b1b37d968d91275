"""The costs of a cut, from headers alone: memory, arithmetic and time of measuring; and the smaller model's size."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from transformers import AutoConfig

from stillroom.config import LOGITS_BYTES
from stillroom.data.config import AnyData, most_tokens
from stillroom.errors import ConfigError
from stillroom.estimates.flops import forward_flops, layers_flops
from stillroom.estimates.hardware import Hardware
from stillroom.estimates.headers import ITEM_BYTES, Headers, read_sizes
from stillroom.estimates.memory import logits_bytes, passing_bytes
from stillroom.estimates.model_size import model_size
from stillroom.estimates.report import CostReport, bytes_text
from stillroom.estimates.sections import ARITHMETIC, add_amount, add_memory, add_parameters, fit, time_section
from stillroom.prune.config import PruneConfig
from stillroom.pruning.config import BestLayers
from stillroom.pruning.plan import plan_pruning

BATCH_TOKENS = 4096
"""The `batch_tokens` that auto means, or the length of a row where that is more."""
OF_TRAINING = ("states", "students", "num_devices", "parallel")
"""Settings of a plan that say nothing of a cut."""
ITEMS = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


def read_headers(config: PruneConfig) -> Headers:
    """The sizes of the model and of the smaller one, from its config.json and the headers of its weights.

    Raises MissingError; DataError where the model is not there, or not whole; ConfigError where its size is not
    headers, or its parts cannot be kept so; MismatchError where it does not have what is to be kept.
    """
    files, model = read_sizes(config.model, config.revision, "the model")
    smaller = plan_pruning(config, AutoConfig.for_model(**files.config), "model").config
    sizes = {"model": model, "smaller model": model_size(smaller, "the smaller model")}
    dtype = config.dtype
    if dtype == "auto":
        dtype = files.config.get("dtype") or files.config.get("torch_dtype")
    if dtype is None:  # the one that most of them are stored in
        itemsize = ITEM_BYTES[max(files.numbers, key=lambda stored: files.numbers[stored])]
    elif dtype in ITEMS:
        itemsize = ITEMS[dtype]
    else:
        raise ConfigError(
            "the type of the model's weights is not known",
            {"dtype": dtype, "known": ", ".join(ITEMS)},
            why="How large it is follows from it.",
            fix="Set dtype to float32 or bfloat16.",
        )
    return Headers(sizes, itemsize=itemsize)


def costs(config: PruneConfig, headers: Headers, hardware: Hardware, title: str = "prune") -> CostReport:
    """Parameters of both models, memory where most is needed, time of measuring, and what is written."""
    hardware.refuse("prune", OF_TRAINING)
    report = CostReport(title, assumptions=hardware.assumptions(single=headers.itemsize == 4))
    for name, model in headers.models.items():
        add_parameters(report, name, model)
    data, measured = config.data, list(passes(config.layers, headers))
    batches = ()
    if data is not None:
        auto = max(data.length, BATCH_TOKENS)
        most = auto if config.batch_tokens == "auto" else config.batch_tokens
        loss = config.held_out is not None or any(one.head for one in measured)
        influence = bool(measured) and getattr(config.layers, "by", None) == "block_influence"
        batches = tuple((n, _reading(headers, loss, influence, data.length, n, data.pack)) for n in (most, data.length))
    _add_memory(report, headers, hardware, batches)
    if data is not None:
        _add_time(report, headers, hardware, measured, data.length, config.documents, config.held_out_data)
    written = headers.itemsize * headers.models["smaller model"].total
    report.add("written", "smaller model", written, "bytes", f"{headers.itemsize} bytes a parameter")
    report.assumptions.append("loading, cutting and writing take as long as the disk does, which is not counted")
    return report


@dataclass(frozen=True)
class Pass:
    """One pass over the text that is measured on."""

    num_layers: int
    """Layers that run."""
    head: bool
    """A loss is taken."""


def passes(rule: object, headers: Headers) -> Iterator[Pass]:
    """Yields what is measured before the cut, pass by pass.

    Args:
        rule: the setting `layers`.
    """
    whole, left = headers.models["model"].num_layers, headers.models["smaller model"].num_layers
    if isinstance(rule, BestLayers) and left < whole:
        yield Pass(whole, rule.by == "loss_increase")
        if rule.by == "loss_increase" and rule.contiguous:
            yield from [Pass(left, True)] * (left + 1)
        elif rule.by == "loss_increase":
            for there in range(whole, left, -1):
                yield from [Pass(there - 1, True)] * there
    if headers.models["model"].shapes.keys() != headers.models["smaller model"].shapes.keys():  # widths change
        yield Pass(left, False)


def _add_memory(
    report: CostReport, headers: Headers, hardware: Hardware, batches: Sequence[tuple[int, dict[str, dict[str, float]]]]
) -> None:
    """Adds the moment that needs most; ``batches`` tells of each size of a batch, largest first, what reading takes."""
    weights = {name: float(headers.itemsize * model.total) for name, model in headers.models.items()}
    stays = {"model's weights": weights["model"], "driver and workspaces": float(hardware.driver_bytes)}
    cutting = {"cutting": {"smaller model's weights": weights["smaller model"]}}
    moments = cutting | (batches[0][1] if batches else {})
    moment = max(moments, key=lambda name: sum(moments[name].values()))
    comes = moments[moment]
    total = add_memory(report, {**stays, **comes}, hardware, dict.fromkeys(comes, f"while {moment}"))
    fits, sentence = fit(total, hardware)
    report.advice.append(sentence)
    if fits:
        return
    for n, fewer in batches[1:]:
        least = sum(stays.values()) + max(sum(parts.values()) for parts in (cutting | fewer).values())
        if least <= hardware.resolved().memory_bytes:
            report.advice.append(f"would fit with batch_tokens={n}: {bytes_text(least)}")
            return
    report.advice.append("no smaller batch is enough: dtype=bfloat16, device=cpu or a device with more memory")


def _reading(
    headers: Headers, loss: bool, influence: bool, length: int, n: int, pack: bool
) -> dict[str, dict[str, float]]:
    """Bytes by part that are needed besides the weights while the model reads batches of n tokens, by what is
    measured: a loss, how far layers turn their input, and widths."""
    model, item = headers.models["model"], headers.itemsize
    activations = {"activations": n * passing_bytes(model, length, item, masked=pack)}
    found = {}
    if loss:
        found["measuring a loss"] = {
            **activations,
            "last states": 2.0 * n * model.hidden_size * item,
            "logits": logits_bytes(model.vocab_size, 1, LOGITS_BYTES, n),
        }
    if influence:
        states = n * (model.num_layers + 1) * model.hidden_size
        found["measuring block influence"] = {
            **activations,
            "what each layer gives out": float(states * item),
            "the same in float32": states * 4.0 if item == 2 else 0.0,
        }
    if model.shapes.keys() != headers.models["smaller model"].shapes.keys():
        widest = max(max(s.intermediate_size, s.query_size, s.hidden_size) for s in model.shapes)
        found["measuring widths"] = {**activations, "copies in float32": 4.0 * n * widest * (3 if item == 2 else 2)}
    return found


def _add_time(
    report: CostReport,
    headers: Headers,
    hardware: Hardware,
    measured: Sequence[Pass],
    length: int,
    documents: int,
    held_out: AnyData | None,
) -> None:
    model, smaller = headers.models["model"], headers.models["smaller model"]
    section, total, left_out = time_section(hardware), 0.0, ""
    if measured:
        head = 2.0 * model.head_entries
        each = sum(layers_flops(model, length, one.num_layers) + head * one.head for one in measured)
        tokens, why = float(documents * length), f"at most: {documents:,} documents of up to {length:,}"
        if headers.num_tokens is not None:
            tokens, why = headers.num_tokens, f"in the first {documents:,} documents"
        elif hardware.data_tokens is not None:
            tokens, why = hardware.data_tokens, "as data_tokens says"
        report.add(ARITHMETIC, "measuring", each, "FLOP", f"{len(measured):,} passes over the text")
        report.add(section, "tokens measured on", tokens, "count", why)
        total += each * tokens
    if held_out is not None:
        each = forward_flops(model, length) + forward_flops(smaller, length)
        tokens, why = most_tokens(held_out) if headers.num_held_out is None else (headers.num_held_out, "")
        report.add(ARITHMETIC, "held out, both models", each, "FLOP")
        report.add(section, "tokens held out", tokens, "count", why.partition(":")[0] if tokens is None else why)
        total += each * (tokens or 0.0)
        left_out = "without what is held out" if tokens is None else ""
    if total:
        add_amount(report, hardware, total, left_out)

"""What a cut will need: memory, arithmetic and time of measuring, and the size of the smaller model; from configs and
headers alone."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from stillroom.data.config import most_tokens
from stillroom.errors import ConfigError
from stillroom.estimates.activations import passing_bytes
from stillroom.estimates.architecture import Architecture, read_architecture
from stillroom.estimates.flops import forward_flops
from stillroom.estimates.hardware import Hardware
from stillroom.estimates.memory import logits_bytes
from stillroom.estimates.pruned_sizes import pruned_values
from stillroom.estimates.report import CostReport, bytes_text
from stillroom.estimates.sections import ARITHMETIC, add_amount, add_memory, add_parameters, fit, time_section
from stillroom.estimates.weights import ITEM_BYTES, ModelFiles, read_architecture_of
from stillroom.prune.config import PruneConfig
from stillroom.pruning.config import BestLayers
from stillroom.pruning.sizes import kept_layers

LOGITS_BYTES = 256 * 2**20
"""The budget for logits where a loss is measured."""
BATCH_TOKENS = 4096
"""What `batch_tokens=auto` is, or the length of a row where that is more."""
OF_TRAINING = ("states", "students", "num_devices", "parallel")
"""Settings of a plan that say nothing of a cut."""
ITEMS = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class PruneHeaders:
    """What headers tell of a cut."""

    model: Architecture
    smaller: Architecture
    itemsize: int
    """Bytes of a number of the weights, of both."""
    num_tokens: float | None = None
    """Tokens that are read of the text that is measured on, where it is tokenised already."""
    num_held_out: float | None = None


def read_headers(config: PruneConfig) -> PruneHeaders:
    """The architectures of the model and of what is cut out of it, from its config.json and the headers of its weights.

    Raises:
        MissingError, DataError: the model is not there, or not whole.
        ConfigError: its architecture is not known, or cannot be cut so.
        MismatchError: it does not have what is to be kept.
    """
    files, model = read_architecture_of(config.model, config.revision, "the model")
    smaller = read_architecture(pruned_values(config, files.config, "model"), "the smaller model")
    return PruneHeaders(model, smaller, _itemsize(config, files))


def _itemsize(config: PruneConfig, files: ModelFiles) -> int:
    """Of the weights: as it is set, as config.json says, or as most of them are stored."""
    name = files.config.get("dtype") or files.config.get("torch_dtype") if config.dtype == "auto" else config.dtype
    if name is None:
        return ITEM_BYTES[max(files.numbers, key=lambda dtype: files.numbers[dtype])]
    if name not in ITEMS:
        raise ConfigError(
            "the type of the model's weights is not known",
            {"dtype": name, "known": ", ".join(ITEMS)},
            why="How large it is follows from it.",
            fix="Set dtype to float32 or bfloat16.",
        )
    return ITEMS[name]


def costs(config: PruneConfig, known: PruneHeaders, hardware: Hardware, title: str = "prune") -> CostReport:
    """Parameters of both models, memory where most is needed, time of measuring, and what is written."""
    hardware.refuse("prune", OF_TRAINING)
    report = CostReport(title, assumptions=hardware.assumptions(single=known.itemsize == 4))
    add_parameters(report, "model", known.model)
    add_parameters(report, "smaller model", known.smaller)
    _add_memory(report, config, known, hardware)
    if config.data is not None:
        _add_time(report, config, known, hardware)
    written = known.itemsize * known.smaller.parameters.total
    report.add("written", "smaller model", written, "bytes", f"{known.itemsize} bytes a parameter")
    report.assumptions.append("loading, cutting and writing take as long as the disk does, which is not counted")
    return report


# --- what is measured ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pass:
    """One pass over the text."""

    num_layers: int
    """Layers that run."""
    head: bool
    """A loss is taken."""


def passes(config: PruneConfig, known: PruneHeaders) -> Iterator[Pass]:
    """What is measured before the cut, pass by pass."""
    rule, whole, left = config.layers, known.model.num_layers, known.smaller.num_layers
    if kept_layers(rule, whole, "model") is None:
        assert isinstance(rule, BestLayers)  # of which alone it is not known
        yield Pass(whole, rule.by == "loss_increase")
        if rule.by == "loss_increase" and rule.contiguous:
            yield from [Pass(left, True)] * (left + 1)
        elif rule.by == "loss_increase":
            for there in range(whole, left, -1):
                yield from [Pass(there - 1, True)] * there
    if known.smaller != replace(known.model, num_layers=left):
        yield Pass(left, False)


def _flops(model: Architecture, one: Pass, length: int) -> float:
    """Of a token in a pass."""
    whole = forward_flops(replace(model, num_layers=one.num_layers), length)
    return whole if one.head else whole - 2.0 * model.head_matmul_parameters


# --- memory ----------------------------------------------------------------------------------------------------------


def _add_memory(report: CostReport, config: PruneConfig, known: PruneHeaders, hardware: Hardware) -> None:
    stays = {
        "model's weights": float(known.itemsize * known.model.parameters.total),
        "driver and workspaces": float(hardware.driver_bytes),
    }
    moment, comes = _most(config, known)
    total = add_memory(report, {**stays, **comes}, hardware, dict.fromkeys(comes, f"while {moment}"))
    fits, sentence = fit(total, hardware)
    report.advice.append(sentence)
    if fits:
        return
    if config.data is not None:
        smaller = config.model_copy(update={"batch_tokens": config.data.length})
        least = sum(stays.values()) + sum(_most(smaller, known)[1].values())
        if least <= hardware.found().memory_bytes:
            report.advice.append(f"would fit with batch_tokens={config.data.length}: {bytes_text(least)}")
            return
    report.advice.append("no smaller batch is enough: dtype=bfloat16, device=cpu or a device with more memory")


def _most(config: PruneConfig, known: PruneHeaders) -> tuple[str, dict[str, float]]:
    """The moment at which most is needed besides the model's weights, and what that is, by part."""
    moments = {"cutting": {"smaller model's weights": float(known.itemsize * known.smaller.parameters.total)}}
    if config.data is not None:
        moments |= _reading(config, known)
    most = max(moments, key=lambda name: sum(moments[name].values()))
    return most, moments[most]


def _reading(config: PruneConfig, known: PruneHeaders) -> dict[str, dict[str, float]]:
    """What is needed besides the weights while the model reads text, by what is measured."""
    assert config.data is not None
    model, item, length = known.model, known.itemsize, config.data.length
    n = max(length, BATCH_TOKENS) if config.batch_tokens == "auto" else config.batch_tokens
    activations = {"activations": n * passing_bytes(model, length, item, masked=config.data.pack)}
    found, rule = {}, config.layers
    measured = list(passes(config, known))
    if any(one.head for one in measured) or config.held_out is not None:
        found["measuring a loss"] = {
            **activations,
            "last states": 2.0 * n * model.hidden_size * item,
            "logits": logits_bytes(model.vocab_size, 1, LOGITS_BYTES, n),
        }
    if isinstance(rule, BestLayers) and measured and rule.by == "block_influence":
        states = n * (model.num_layers + 1) * model.hidden_size
        found["measuring block influence"] = {
            **activations,
            "what each layer gives out": float(states * item),
            "the same in float32": states * 4.0 if item == 2 else 0.0,
        }
    if known.smaller != replace(model, num_layers=known.smaller.num_layers):
        widest = max(model.intermediate_size, model.query_size, model.hidden_size)
        found["measuring widths"] = {**activations, "copies in float32": 4.0 * n * widest * (3 if item == 2 else 2)}
    return found


# --- time ------------------------------------------------------------------------------------------------------------


def _add_time(report: CostReport, config: PruneConfig, known: PruneHeaders, hardware: Hardware) -> None:
    assert config.data is not None
    length, section, total, left_out = config.data.length, time_section(hardware), 0.0, ""
    measured = list(passes(config, known))
    if measured:
        each = sum(_flops(known.model, one, length) for one in measured)
        tokens, why = _measured_tokens(config, known, hardware)
        report.add(ARITHMETIC, "measuring", each, "FLOP", f"{len(measured):,} passes over the text")
        report.add(section, "tokens measured on", tokens, "count", why)
        total += each * tokens
    if config.held_out_data is not None:
        each = forward_flops(known.model, length) + forward_flops(known.smaller, length)
        tokens, why = (known.num_held_out, "") if known.num_held_out is not None else most_tokens(config.held_out_data)
        report.add(ARITHMETIC, "held out, both models", each, "FLOP")
        report.add(section, "tokens held out", tokens, "count", why.partition(":")[0] if tokens is None else why)
        total += each * (tokens or 0.0)
        left_out = "without what is held out" if tokens is None else ""
    if total:
        add_amount(report, hardware, total, left_out)


def _measured_tokens(config: PruneConfig, known: PruneHeaders, hardware: Hardware) -> tuple[float, str]:
    assert config.data is not None
    if known.num_tokens is not None:
        return known.num_tokens, f"in the first {config.documents:,} documents"
    if hardware.data_tokens is not None:
        return hardware.data_tokens, "as data_tokens says"
    most = config.documents * config.data.length
    return float(most), f"at most: {config.documents:,} documents of up to {config.data.length:,}"

"""Memory of one device in training, by part: what stays, and the most that comes on top of it within a step.

    float32 weights 4 P, gradients 4 P, AdamW's two moments 8 P (in 8 bits 2 P); of adapters alone where these are
    trained. Under FSDP each is divided by the devices, and two layers and both ends are gathered whole at a time; under
    DDP each device has all of it, and gradients a second time in buckets. bfloat16 arithmetic has copies of the
    matrices besides.

Within a step these moments are compared, and the largest counts:

    teacher     its widest layer, without gradients
    backward    all activations, the logits chunk, the head's gradients, and the gradients of one layer
    update      all gradients, and those of the embeddings once more where they are summed with others

Activations are counted from what PyTorch saves in the models of `transformers`. Of a layer with h hidden channels,
q channels of all query heads, k of all key heads and i of the MLP, in float32, in numbers for each token:

    each norm over h         input, what it is normalized to, output: 3 h (a norm after a sublayer, 2 h)
    norms over heads         2 (q + k)
    fused attention          queries, keys, values, output: 2 q + 2 k
    attention under a mask   keys and values for every query head, and the mask: 4 q + length
    gated MLP                gate, its activation, the other branch, their product: 4 i
    an expert                4 · its channels + 2 h for each of a token's experts

In bfloat16 (autocast) norms stay float32, and each matrix that reads a norm's output has a copy of it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from stillroom.config import Quantization
from stillroom.estimates.hardware import Parallel
from stillroom.estimates.model_size import Layer, ModelSize
from stillroom.estimates.report import bytes_text

STATE_BYTES = {"float32": 8.0, "int8": 2.0}
"""AdamW's two moments of a parameter; in 8 bits their scales (a number for each 256) are left out."""

ENTRY_BYTES = 24
"""A stored entry as it is read: id, log-probability and count, in a batch and in the one that is read ahead."""

WEIGHT_BYTES: dict[Quantization, float] = {"int8": 1.0, "fp8": 1.0, "nf4": 0.5 + 1 / 64 + 4 / (64 * 256)}
"""Bytes of a quantized weight. Of the 8-bit kinds the scales (one for each output channel) are left out; of nf4 the
scale of each 64, itself in 8 bits with a scale for each 256, is counted."""

MOST_DEVICES = 1024
"""Advice does not name more devices than these."""


def weights_bytes(model: ModelSize, itemsize: int, quantization: Quantization | None) -> float:
    """Bytes of all of a model's weights. Where they are quantized, those of attention and of dense MLPs are;
    embeddings, norms, experts and the head keep their ``itemsize``."""
    if quantization is None:
        return float(itemsize * model.total)
    quantized = model.parts["attention"] + model.parts["mlp"]
    return WEIGHT_BYTES[quantization] * quantized + itemsize * (model.total - quantized)


@dataclass(frozen=True)
class TeacherLoad:
    """A live teacher on the device."""

    model: ModelSize
    itemsize: int
    """Bytes of a number of its arithmetic, and of its weights but those that are quantized."""
    elsewhere: bool = False
    """It has devices of its own; only its head and its output are here."""
    whole: bool = False
    """Whole on each device, also where the student is sharded."""
    quantization: Quantization | None = None


@dataclass(frozen=True)
class Load:
    """What is trained, and how: all that memory follows from."""

    student: ModelSize
    length: int
    micro_tokens: int
    """Tokens that go through the student at once."""
    micro_batches: int = 1
    """How many of these a device has in a step; with more than one, gradients stay between them."""
    half: bool = False
    """Products in bfloat16, by autocast; weights stay float32."""
    checkpointing: bool = False
    masked: bool = False
    flash: bool = False
    vocab_size: int | None = None
    """The entries of the vocabulary that are compared; None is all of the student's."""
    logits_bytes: int = 256 * 2**20
    keeps_logits: bool = False
    """The buffers for logits are kept from step to step, as on a CPU."""
    states: Literal["float32", "int8"] = "float32"
    frozen: frozenset[str] = frozenset()
    """Names of the student's parameters that are not trained."""
    adapter_parameters: int = 0
    """Parameters of low-rank adapters."""
    teacher: TeacherLoad | None = None
    stored_entries: float = 0.0
    """Entries of a position, where the teacher is a store."""
    hidden_pairs: int = 0
    """Layers whose inner states are compared."""
    teacher_width: int = 0
    """Hidden channels of the teacher, live or stored, where inner states are compared."""
    objective: bool = True
    """An objective needs the logits."""
    driver_bytes: int = 0
    heap_share: float = 0.0
    """What the allocator keeps of memory that was freed, as a share of the activations."""
    num_devices: int = 1
    parallel: Parallel = "none"

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch: as many whole rows as go into it."""
        return max(1, self.micro_tokens // self.length) * self.length

    @property
    def trained(self) -> int:
        """Parameters that have a gradient, those of projections of inner states among them."""
        frozen = sum(self.student.weights[name].count for name in self.frozen)
        projections = self.hidden_pairs * self.student.hidden_size * self.teacher_width
        return self.student.total - frozen + self.adapter_parameters + projections

    @property
    def share(self) -> float:
        """The share of what FSDP divides that lies on one device."""
        return 1 / self.num_devices if self.parallel == "fsdp" else 1.0


@dataclass(frozen=True)
class Memory:
    """Bytes on one device."""

    stays: Mapping[str, float]
    """From step to step, by part."""
    moment: str
    """The moment of a step at which most is needed."""
    comes: Mapping[str, float]
    """What comes on top at that moment, by part."""

    @property
    def total(self) -> float:
        return sum(self.stays.values()) + sum(self.comes.values())


def memory(load: Load) -> Memory:
    """The most that a step needs on one device."""
    stays, backward = _stays(load), _backward_moment(load)
    stays["freed and kept"] = load.heap_share * (backward["activations"] + backward["gradients of one layer"])
    gradients, head = {"gradients": 4.0 * load.trained * load.share}, load.student.head
    # A second gradient of the embeddings is added to the first: of a tied head, or of an earlier micro-batch.
    summed = head not in load.frozen and (load.student.tied or load.micro_batches > 1)
    embeddings = 4.0 * load.student.head_entries if summed else 0.0
    asked: dict[str, float] = {}
    if (teacher := load.teacher) is not None:
        passing = 0.0 if teacher.elsewhere else passing_bytes(
            teacher.model, load.length, teacher.itemsize, masked=load.masked
        )  # fmt: skip
        asked = {"teacher's activations": load.tokens * passing, "teacher's states": _teacher_output(load)}
    moments = {
        "teacher": asked,
        "backward": backward,
        "update": {**gradients, "gradient of the embeddings": embeddings},
    }
    if load.micro_batches > 1:
        for name in ("teacher", "backward"):
            moments[name] = {**gradients, **moments[name]}
    most = max(moments, key=lambda name: sum(moments[name].values()))
    parts = {name: value for name, value in moments[most].items() if value}
    return Memory({name: value for name, value in stays.items() if value}, most, parts)


def _stays(load: Load) -> dict[str, float]:
    share, student = load.share, load.student
    held = student.total + load.adapter_parameters + load.hidden_pairs * student.hidden_size * load.teacher_width
    found = {
        "student's weights": 4.0 * held * share,
        "optimizer's states": STATE_BYTES[load.states] * load.trained * share,
        "gathered layers": _gathered(student, 2 if load.half else 4) if load.parallel == "fsdp" else 0.0,
        "DDP's buckets": 4.0 * load.trained if load.parallel == "ddp" else 0.0,
        "driver and workspaces": float(load.driver_bytes),
    }
    if load.teacher is not None:
        model, item = load.teacher.model, load.teacher.itemsize
        divided = load.parallel == "fsdp" and not load.teacher.whole and not load.teacher.elsewhere
        if load.teacher.elsewhere:
            found["teacher's head"] = item * model.head_entries
        else:
            weights = weights_bytes(model, item, load.teacher.quantization)
            found["teacher's weights"] = weights * (share if divided else 1.0)
        if divided:
            found["gathered layers"] = max(found["gathered layers"], _gathered(model, item))
    if load.keeps_logits:
        found["logits"] = _logits(load)
    return found


def _gathered(model: ModelSize, itemsize: int) -> float:
    """Two layers, the one in use and the next, with the embeddings and the head."""
    ends = model.parts["embeddings"] + model.parts["head"]
    return itemsize * (2.0 * model.layer_parameters + ends)


def _teacher_output(load: Load) -> float:
    """Bytes of the teacher's output for a micro-batch: its last states and inner ones, or stored entries and states."""
    if load.teacher is not None:
        width, item = load.teacher.model.hidden_size, load.teacher.itemsize
        return load.tokens * width * item * (1.0 + load.hidden_pairs)
    return load.tokens * (load.stored_entries * ENTRY_BYTES + 2 * 4.0 * load.hidden_pairs * load.teacher_width)


def _logits(load: Load) -> float:
    """The fused head's chunk: logits of the student, and of a live teacher."""
    if not load.objective:
        return 0.0
    buffers = 1 if load.teacher is None else 2
    return logits_bytes(load.vocab_size or load.student.vocab_size, buffers, load.logits_bytes, load.tokens)


def logits_bytes(vocab_size: int, buffers: int, budget: int, tokens: int) -> float:
    """Bytes of float32 buffers of logits: within a budget as many rows as there are tokens, and one at the least."""
    rows = max(1, budget // (vocab_size * 4 * buffers))
    return 4.0 * buffers * vocab_size * min(rows, tokens)


def _backward_moment(load: Load) -> dict[str, float]:
    student, n, h = load.student, load.tokens, load.student.hidden_size
    item = 2 if load.half else 4
    layer = n * layer_bytes(
        student,
        load.length,
        half=load.half,
        masked=load.masked,
        frozen=all(name in load.frozen for name, weight in student.weights.items() if weight.part == "norms"),
        flash=load.flash,
    )
    kept = student.num_layers * 4.0 * h * n + layer if load.checkpointing else student.num_layers * layer
    ends = n * h * 4.0 * 4  # the final norm's input, its normal form and its output, and the gradient of that
    head = 4.0 * student.head_entries if student.head not in load.frozen and load.objective else 0.0
    inner = load.hidden_pairs * n * 4.0 * (h + 3 * load.teacher_width)
    matrices = student.parts["attention"] + student.parts["mlp"] + student.parts["experts"] + student.head_entries
    return {
        "activations": kept + ends,
        "gradients of one layer": n * gradient_bytes(student, item),
        "head's gradient": head,
        "bfloat16 copies": 2.0 * matrices if load.half and load.parallel != "fsdp" else 0.0,
        "logits": 0.0 if load.keeps_logits else _logits(load),
        "teacher's signal": _teacher_output(load),
        "compared inner states": inner,
    }


# --- activations -----------------------------------------------------------------------------------------------------
def layer_bytes(
    model: ModelSize,
    length: int,
    *,
    half: bool = False,
    masked: bool = False,
    frozen: bool = False,
    flash: bool = False,
) -> float:
    """Bytes of a token that one layer keeps for the backward pass; the mean where layers differ.

    Args:
        half: products are in bfloat16.
        masked: several documents share a row, or rows are padded, so that attention goes by a mask.
        frozen: the norms' weights are not trained, as beside adapters.
        flash: attention is by FlashAttention, which needs no mask.

    Raises:
        ConfigError: the model's layers are not attention and an MLP.
    """
    item = 2 if half else 4

    def each(layer: Layer) -> float:
        h, q, k = layer.hidden_size, layer.query_size, layer.key_size
        norms = 4 * h * (layer.norms if layer.layer_norms else layer.norms * (1 if frozen else 2))
        readers = (1 if layer.fused_qkv else 3) + layer.mlp_inputs
        norms += item * h * (readers if half else 2)
        norms += 8 * (q + k) * layer.head_norms + item * h * layer.dropouts
        attention = 2 * q + 2 * k + (q + k + h if layer.fused_qkv and layer.rotary else 0)
        if layer.squares:
            attention = 4 * q + layer.squares * layer.num_heads * length
        elif masked and not flash:
            attention = 4 * q + length
        experts = layer.experts_per_token * (layer.mlp_tensors * layer.expert_size + 2 * h)
        mlp = layer.mlp_tensors * (layer.intermediate_size + layer.shared_size) + experts
        return norms + item * (attention + mlp)

    return sum(number * each(layer) for layer, number in model.shapes.items()) / model.num_layers


def passing_bytes(model: ModelSize, length: int, itemsize: int, *, masked: bool = False) -> float:
    """Bytes of a token while it goes through the widest layer without a gradient: its states and the MLP's branches, or
    the attention where that is more.

    Args:
        masked: several documents share a row, or rows are padded.

    Raises:
        ConfigError: the model's layers are not attention and an MLP.
    """

    def each(layer: Layer) -> float:
        h, heads, capped = layer.hidden_size, layer.num_heads, layer.capped and not layer.attention_dropout
        states = 4 * h + 2 * layer.query_size // heads if layer.rotary else 2 * h
        mlp = float(itemsize * (layer.mlp_tensors - (layer.mlp_inputs == 2)) * layer.intermediate_size)
        if layer.experts_per_token:
            routed = layer.experts_per_token * (3 * layer.expert_size + 2 * h)
            mlp = itemsize * (routed + 3.0 * (layer.shared_size + h))
        attention = itemsize * (2.0 * layer.query_size + 2 * layer.key_size)
        if capped:  # scores and their softmax, which is float32; two masks
            attention += length * (heads * (8 if itemsize == 4 else 10) + 2 * itemsize)
        return itemsize * states + max(mlp, attention) + (masked and not capped) * length

    return max(each(layer) for layer in model.shapes)


def gradient_bytes(model: ModelSize, itemsize: int) -> float:
    """Bytes of a token while one layer's gradients are formed: those of the MLP's branches and of the residual."""
    wide = max(
        layer.intermediate_size + layer.experts_per_token * layer.expert_size + layer.shared_size
        for layer in model.shapes
    )
    return itemsize * (2 * model.hidden_size + 2 * wide)


# --- advice ----------------------------------------------------------------------------------------------------------
def nearest(load: Load, memory_bytes: float) -> str:
    """What to change of a load that does not fit, so that it does; the fewest changes first."""
    for changes in WAYS:
        changed, words = load, []
        for change in changes:
            step = change(changed, memory_bytes)
            if step is None:
                break
            changed, word = step
            words.append(word)
        else:
            total = memory(changed).total
            if total <= memory_bytes:
                return f"would fit with {' and '.join(words)}: {bytes_text(total)}"
    return f"no smaller micro-batch, checkpointing, store or FSDP over up to {MOST_DEVICES} devices is enough"


def _smaller(load: Load, memory_bytes: float) -> tuple[Load, str] | None:
    """Halves the micro-batch until the rest fits, or one row is left."""
    if load.tokens <= load.length:
        return None
    while load.tokens > load.length and memory(load).total > memory_bytes:
        rows = load.tokens // load.length
        fewer = max(1, rows // 2)
        batches = -(-rows // fewer) * load.micro_batches
        load = replace(load, micro_tokens=fewer * load.length, micro_batches=batches)
    return load, f"batch.micro_tokens={load.tokens}"


def _one_row(load: Load, memory_bytes: float) -> tuple[Load, str] | None:  # noqa: ARG001
    if load.tokens <= load.length:
        return load, "a row at a time"
    batches = load.micro_batches * (load.tokens // load.length)
    return replace(load, micro_tokens=load.length, micro_batches=batches), f"batch.micro_tokens={load.length}"


def _checkpointing(load: Load, memory_bytes: float) -> tuple[Load, str] | None:  # noqa: ARG001
    return None if load.checkpointing else (replace(load, checkpointing=True), "student.gradient_checkpointing=true")


def _offline(load: Load, memory_bytes: float) -> tuple[Load, str] | None:  # noqa: ARG001
    if load.teacher is None:
        return None
    stored = replace(load, teacher=None, stored_entries=20.0)
    return stored, "what `stillroom capture` stores of the teacher (teacher.kind=store)"


def _sharded(load: Load, memory_bytes: float) -> tuple[Load, str] | None:
    """The fewest devices, by doubling, over which FSDP makes it fit."""
    count = 2 * load.num_devices if load.parallel == "fsdp" else max(2, load.num_devices)
    while count <= MOST_DEVICES:
        spread = replace(load, parallel="fsdp", num_devices=count)
        if memory(spread).total <= memory_bytes:
            return spread, f"parallel=fsdp over num_devices={count}"
        count *= 2
    return None


WAYS = (
    (_smaller,),
    (_checkpointing,),
    (_offline,),
    (_checkpointing, _smaller),
    (_offline, _smaller),
    (_offline, _checkpointing),
    (_offline, _checkpointing, _smaller),
    (_sharded,),
    (_checkpointing, _sharded),
    (_checkpointing, _one_row, _sharded),
    (_offline, _checkpointing, _one_row, _sharded),
)
"""Changes of a load that are tried together, the fewest first. Each gives the load with one setting changed and the
setting in words; None where there is nothing to change."""

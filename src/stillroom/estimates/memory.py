"""Memory of one device in training, by part: what stays, and the most that comes on top of it within a step.

    float32 weights 4 P, gradients 4 P, AdamW's two moments 8 P (in 8 bits 2 P); of adapters alone where these are
    trained. Under FSDP each is divided by the devices, and two layers and both ends are gathered whole at a time; under
    DDP each device has all of it, and gradients a second time in buckets. bfloat16 arithmetic has copies of the
    matrices besides.

Within a step these moments are compared, and the largest counts:

    teacher     its widest layer, without gradients
    backward    all activations, the logits chunk, the head's gradients, and the gradients of one layer
    update      all gradients, and those of the embeddings once more where they are summed with others
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from stillroom.estimates.activations import gradient_bytes, layer_bytes, passing_bytes
from stillroom.estimates.architecture import Architecture
from stillroom.estimates.quantized import weights_bytes
from stillroom.models.config import Quantization

Parallel = Literal["none", "ddp", "fsdp"]

STATE_BYTES = {"float32": 8.0, "int8": 2.0}
"""AdamW's two moments of a parameter; in 8 bits their scales (a number for each 256) are left out."""

DRIVER_BYTES = 2**30
"""Assumed of a GPU: its context, the libraries' workspaces and what the allocator cannot use."""

HEAP_SHARE = 0.5
"""Assumed of a CPU: what glibc keeps of memory that came and went, as a share of the activations. It depends on how
pieces of all sizes come and go, and was 0.2 to 1.8 in the six runs of benchmarks/memory.py, to which this is
fitted; where glibc is told to give all back, it is nothing."""

ENTRY_BYTES = 24
"""A stored entry as it is read: id, log-probability and count, in a batch and in the one that is read ahead."""


@dataclass(frozen=True)
class Adapters:
    """Low-rank adapters."""

    num_parameters: int


@dataclass(frozen=True)
class TeacherLoad:
    """A live teacher on the device."""

    model: Architecture
    itemsize: int
    """Bytes of a number of its arithmetic, and of its weights but those that are quantised."""
    elsewhere: bool = False
    """It has devices of its own; its head is here, and what it says."""
    whole: bool = False
    """Whole on each device, also where the student is sharded."""
    quantization: Quantization | None = None


@dataclass(frozen=True)
class Load:
    """What is trained, and how: all that memory follows from."""

    student: Architecture
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
    columns: int | None = None
    """Compared columns of the heads; None is all."""
    logits_bytes: int = 256 * 2**20
    keeps_logits: bool = False
    """The buffers for logits are kept from step to step, as on a CPU."""
    states: Literal["float32", "int8"] = "float32"
    adapters: Adapters | None = None
    teacher: TeacherLoad | None = None
    stored_entries: float = 0.0
    """Of a position, where a store is learnt from."""
    hidden_pairs: int = 0
    """Layers whose inner states are compared."""
    teacher_width: int = 0
    """Hidden channels of the teacher, live or stored, where inner states are compared."""
    objective: bool = True
    """Something is asked of the logits."""
    driver_bytes: int = 0
    heap_share: float = 0.0
    """What the allocator keeps of memory that was freed, as a share of the activations."""
    num_devices: int = 1
    parallel: Parallel = "none"

    @property
    def tokens(self) -> int:
        """In a micro-batch: as many whole rows as go into it."""
        return max(1, self.micro_tokens // self.length) * self.length


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
    gradients = {"gradients": _gradients(load)}
    moments = {
        "teacher": _teacher_moment(load),
        "backward": backward,
        "update": {**gradients, "gradient of the embeddings": _embedding_gradient(load)},
    }
    if load.micro_batches > 1:
        for name in ("teacher", "backward"):
            moments[name] = {**gradients, **moments[name]}
    most = max(moments, key=lambda name: sum(moments[name].values()))
    parts = {name: value for name, value in moments[most].items() if value}
    return Memory({name: value for name, value in stays.items() if value}, most, parts)


def trained_parameters(load: Load) -> float:
    own = load.student.parameters.total if load.adapters is None else load.adapters.num_parameters
    return own + load.hidden_pairs * load.student.hidden_size * load.teacher_width


def _share(load: Load) -> float:
    """How much of what is divided lies on one device."""
    return 1 / load.num_devices if load.parallel == "fsdp" else 1.0


def _stays(load: Load) -> dict[str, float]:
    share, trained = _share(load), trained_parameters(load)
    frozen = 0 if load.adapters is None else load.student.parameters.total
    found = {
        "student's weights": 4.0 * (trained + frozen) * share,
        "optimizer's states": STATE_BYTES[load.states] * trained * share,
        "gathered layers": _gathered(load.student, 2 if load.half else 4) if load.parallel == "fsdp" else 0.0,
        "DDP's buckets": 4.0 * trained if load.parallel == "ddp" else 0.0,
        "driver and workspaces": float(load.driver_bytes),
    }
    if load.teacher is not None:
        model, item = load.teacher.model, load.teacher.itemsize
        divided = load.parallel == "fsdp" and not load.teacher.whole and not load.teacher.elsewhere
        if load.teacher.elsewhere:
            found["teacher's head"] = item * model.head_matmul_parameters
        else:
            weights = weights_bytes(model, item, load.teacher.quantization)
            found["teacher's weights"] = weights * (share if divided else 1.0)
        if divided:
            found["gathered layers"] = max(found["gathered layers"], _gathered(model, item))
    if load.keeps_logits:
        found["logits"] = _logits(load)
    return found


def _gathered(model: Architecture, itemsize: int) -> float:
    """Two layers, the one in use and the next, with the embeddings and the head."""
    ends = model.parameters.embeddings + model.parameters.head
    return itemsize * (2.0 * model.layer_parameters + ends)


def _gradients(load: Load) -> float:
    return 4.0 * trained_parameters(load) * _share(load)


def _embedding_gradient(load: Load) -> float:
    """A second gradient of the embeddings, to be added to the first: of the head where it is the same matrix, or of
    the micro-batches before."""
    summed = load.student.tied or load.micro_batches > 1
    return 4.0 * load.student.head_matmul_parameters if summed and load.adapters is None else 0.0


def _teacher_moment(load: Load) -> dict[str, float]:
    if load.teacher is None:
        return {}
    model, item = load.teacher.model, load.teacher.itemsize
    each = 0.0 if load.teacher.elsewhere else passing_bytes(model, load.length, item, masked=load.masked)
    return {"teacher's activations": load.tokens * each, "teacher's states": _told(load)}


def _told(load: Load) -> float:
    """What the teacher says of a micro-batch: its last state and inner ones, or stored entries and states."""
    if load.teacher is not None:
        width, item = load.teacher.model.hidden_size, load.teacher.itemsize
        return load.tokens * width * item * (1.0 + load.hidden_pairs)
    return load.tokens * (load.stored_entries * ENTRY_BYTES + 2 * 4.0 * load.hidden_pairs * load.teacher_width)


def _logits(load: Load) -> float:
    """The fused head's chunk: logits of the student, and of a live teacher."""
    if not load.objective:
        return 0.0
    buffers = 1 if load.teacher is None else 2
    return logits_bytes(load.columns or load.student.vocab_size, buffers, load.logits_bytes, load.tokens)


def logits_bytes(columns: int, buffers: int, budget: int, tokens: int) -> float:
    """What float32 buffers of logits take: within a budget as many rows as there are tokens, and one at the least."""
    rows = max(1, budget // (columns * 4 * buffers))
    return 4.0 * buffers * columns * min(rows, tokens)


def _backward_moment(load: Load) -> dict[str, float]:
    student, n, h = load.student, load.tokens, load.student.hidden_size
    item = 2 if load.half else 4
    layer = n * layer_bytes(
        student,
        load.length,
        half=load.half,
        masked=load.masked,
        frozen=load.adapters is not None,
        flash=load.flash,
    )
    kept = student.num_layers * 4.0 * h * n + layer if load.checkpointing else student.num_layers * layer
    ends = n * h * 4.0 * 4  # the final norm's input, its normal form and its output, and the gradient of that
    head = 4.0 * student.head_matmul_parameters if load.adapters is None and load.objective else 0.0
    inner = load.hidden_pairs * n * 4.0 * (h + 3 * load.teacher_width)
    own = student.parameters
    copies = 2.0 * (own.attention + own.mlp + own.experts + student.head_matmul_parameters) if load.half else 0.0
    return {
        "activations": kept + ends,
        "gradients of one layer": n * gradient_bytes(student, item),
        "head's gradient": head,
        "bfloat16 copies": copies if load.parallel != "fsdp" else 0.0,
        "logits": 0.0 if load.keeps_logits else _logits(load),
        "teacher's signal": _told(load),
        "compared inner states": inner,
    }


def halved(load: Load) -> Load:
    """The same with half of the rows in a micro-batch, twice as often."""
    rows = load.tokens // load.length
    fewer = max(1, rows // 2)
    return replace(load, micro_tokens=fewer * load.length, micro_batches=-(-rows // fewer) * load.micro_batches)

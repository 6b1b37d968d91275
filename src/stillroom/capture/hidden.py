"""Hidden states: the teacher's inner states as a capture keeps them, and what they will take."""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PretrainedConfig

from stillroom.capture import windows
from stillroom.capture.config import CaptureConfig
from stillroom.errors import MismatchError, NonFiniteError
from stillroom.layers import Layer
from stillroom.signals import HiddenStates
from stillroom.store.config import HiddenStatesConfig
from stillroom.store.quantize import MAX_STATE, encode_hidden, hidden_bytes_per_position

WINDOW_BYTES = 2**28
"""The documents that are asked about together have at most so many bytes of hidden states, or are one."""


def encoded(
    inner: HiddenStates, config: HiddenStatesConfig, width: int, rows: slice, where: Callable[[int], tuple[int, int]]
) -> bytes:
    """The states of one document, rows of a batch's, as a store keeps them.

    Args:
        where: tells the document and the position of a row.

    Raises:
        NonFiniteError: a state has a channel that is no number, or larger than bfloat16 can be.
        MismatchError: a layer has another width than the model.
    """
    for layer in config.layers:
        if inner.states[layer].shape[-1] != width:
            raise _other_width(layer, inner.states[layer].shape[-1], width)
    states = torch.stack([inner.states[layer][rows].float() for layer in config.layers])
    wrong = ~(states.abs() <= MAX_STATE)
    if wrong.any():
        place, row = wrong.any(-1).nonzero()[0].tolist()
        raise _not_finite(config.layers[place], *where(rows.start + row), states[place, row])
    return encode_hidden(states, config)


def window_documents(config: CaptureConfig, teacher: PretrainedConfig | None) -> int:
    """How many documents are asked about together."""
    each = config.data.length * (1 if config.generate is None else config.generate.answers)
    return max(1, min(windows.WINDOW_DOCUMENTS, WINDOW_BYTES // max(1, each * position_bytes(config, teacher))))


def position_bytes(config: CaptureConfig, teacher: PretrainedConfig | None) -> int:
    """What the hidden states of one position take, exactly; 0 where none are kept."""
    if config.hidden is None or teacher is None:
        return 0
    return hidden_bytes_per_position(config.hidden, teacher.get_text_config().hidden_size)


def size_text(config: CaptureConfig, teacher: PretrainedConfig | None, counts: tuple[int, int] | None) -> str:
    """What the hidden states of a capture will take, in words; in all where its documents and positions are known."""
    assert config.hidden is not None
    each = position_bytes(config, teacher)
    layers = ", ".join(map(str, config.hidden.layers))
    text = f"layers {layers} in {config.hidden.format}, {each:,} bytes a position"
    if counts is None:
        return f"{text}; in all: not known before the data are tokenised"
    count, positions = counts
    total = f"{positions * each:,} bytes ({positions * each / 2**20:,.1f} MiB)"
    most = "at most " if config.generate is not None else ""
    return f"{text}; {count:,} documents, {most}{positions:,} positions: {most}{total}"


def _not_finite(layer: Layer, number: int, position: int, state: Tensor) -> NonFiniteError:
    wrong = int((~(state.abs() <= MAX_STATE)).sum())
    kind = "not a number" if state.isnan().any() else "infinite or too large for bfloat16"
    return NonFiniteError(
        f"the teacher's hidden states are not finite in document {number}",
        {
            "position": f"{position} (from 0)",
            "layer": layer,
            "channels": f"{wrong} of {len(state)} are {kind}",
        },
        why="There is nothing that a student could learn. What is in whole shards is kept.",
        fix="Check its weights. Where they are good, teacher.engine.dtype=float32 or another teacher.engine.attention "
        "may mend it, with --overwrite; so may leaving out that document or that layer.",
    )


def _other_width(layer: Layer, found: int, width: int) -> MismatchError:
    return MismatchError(
        f"layer {layer} of the teacher has another width than its config says",
        {f"layer {layer}": f"{found} channels", "hidden_size": f"{width} channels"},
        why="A store holds states of one width.",
        fix="Leave out that layer of hidden.layers.",
    )

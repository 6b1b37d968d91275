"""Activations: what a layer keeps of each token for the backward pass, and what it needs for a moment.

Counted from what PyTorch saves in the models of `transformers`. Of a layer with h hidden channels, q channels of all
query heads, k of all key heads and i of the MLP, in float32, in numbers for each token:

    each norm over h         input, what it is normalised to, output: 3 h (a norm after a sublayer, 2 h)
    norms over heads         2 (q + k)
    fused attention          queries, keys, values, output: 2 q + 2 k
    attention under a mask   keys and values for every query head, and the mask: 4 q + length
    gated MLP                gate, its activation, the other branch, their product: 4 i
    an expert                4 · its channels + 2 h for each of a token's experts

In bfloat16 (autocast) norms stay float32, and each matrix that reads a norm's output has a copy of it.
"""

from stillroom.estimates.architecture import Architecture


def layer_bytes(
    model: Architecture,
    length: int,
    *,
    half: bool = False,
    masked: bool = False,
    frozen: bool = False,
    flash: bool = False,
) -> float:
    """Bytes of a token that one layer keeps for the backward pass; the mean where only some have experts.

    Args:
        half: products are in bfloat16.
        masked: several documents share a row, or rows are padded, so that attention goes by a mask.
        frozen: the norms' weights are not trained, as beside adapters.
        flash: attention is by FlashAttention, which needs no mask.
    """
    kind, item = model.kind, 2 if half else 4
    h, q, k = model.hidden_size, model.query_size, model.key_size
    after = kind.norms - 2
    norms = 4 * h * (kind.norms * (1 if frozen else 2) if not kind.layer_norms else kind.norms)
    readers = (1 if kind.fused_matrices else 3) + (1 if kind.fused_matrices or not kind.gated else 2)
    norms += item * h * (readers if half else kind.norms - after)
    norms += 8 * (q + k) * kind.head_norms + item * h * kind.dropouts
    attention = 2 * q + 2 * k + (q + k + h if kind.fused_matrices else 0)
    if kind.squares:
        attention = 4 * q + kind.squares * model.num_heads * length
    elif masked and not flash:
        attention = 4 * q + length
    dense = kind.mlp_tensors * model.intermediate_size
    expert = kind.mlp_tensors * model.expert_size + 2 * h
    sparse = model.experts_per_token * expert + kind.mlp_tensors * model.shared_size
    share = model.num_sparse_layers / model.num_layers
    return norms + item * (attention + (1 - share) * dense + share * sparse)


def passing_bytes(model: Architecture, length: int, itemsize: int, *, masked: bool = False) -> float:
    """Bytes of a token while it goes through one layer without a gradient: its states and the MLP's branches, or the
    attention where that is more.

    Args:
        masked: several documents share a row, or rows are padded.
    """
    kind, h = model.kind, model.hidden_size
    states = 2 * h if kind.learned_positions else 4 * h + 2 * model.head_dim
    tensors = kind.mlp_tensors - (kind.gated and not kind.fused_matrices)
    wide = model.intermediate_size if model.num_sparse_layers < model.num_layers else 0
    routed = model.experts_per_token * (3 * model.expert_size + 2 * h) + 3 * model.shared_size
    routed += 3 * h if model.num_sparse_layers else 0
    attention = itemsize * (2.0 * model.query_size + 2 * model.key_size)
    if kind.squares and not kind.dropouts:  # capped: scores and their softmax, which is float32; two masks
        attention += length * (model.num_heads * (8 if itemsize == 4 else 10) + 2 * itemsize)
        masked = False
    return itemsize * states + max(itemsize * max(tensors * wide, routed), attention) + masked * length


def gradient_bytes(model: Architecture, itemsize: int) -> float:
    """Bytes of a token while one layer's gradients are formed: those of the MLP's branches and of the residual."""
    wide = max(model.intermediate_size, model.experts_per_token * model.expert_size + model.shared_size)
    return itemsize * (2 * model.hidden_size + 2 * wide)

"""How many parameters low-rank adapters have."""

from collections.abc import Sequence

from stillroom.errors import ConfigError
from stillroom.estimates.architecture import Architecture


def linear_layers(model: Architecture) -> dict[str, tuple[int, int]]:
    """The linear layers of a block that adapters can be put beside, by name: inputs and outputs. Experts are no linear
    layers in `transformers`, and have none."""
    h, q, k = model.hidden_size, model.query_size, model.key_size
    size = model.intermediate_size
    if model.family == "gpt2":
        return {"c_attn": (h, q + 2 * k), "c_proj": (q, h), "mlp.c_proj": (size, h), "c_fc": (h, size)}
    if model.kind.fused_matrices:
        return {"qkv_proj": (h, q + 2 * k), "o_proj": (q, h), "gate_up_proj": (h, 2 * size), "down_proj": (size, h)}
    found = {"q_proj": (h, q), "k_proj": (h, k), "v_proj": (h, k), "o_proj": (q, h)}
    if size and model.num_sparse_layers < model.num_layers:
        found |= {"gate_proj": (h, size), "up_proj": (h, size), "down_proj": (size, h)}
    return found


def adapter_parameters(model: Architecture, rank: int, targets: Sequence[str] | str = "all-linear") -> int:
    """rank · (inputs + outputs) of each layer that has an adapter; the head has none.

    Raises:
        ConfigError: a target is no linear layer of a block.
    """
    known = linear_layers(model)
    chosen = list(known) if targets == "all-linear" else list(targets)
    total = 0
    for name in chosen:
        matching = [size for own, size in known.items() if own.rpartition(".")[2] == name.rpartition(".")[2]]
        if not matching:
            raise ConfigError(
                f"adapters beside `{name}` are not counted",
                {"student.lora.targets": name, f"linear layers of a {model.family}": ", ".join(known)},
                why="Their size follows from the inputs and outputs of the layer.",
                fix="Name linear layers of the blocks, or all-linear.",
            )
        dense = model.num_layers - model.num_sparse_layers if name in MLP else model.num_layers
        total += dense * rank * sum(sum(size) for size in ([known[name]] if name in known else matching))
    return total


MLP = ("gate_proj", "up_proj", "down_proj")

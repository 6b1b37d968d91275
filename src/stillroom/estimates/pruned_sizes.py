"""The sizes of a part of a model, by its settings and the model's config.json alone."""

from collections.abc import Mapping
from typing import Any

from stillroom.errors import ConfigError
from stillroom.estimates.architecture import Architecture, read_architecture
from stillroom.pruning.config import BestLayers, Layers, PruningConfig, Width
from stillroom.pruning.sizes import check_most, kept_layers

WIDTHS = ("hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size")


def pruned_values(cut: PruningConfig, source: Mapping[str, Any], who: str) -> Mapping[str, Any]:
    """The config of a part of a model: how many layers it keeps, and its widths.

    Args:
        who: what an error calls the model.

    Raises:
        ConfigError: the model's architecture is not known, or the width is no whole share of its heads and channels.
        MismatchError: it does not have what is to be kept.
    """
    model = read_architecture(source, f"the {who}")
    there: Mapping[str, int] = dict(
        zip(WIDTHS, (model.hidden_size, model.num_heads, model.num_kv_heads, model.intermediate_size), strict=True)
    )
    found = {**source, "num_hidden_layers": num_kept(cut.layers, model.num_layers, who)}
    if cut.width is None:
        return found
    asked = _named(cut.width, model) if isinstance(cut.width, Width) else _in_proportion(cut.width, there)
    check_most(asked, there, who)
    return {**found, **there, "head_dim": model.head_dim, **asked}


def _named(width: Width, model: Architecture) -> dict[str, int]:
    asked = {name: value for name in WIDTHS if (value := getattr(width, name)) is not None}
    if "num_attention_heads" in asked and "num_key_value_heads" not in asked:
        asked["num_key_value_heads"] = asked["num_attention_heads"] * model.num_kv_heads // model.num_heads
    return asked


def _in_proportion(hidden_size: int, there: Mapping[str, int]) -> dict[str, int]:
    whole = there["hidden_size"]
    if any(number * hidden_size % whole for number in there.values()):
        raise ConfigError(
            f"width={hidden_size} is not a whole share of heads and MLP channels",
            {"width": f"{hidden_size} of {whole}", **{name: there[name] for name in WIDTHS[1:]}},
            why="A width by itself cuts all of them in the same proportion.",
            fix="Give them by name: width={hidden_size: …, num_attention_heads: …, intermediate_size: …}.",
        )
    return {name: number * hidden_size // whole for name, number in there.items()}


def num_kept(rule: Layers | None, num_layers: int, who: str) -> int:
    """How many layers a rule keeps of so many, which is known even where it has to be measured which."""
    kept = kept_layers(rule, num_layers, who)
    if kept is not None:
        return len(kept)
    assert isinstance(rule, BestLayers)  # of which alone it is not known
    return rule.count

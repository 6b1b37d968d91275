"""The sizes of a part of a model, by its settings and the model's config.json alone: no torch, and nothing is checked
that ``cut/plan.py`` checks."""

from collections.abc import Mapping
from typing import Any

from stillroom.costs.architecture import read_architecture
from stillroom.cut.config import BestLayers, CutConfig, EveryLayer, Width

WIDTHS = ("hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size")


def cut_values(cut: CutConfig, source: Mapping[str, Any], whose: str) -> Mapping[str, Any]:
    """The config of a part of a model: how many layers it keeps, and its widths.

    Args:
        whose: what an error calls the model.

    Raises:
        ConfigError: the model's architecture is not known.
    """
    model = read_architecture(source, whose)
    there = dict(
        zip(WIDTHS, (model.hidden_size, model.num_heads, model.num_kv_heads, model.intermediate_size), strict=True)
    )
    found = {**source, "num_hidden_layers": num_kept_layers(cut, model.num_layers)}
    if isinstance(cut.width, Width):
        asked = {name: value for name in WIDTHS if (value := getattr(cut.width, name)) is not None}
        if "num_attention_heads" in asked and "num_key_value_heads" not in asked:
            asked["num_key_value_heads"] = asked["num_attention_heads"] * model.num_kv_heads // model.num_heads
        return {**found, **there, "head_dim": model.head_dim, **asked}
    if cut.width is not None:
        share = {name: number * cut.width // model.hidden_size for name, number in there.items()}
        return {**found, **share, "head_dim": model.head_dim}
    return found


def num_kept_layers(cut: CutConfig, num_layers: int) -> int:
    """How many of so many layers are kept."""
    rule = cut.layers
    if rule is None:
        return num_layers
    if isinstance(rule, EveryLayer):
        return num_layers // rule.step
    if isinstance(rule, BestLayers):
        return min(rule.count, num_layers)
    return len(rule) if isinstance(rule, tuple) else min(rule, num_layers)

"""The sizes of a part of a model, by its settings and the model's config.json alone: no torch."""

from collections.abc import Mapping
from typing import Any

from stillroom.costs.architecture import Architecture, read_architecture
from stillroom.cut.config import BestLayers, CutConfig, EveryLayer, Layers, Width
from stillroom.errors import ConfigError, MismatchError
from stillroom.layers import evenly

WIDTHS = ("hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size")


def cut_values(cut: CutConfig, source: Mapping[str, Any], who: str) -> Mapping[str, Any]:
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


def kept_layers(rule: Layers | None, num_layers: int, who: str) -> tuple[int, ...] | None:
    """The layers that a rule keeps of so many; None where they have to be measured.

    Args:
        who: what an error calls the model.

    Raises:
        MismatchError: the model does not have them.
    """
    if rule is None:
        return tuple(range(num_layers))
    if isinstance(rule, EveryLayer):
        if rule.step > num_layers:
            raise _too_many(f"every {rule.step}th", num_layers, who, "layers.step", "No layer would be left.")
        return tuple(range(rule.step - 1, num_layers, rule.step))
    if isinstance(rule, tuple):
        if rule[-1] >= num_layers:
            raise _too_many(f"layer {rule[-1]}", num_layers, who, "layers", "It cannot be kept.")
        return rule
    count = rule.count if isinstance(rule, BestLayers) else rule
    if count > num_layers:
        setting = "layers.count" if isinstance(rule, BestLayers) else "layers"
        raise _too_many(f"{count} layers", num_layers, who, setting, "A cut takes layers away and adds none.")
    if isinstance(rule, BestLayers) and count < num_layers:
        return None
    return evenly(count, num_layers)


def _too_many(asked: str, num_layers: int, who: str, setting: str, why: str) -> MismatchError:
    return MismatchError(
        f"{setting} asks for layers that are not there",
        {setting: asked, f"the {who} has": f"{num_layers} layers, 0 to {num_layers - 1}"},
        why=why,
        fix=f"Ask for at most {num_layers} layers; they are counted from 0.",
    )


def check_most(asked: Mapping[str, int], there: Mapping[str, int], who: str) -> None:
    """Raises MismatchError where more of something is asked for than is there."""
    for name, value in asked.items():
        if value > there[name]:
            raise MismatchError(
                f"{name} is more than the {who} has",
                {name: value, f"the {who} has": there[name]},
                why="A cut takes channels away and adds none.",
                fix=f"Set it to at most {there[name]}.",
            )

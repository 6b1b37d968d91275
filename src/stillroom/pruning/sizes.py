"""Which layers a rule keeps, and whether a model has what is to be kept."""

from collections.abc import Mapping

from stillroom.errors import MismatchError
from stillroom.layers import evenly
from stillroom.pruning.config import BestLayers, EveryLayer, Layers


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

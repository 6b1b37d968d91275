"""The Config base: frozen and closed; loading a recipe and overriding it by ``key=value``."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
)

from stillroom.errors import ConfigError
from stillroom.recipe import line_of, override, read_recipe
from stillroom.schema import explain, explain_error

BATCH_TOKENS = 16384
"""Positions that go through a model at once where nobody says how many, or a row's length where that is more."""
LOGITS_BYTES = 256 * 2**20
"""The budget for logits that are held at a time where nobody says how much."""

Positive = Annotated[int, Field(gt=0)]


__all__ = ["Config", "PathText", "explain", "format_setting", "is_local", "load", "replace"]


class Config(BaseModel):
    """A node of a verb's settings: it cannot be changed, and a key that it does not know is an error."""

    verb: ClassVar[str | None] = None
    """The verb whose recipe this is the root of. A recipe begins with it: ``verb: distill``."""
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


C = TypeVar("C", bound=Config)


def _expand(text: str) -> str:
    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if name not in os.environ:
            raise ValueError(f"the environment variable ${name} in {text!r} is not set")
        return os.environ[name]

    return os.path.expanduser(re.sub(r"\$(?:([A-Za-z_]\w*)|\{([A-Za-z_]\w*)\})", value, text))


PathText = Annotated[
    str, BeforeValidator(lambda value: str(value) if isinstance(value, Path) else value), AfterValidator(_expand)
]
"""A path or a hub name; ``~`` and ``$VARIABLES`` are expanded, and an unset variable is an error."""


def is_local(path: str) -> bool:
    """Whether ``path`` means a place on this machine: it, or the folder it begins with, is there; or it cannot be a
    name on the hub."""
    if "://" in path:
        return False
    hub_form = re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", path)
    return Path(path).exists() or hub_form is None or ("/" in path and Path(path).parts[0] in os.listdir())


def load(config_class: type[C], recipe: str | Path | None = None, overrides: Sequence[str] = ()) -> C:
    """Reads a recipe (YAML 1.2) and applies ``key=value`` overrides, dotted keys reaching into the tree.

    Raises:
        MissingError: the recipe is not there.
        ConfigError: it is not YAML, or a setting is unknown, missing or not valid.
    """
    values = {} if recipe is None else read_recipe(Path(recipe))
    keys = [override(values, word) for word in overrides]
    if config_class.verb is not None:
        _check_verb(values.pop("verb", config_class.verb), config_class.verb, recipe)

    def place(key: str) -> str:
        if recipe is None or any(f"{key}.".startswith(f"{k}.") for k in keys):
            return "on the command line"
        line = line_of(Path(recipe), key) if key else None
        return f"{recipe} line {line}" if line is not None else f"{recipe} and the command line"

    try:
        return config_class.model_validate(values)
    except ValidationError as error:
        raise explain_error(config_class, error, place) from None


def _check_verb(verb: object, wanted: str, recipe: str | Path | None) -> None:
    """Raises ConfigError where a recipe is of another verb than the one that it is given to."""
    if verb != wanted:
        raise ConfigError(
            f"the recipe is of `{verb}`, and was given to `{wanted}`",
            {"recipe": recipe or "on the command line", "verb": verb, "given to": wanted},
            why="Each verb has settings of its own, and the same key may mean another thing.",
            fix=f"Run it with `stillroom {verb} …`, or give `{wanted}` a recipe that begins with `verb: {wanted}`.",
        )


def format_setting(config: Config, key: str) -> object:
    """The value at a dotted key as an error quotes it: with a note where nobody gave it.

    ``config`` must be as it was loaded, since whatever is replaced counts as given.
    """
    node: Any = config
    given = True
    for step in key.split("."):
        given = given and step in node.model_fields_set
        node = getattr(node, step)
    return node if given else f"{node}, by default"


def replace(config: C, values: Mapping[str, Any]) -> C:
    """The same settings with other values at some dotted keys."""
    tree = config.model_dump()
    for key, value in values.items():
        node: Any = tree
        *parents, last = key.split(".")
        for step in parents:
            node = node[int(step) if step.isdecimal() else step]
        node[last] = value
    return type(config).model_validate(tree)


Fraction = Annotated[float, Field(ge=0, le=1)]


COLDEST, HOTTEST = 0.01, 1000.0
Temperature = Annotated[float, Field(ge=COLDEST, le=HOTTEST)]
"""Beyond these nothing is learned: softmaxes are the top token alone, or the same for all tokens, to float32."""


NotNegative = Annotated[float, Field(ge=0)]


Quantization = Literal["int8", "fp8", "nf4"]


Attention = Literal["auto", "eager", "sdpa", "flash_attention_2", "flex_attention"]

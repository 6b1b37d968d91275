"""The Config base: frozen and closed; loading a recipe, overriding it by ``key=value``, explaining its settings."""

import difflib
import os
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from stillroom.errors import ConfigError, MissingError


class Config(BaseModel):
    """A node of a verb's settings: it cannot be changed, and a key that it does not know is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


C = TypeVar("C", bound=Config)


def _expand(text: str) -> str:
    expanded = os.path.expanduser(os.path.expandvars(text))
    if re.search(r"\$\{?[A-Za-z_]", expanded):
        raise ValueError(f"the environment variable in {text!r} is not set")
    return expanded


PathText = Annotated[str, AfterValidator(_expand)]
"""A path or a hub name; ``~`` and ``$VARIABLES`` are expanded, and an unset variable is an error."""


def load(config_class: type[C], recipe: str | Path | None = None, overrides: Sequence[str] = ()) -> C:
    """Reads a recipe (YAML 1.2) and applies ``key=value`` overrides, dotted keys reaching into the tree.

    Raises:
        MissingError: the recipe is not there.
        ConfigError: it is not YAML, or a setting is unknown, missing or not valid.
    """
    values = _read_recipe(Path(recipe)) if recipe is not None else {}
    for override in overrides:
        _apply(values, override)
    try:
        return config_class.model_validate(values)
    except ValidationError as error:
        raise _explain_error(config_class, error, recipe) from None


def replace(config: C, values: Mapping[str, Any]) -> C:
    """The same settings with other values at some dotted keys."""
    tree = config.model_dump()
    for key, value in values.items():
        node: Any = tree
        *parents, last = key.split(".")
        for step in parents:
            node = node[int(step) if step.isdigit() else step]
        node[last] = value
    return type(config).model_validate(tree)


def differences(old: object, new: object, key: str = "") -> dict[str, tuple[object, object]]:
    """The dotted keys at which two dumped configs differ, with both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        pairs = [(name, old.get(name), new.get(name)) for name in dict.fromkeys([*old, *new])]
    elif isinstance(old, list | tuple) and isinstance(new, list | tuple) and len(old) == len(new):
        pairs = [(str(i), old[i], new[i]) for i in range(len(old))]
    else:
        return {} if old == new and type(old) is type(new) else {key: (old, new)}
    found: dict[str, tuple[object, object]] = {}
    for name, a, b in pairs:
        found |= differences(a, b, f"{key}.{name}" if key else str(name))
    return found


def to_yaml(values: object) -> str:
    """Values as YAML text, as a recipe would say them."""
    import io

    stream = io.StringIO()
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # pyright: ignore[reportAttributeAccessIssue]
    yaml.dump(values, stream)
    return stream.getvalue()


# --- reading ---------------------------------------------------------------------------------------------------------


def _read_recipe(path: Path) -> dict[str, Any]:
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.y*ml")], n=1, cutoff=0.6)
        raise MissingError(
            f"the recipe {path} is not there",
            {"did you mean": str(path.parent / near[0])} if near else None,
            why="A recipe holds the settings of a run, so nothing can start without it.",
            fix="Check the path; settings can also be given as key=value with no recipe at all.",
        )
    try:
        values = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except (YAMLError, UnicodeDecodeError) as error:
        line = (
            f" line {error.problem_mark.line + 1}" if isinstance(error, MarkedYAMLError) and error.problem_mark else ""
        )
        problem = error.problem if isinstance(error, MarkedYAMLError) else str(error)
        raise ConfigError(
            f"{path} is not valid YAML",
            {f"{path}{line}": " ".join(str(problem).split())},
            why="The settings after that place cannot be read for certain.",
            fix="Mend that line; a key may be given only once.",
        ) from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(
            f"{path} does not hold settings",
            {"expected": "keys with values", "found": type(values).__name__},
            why="A recipe is a YAML mapping of settings.",
            fix="Write it as `key: value` lines, as in the recipes/ folder.",
        )
    return values


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(
            f"`{override}` is not a setting",
            {"expected": "key=value", "found": override},
            why="Everything after the recipe sets one value.",
            fix="Write it as key=value, such as steps=100 or objectives.0.weight=0.9.",
        )
    try:
        value = YAML(typ="safe", pure=True).load(text)
    except YAMLError:
        raise ConfigError(
            f"the value of `{key}` is not valid YAML",
            {"value": text},
            why="Values are read as YAML, so that numbers, lists and null mean the same as in a recipe.",
            fix=f"Put it in quotes: {key}='\"…\"'.",
        ) from None
    node: Any = values
    *parents, last = key.split(".")
    for depth, step in enumerate(parents):
        node = _child(node, step, ".".join(parents[: depth + 1]))
    _set(node, last, value, key)


def _index(node: list[Any], step: str, key: str, limit: int) -> int:
    if not step.isdigit() or int(step) >= limit:
        raise ConfigError(
            f"`{key}` does not exist",
            {"asked for": step, "there are": f"items 0 to {len(node) - 1}" if node else "no items"},
            why="A list is reached into by the number of an item, counted from 0.",
            fix="Use the number of an item that is there, or the next free one to add an item.",
        )
    return int(step)


def _child(node: Any, step: str, key: str) -> Any:
    if isinstance(node, list):
        return node[_index(node, step, key, len(node))]
    if not isinstance(node.get(step), dict | list):
        node[step] = {}
    return node[step]


def _set(node: Any, step: str, value: Any, key: str) -> None:
    if isinstance(node, list):
        index = _index(node, step, key, len(node) + 1)
        node[index : index + 1] = [value]
    else:
        node[step] = value


# --- the shape of a config class -------------------------------------------------------------------------------------


def _strip(annotation: Any) -> list[Any]:
    """The member types of an annotation: Annotated and unions taken apart, None left out."""
    if typing.get_origin(annotation) is Annotated:
        return _strip(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [part for member in typing.get_args(annotation) for part in _strip(member)]
    return [] if annotation is type(None) else [annotation]


def _is_config(annotation: Any) -> typing.TypeGuard[type[Config]]:
    return isinstance(annotation, type) and issubclass(annotation, Config)


def _tag_field(config_class: type[Config]) -> str | None:
    """The field by which a union is told apart."""
    return next((name for name in ("kind", "format") if name in config_class.model_fields), None)


def _tags(config_class: type[Config]) -> set[str]:
    """What may stand in that field."""
    tag = _tag_field(config_class)
    return set() if tag is None else set(typing.get_args(config_class.model_fields[tag].annotation))


def _members(annotations: Sequence[Any], step: str | int) -> list[Any] | None:
    """The types one step of a pydantic location leads to, or None where the step is no key but a branch's name."""
    for annotation in annotations:
        if _is_config(annotation) and step in annotation.model_fields:
            return _strip(annotation.model_fields[str(step)].annotation)
        if typing.get_origin(annotation) in (list, tuple) and isinstance(step, int):
            return _strip(typing.get_args(annotation)[0])
        if typing.get_origin(annotation) is dict and isinstance(step, str):
            return _strip(typing.get_args(annotation)[1])
    return None


def _locate(config_class: type[Config], location: Sequence[str | int]) -> tuple[str, list[str]]:
    """A pydantic error location as a dotted key, and the names that would have been known at its last step."""
    annotations: list[Any] = [config_class]
    key: list[str] = []
    for position, step in enumerate(location):
        tagged = [a for a in annotations if _is_config(a) and step in _tags(a)]
        if tagged and len(annotations) > 1:
            annotations = tagged
            continue
        following = _members(annotations, step)
        if following is not None:
            annotations, key = following, [*key, str(step)]
        elif position == len(location) - 1 and any(_is_config(a) for a in annotations):
            known = [name for a in annotations if _is_config(a) for name in a.model_fields]
            return ".".join([*key, str(step)]), known
    return ".".join(key), []


def _line(recipe: str | Path | None, key: str) -> str:
    """Where a dotted key stands in the recipe, in words; "key=value" where it is not there."""
    if recipe is None:
        return "on the command line"
    node: Any = YAML().load(Path(recipe).read_text(encoding="utf-8"))
    line = None
    for step in key.split("."):
        index = int(step) if step.isdigit() else step
        try:
            line = (node.lc.item(index) if isinstance(index, int) else node.lc.key(index))[0] + 1
            node = node[index]
        except (KeyError, IndexError, TypeError, AttributeError):
            break
    return f"{recipe} line {line}" if line is not None else f"{recipe} and the command line"


def _explain_error(config_class: type[Config], error: ValidationError, recipe: str | Path | None) -> ConfigError:
    problems: dict[str, list[str]] = {}
    unknown: dict[str, list[str]] = {}
    for item in error.errors(include_url=False):
        key, known = _locate(config_class, item["loc"])
        if item["type"] == "extra_forbidden":
            unknown[key] = known
        else:
            message = item["msg"].removeprefix("Value error, ")
            if item["type"] not in ("missing", "value_error", "union_tag_not_found") and "input" in item:
                message += f", not {item['input']!r}" if not isinstance(item["input"], dict) else ""
            problems.setdefault(key, []).append(message[0].lower() + message[1:])
    problems = {k: m for k, m in problems.items() if not any(o.startswith(f"{k}.") for o in problems) or not k}
    if unknown:
        key, known = next(iter(unknown.items()))
        near = difflib.get_close_matches(key.rpartition(".")[2], known, n=1, cutoff=0.5)
        values = {_line(recipe, key): key.rpartition(".")[2]}
        values |= {"did you mean": near[0]} if near else {"known here": ", ".join(known)}
        more = (
            f" ({len(unknown) - 1} more unknown settings: {', '.join(list(unknown)[1:])}.)" if len(unknown) > 1 else ""
        )
        return ConfigError(
            f"unknown setting `{key}`",
            values,
            why="Nothing would read it, so the run would quietly use a default instead." + more,
            fix="Rename or delete it; the verb's --help lists every setting.",
        )
    count = len(problems)
    first = next(iter(problems))
    what = f"the setting `{first}` is not valid" if count == 1 and first else f"{count} settings are not valid"
    if count == 1 and not first:
        what = "these settings do not go together"
    return ConfigError(
        what,
        {(key or "settings"): " or ".join(dict.fromkeys(messages)) for key, messages in problems.items()},
        why=f"Read from {_line(recipe, first)}." if first or recipe else "Read from the command line.",
        fix="Change it in the recipe or by key=value; the verb's --help lists every setting with its meaning.",
    )


# --- explaining ------------------------------------------------------------------------------------------------------


def explain(config_class: type[Config]) -> str:
    """Every setting of a config class as text: key, type, default and meaning, nested as in a recipe."""
    return "\n".join(_explain_fields(config_class.model_fields, indent=0))


def _explain_fields(fields: Mapping[str, FieldInfo], indent: int) -> list[str]:
    lines: list[str] = []
    pad = "  " * indent
    for name, field in fields.items():
        lines.append(f"{pad}{name}: {_type_text(field)}{_default_text(field)}")
        lines += [f"{pad}      {line}" for line in (field.description or "").splitlines() if line.strip()]
        lines += _explain_members(_nested(field.annotation), indent + 1)
    return lines


def _explain_members(members: Sequence[type[Config]], indent: int) -> list[str]:
    """One class's settings; or of several that may stand there, what each has, and then what all have."""
    if not members:
        return []
    tag = _tag_field(members[0])
    shared = {
        name: field
        for name, field in members[0].model_fields.items()
        if name != tag and all(_same(field, other.model_fields.get(name)) for other in members)
    }
    if len(members) == 1:
        return _explain_fields({**({tag: members[0].model_fields[tag]} if tag else {}), **shared}, indent)
    lines: list[str] = []
    for member in members:
        lines.append(f"{'  ' * indent}{tag}: {' | '.join(sorted(_tags(member)))}")
        lines.append(f"{'  ' * indent}      {(member.__doc__ or '').strip().splitlines()[0]}")
        own = {n: f for n, f in member.model_fields.items() if n != tag and n not in shared}
        lines += _explain_fields(own, indent + 1)
    return [*lines, *_explain_fields(shared, indent)]


def _same(field: FieldInfo, other: FieldInfo | None) -> bool:
    return other is not None and (field.annotation, field.description) == (other.annotation, other.description)


def _nested(annotation: Any) -> list[type[Config]]:
    found: list[type[Config]] = []
    for part in _strip(annotation):
        if _is_config(part):
            found.append(part)
        elif typing.get_origin(part) in (list, tuple, dict):
            found += [n for argument in typing.get_args(part) if argument is not ... for n in _nested(argument)]
    return found


def _type_text(field: FieldInfo) -> str:
    def text(annotation: Any) -> str:
        if typing.get_origin(annotation) is typing.Literal:
            return " | ".join(map(str, typing.get_args(annotation)))
        if typing.get_origin(annotation) in (list, tuple):
            return f"list of {' or '.join(text(a) for a in _strip(typing.get_args(annotation)[0]))}"
        if _is_config(annotation):
            return next(iter(sorted(_tags(annotation))), "settings")
        if typing.get_origin(annotation) is dict:
            return "keys with values"
        return {str: "text", bool: "true | false", int: "integer", float: "number"}.get(annotation, str(annotation))

    return " | ".join(dict.fromkeys(text(part) for part in _strip(field.annotation)))


def _default_text(field: FieldInfo) -> str:
    if field.is_required():
        return " (required)"
    default = field.get_default(call_default_factory=True)
    if isinstance(default, Config):
        return ""
    if default is None or isinstance(default, bool):
        return f" = {'null' if default is None else str(default).lower()}"
    return f" = {list(default) if isinstance(default, tuple) else default}"

"""The shape of a config class: where an error lies in it, and all of its settings as text."""

import difflib
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from stillroom.errors import ConfigError

Model = type[BaseModel]
PLAIN = ("constrained-float", "float", "int", "str", "list", "settings")
"""What the branches of a union are called that are no keys: of a plain value by pydantic, others by their Tag."""


def strip(annotation: Any) -> list[Any]:
    """The member types of an annotation: Annotated and unions taken apart, None left out."""
    if typing.get_origin(annotation) is Annotated:
        return strip(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [part for member in typing.get_args(annotation) for part in strip(member)]
    return [] if annotation is type(None) else [annotation]


def _is_config(annotation: Any) -> typing.TypeGuard[Model]:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _tag_field(config_class: Model) -> str | None:
    """The field by which a union is told apart."""
    return next((name for name in ("kind", "format") if name in config_class.model_fields), None)


def _tags(config_class: Model) -> set[str]:
    """What may stand in that field."""
    tag = _tag_field(config_class)
    return set() if tag is None else set(typing.get_args(config_class.model_fields[tag].annotation))


# --- errors ----------------------------------------------------------------------------------------------------------


SILENT = ("missing", "value_error", "union_tag_not_found", "union_tag_invalid", "too_short")
"""Kinds of problems beside which nobody wants to see what was given."""


def explain_error(config_class: Model, error: ValidationError, place: Callable[[str], str]) -> ConfigError:
    """What pydantic found wrong, in the user's terms; ``place`` says in words where a dotted key was read."""
    problems: dict[str, list[str]] = {}
    unknown: dict[str, list[str]] = {}
    for item in error.errors(include_url=False):
        key, known = _locate(config_class, item["loc"])
        if item["type"] == "extra_forbidden":
            unknown[key] = known
        else:
            problems.setdefault(key, []).append(_problem(item))
    problems = {k: m for k, m in problems.items() if not any(o.startswith(f"{k}.") for o in problems) or not k}
    wrong_kind = any(key.rpartition(".")[2] in ("kind", "format") for key in problems)
    if unknown and not wrong_kind:
        return _unknown(unknown, place)
    count, first = len(problems), next(iter(problems))
    what = f"the setting `{first}` is not valid" if count == 1 else f"{count} settings are not valid"
    if count == 1 and not first:
        what = "these settings do not go together"
    where = place(first)
    inputs = {
        _locate(config_class, item["loc"])[0]: ""
        if item["type"] in SILENT or isinstance(item["input"], dict)
        else f", not {item['input']!r}"
        for item in error.errors(include_url=False)
    }
    return ConfigError(
        what,
        {(k or "settings"): " or ".join(dict.fromkeys(m)) + inputs[k] for k, m in problems.items()},
        why=f"Read {where if where.startswith('on ') else f'from {where}'}.",
        fix="Change it in the recipe or by key=value; the verb's --help lists every setting with its meaning.",
    )


def _unknown(unknown: Mapping[str, list[str]], place: Callable[[str], str]) -> ConfigError:
    key, known = next(iter(unknown.items()))
    near = difflib.get_close_matches(key.rpartition(".")[2], known, n=1, cutoff=0.5)
    others = list(unknown)[1:]
    return ConfigError(
        f"unknown setting `{key}`",
        {
            place(key): key.rpartition(".")[2],
            **({"did you mean": near[0]} if near else {"known here": ", ".join(known)}),
        },
        why="Nothing would read it, so the run would quietly use a default instead."
        + (f" The same holds for {', '.join(others)}." if others else ""),
        fix="Rename or delete it; the verb's --help lists every setting.",
    )


def _problem(item: ErrorDetails) -> str:
    """One pydantic error in plain words."""
    context = item.get("ctx", {})
    match item["type"]:
        case "missing":
            return "is required"
        case "union_tag_invalid":
            known = [tag.strip(" '") for tag in context["expected_tags"].split(",")]
            near = difflib.get_close_matches(str(context["tag"]), known, n=1, cutoff=0.5)
            asked = f"there is no {context['discriminator'].strip(chr(39))} `{context['tag']}`"
            return f"{asked}; did you mean {near[0]}? There are {', '.join(known)}" if near else (
                f"{asked}; there are {', '.join(known)}"
            )  # fmt: skip
        case "union_tag_not_found":
            return f"needs {context['discriminator'].strip(chr(39))}, which says what it is"
        case "tuple_type" | "list_type":
            return "should be a list"
        case "too_short":
            return f"needs at least {context['min_length']}"
        case "model_type" | "model_attributes_type" | "dict_type":
            return "should be settings (keys with values)"
        case _:
            message = item["msg"].removeprefix("Value error, ")
            return message[0].lower() + message[1:]


def _locate(config_class: Model, location: Sequence[str | int]) -> tuple[str, list[str]]:
    """A pydantic error location as a dotted key, and the names that would have been known at its last step."""
    annotations: list[Any] = [config_class]
    key: list[str] = []
    for position, step in enumerate(location):
        branch = [a for a in annotations if _is_config(a) and step == a.__name__]
        if branch and len(annotations) > 1:  # settings, where a plain value may stand too
            annotations = branch
            continue
        tagged = [a for a in annotations if _is_config(a) and step in _tags(a)]
        if tagged and len(annotations) > 1:
            annotations = tagged
            continue
        following = _members(annotations, step)
        if following is not None:
            annotations, key = following, [*key, str(step)]
        elif len(annotations) > 1 and (step in PLAIN or str(step).startswith("literal[")):
            continue  # the plain value, where settings may stand too
        elif position == len(location) - 1 and any(_is_config(a) for a in annotations):
            known = [name for a in annotations if _is_config(a) for name in a.model_fields]
            return ".".join([*key, str(step)]), known
    return ".".join(key), []


def _members(annotations: Sequence[Any], step: str | int) -> list[Any] | None:
    """The types one step of a pydantic location leads to, or None where the step is no key but a branch's name."""
    for annotation in annotations:
        if _is_config(annotation) and step in annotation.model_fields:
            return strip(annotation.model_fields[str(step)].annotation)
        if typing.get_origin(annotation) in (list, tuple) and isinstance(step, int):
            return strip(typing.get_args(annotation)[0])
        if typing.get_origin(annotation) is dict and isinstance(step, str):
            return strip(typing.get_args(annotation)[1])
    return None


# --- explaining ------------------------------------------------------------------------------------------------------


def explain(config_class: Model) -> str:
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


def _explain_members(members: Sequence[Model], indent: int) -> list[str]:
    """One class's settings; or of several that may stand there, what each has, and then what all have."""
    if not members:
        return []
    tag = _tag_field(members[0])
    shared = {
        name: field
        for name, field in members[0].model_fields.items()
        if name != tag and all(_said(field) == _said(other.model_fields.get(name)) for other in members)
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


def _said(field: FieldInfo | None) -> tuple[Any, ...]:
    """Returns what must be the same for two members to say the same of a field."""
    return () if field is None else (field.annotation, field.description, field.default)


def _nested(annotation: Any) -> list[Model]:
    found: list[Model] = []
    for part in strip(annotation):
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
            return f"list of {' or '.join(text(a) for a in strip(typing.get_args(annotation)[0]))}"
        if _is_config(annotation):
            tag, tags = _tag_field(annotation), sorted(_tags(annotation))
            plain = len(tags) > 1 and tag is not None and not annotation.model_fields[tag].is_required()
            return tags[0] if tags and not plain else "settings"  # a field like any other, of what is no choice
        if typing.get_origin(annotation) is dict:
            return "keys with values"
        return {str: "text", bool: "true | false", int: "integer", float: "number"}.get(annotation, str(annotation))

    return " | ".join(dict.fromkeys(text(part) for part in strip(field.annotation)))


def _default_text(field: FieldInfo) -> str:
    if field.is_required():
        return " (required)"
    default = field.get_default(call_default_factory=True)
    if isinstance(default, BaseModel):
        return ""
    if default is None or isinstance(default, bool):
        return f" = {'null' if default is None else str(default).lower()}"
    return f" = {list(default) if isinstance(default, tuple) else default}"

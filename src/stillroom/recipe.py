"""Recipes: settings as YAML 1.2, and ``key=value`` overrides of them."""

import collections
import difflib
import io
import itertools
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.constructor import SafeConstructor
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from stillroom.errors import ConfigError, MissingError


class _Constructor(SafeConstructor):
    """YAML 1.2 has no dates: ``2026-01-05`` is a text."""


_Constructor.add_constructor("tag:yaml.org,2002:timestamp", SafeConstructor.construct_yaml_str)


MOST_VALUES = 100_000
"""What a YAML text may hold at the most, each alias counted as often as it stands there."""


def from_yaml(text: str) -> Any:
    """YAML 1.2 to plain values: ``1e-5`` is a number, ``no`` is a text, and a key given twice is an error.

    Raises:
        YAMLError: it is not YAML, or holds what no setting can be: texts of half characters, numbers of thousands of
            digits, aliases of aliases that make more than MOST_VALUES values.
    """
    yaml = YAML(typ="safe", pure=True)
    yaml.Constructor = _Constructor
    try:
        values = yaml.load(text)
        if sum(1 for _ in itertools.islice(_parts(values), MOST_VALUES + 1)) > MOST_VALUES:
            raise YAMLError(f"it holds more than {MOST_VALUES:,} values")
        return values
    except RecursionError:
        raise YAMLError("it is nested too deeply") from None
    except ValueError as error:
        raise YAMLError(str(error)) from None


def _parts(value: Any) -> Iterator[Any]:
    """Yields a value with all that it holds. Raises ValueError where a text has half a character (a lone surrogate)."""
    yield value
    if isinstance(value, str):
        if half := re.search("[\ud800-\udfff]", value):
            raise ValueError(f"it holds half of a character, \\u{ord(half[0]):04x}: a lone surrogate is no text")
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _parts(key)
            yield from _parts(item)
    elif isinstance(value, list | tuple | set):
        for item in value:
            yield from _parts(item)


def plain(values: Any) -> Any:
    """The same values as JSON has them: lists for tuples, texts for keys."""
    return json.loads(json.dumps(values))  # noqa: TID251


def parse_json(data: str | bytes | bytearray) -> Any:
    """Parses JSON that came from outside.

    Raises:
        ValueError: it is not JSON in UTF-8, or holds what cannot be used: half a character (the escape of a lone
            surrogate), a number of thousands of digits, or lists in lists without end.
    """
    try:
        values = json.loads(data)  # noqa: TID251
        escape = r"\\u[dD]" if isinstance(data, str) else rb"\\u[dD]"
        if re.search(escape, data):  # pyright: ignore[reportArgumentType, reportCallIssue]
            collections.deque(_parts(values), maxlen=0)
        return values
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def to_yaml(values: object) -> str:
    """Plain values as YAML text, as a recipe would say them."""
    stream = io.StringIO()
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.width = 4096
    yaml.sort_base_mapping_type_on_output = False  # pyright: ignore[reportAttributeAccessIssue]
    yaml.dump(values, stream)
    return stream.getvalue()


def read_recipe(path: Path) -> dict[str, Any]:
    """The settings in a recipe.

    Raises:
        MissingError: the file is not there.
        ConfigError: it is not YAML, or holds something else than settings.
    """
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.y*ml")], n=1, cutoff=0.6)
        raise MissingError(
            f"the recipe {path} is {'a folder' if path.is_dir() else 'not there'}",
            {"did you mean": str(path.parent / near[0])} if near else None,
            why="A recipe holds the settings of a run, so nothing can start without it.",
            fix="Check the path; settings can also be given as key=value with no recipe at all.",
        )
    try:
        values = from_yaml(path.read_text(encoding="utf-8"))
    except (YAMLError, UnicodeDecodeError) as error:
        marked = error if isinstance(error, MarkedYAMLError) else None
        line = f" line {marked.problem_mark.line + 1}" if marked and marked.problem_mark else ""
        twice = "duplicate key" in str(error)
        raise ConfigError(
            f"{path} is not valid YAML",
            {f"{path}{line}": " ".join(str(marked.problem if marked else error).split())},
            why="The settings after that place cannot be read for certain.",
            fix=f"Mend that line{'; a key may be given only once' if twice else ''}.",
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


def override(values: dict[str, Any], word: str) -> str:
    """Applies ``key=value`` to settings in place, dots reaching into the tree; returns the key.

    Raises:
        ConfigError: it is not of that form, or the key cannot be reached.
    """
    key, equals, text = word.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError(
            f"`{key if equals and key else word}` is not a setting",
            {"expected": "key=value", "found": word},
            why="Everything after the recipe sets one value.",
            fix="Write it as key=value, such as steps=100 or objectives.0.weight=0.9.",
        )
    try:
        value = from_yaml(text)
    except YAMLError as error:
        twice = "duplicate key" in str(error)
        raise ConfigError(
            f"the value of `{key}` is not valid YAML",
            {"value": f"{text:.200}"},
            why="Values are read as YAML, so that numbers, lists and null mean the same as in a recipe.",
            fix="Give each key once." if twice else f"Put it in quotes: {key}='\"…\"'.",
        ) from None
    node: Any = values
    *parents, last = key.split(".")
    for depth, step in enumerate(parents):
        node = _child(node, step, ".".join(parents[: depth + 1]))
    if isinstance(node, list):
        index = _index(node, last, key, len(node) + 1)
        node[index : index + 1] = [value]
    else:
        node[last] = value
    return key


def _index(node: list[Any], step: str, key: str, limit: int) -> int:
    if not re.fullmatch("[0-9]+", step) or int(step) >= limit:
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
    if node.get(step) is None:
        node[step] = {}
    if not isinstance(node[step], dict | list):
        raise ConfigError(
            f"`{key}` cannot be reached into",
            {key: repr(node[step]), "needed": "settings or a list"},
            why="Its value would be lost.",
            fix=f"Give the whole of it, as {key}={{…}}, or mend the recipe.",
        )
    return node[step]


def line_of(recipe: Path, key: str) -> int | None:
    """The line of a recipe on which a dotted key, or the nearest thing around it, stands; from 1."""
    node: Any = YAML().load(recipe.read_text(encoding="utf-8"))
    line = None
    for step in key.split("."):
        index = int(step) if step.isdecimal() else step
        try:
            line = (node.lc.item(index) if isinstance(index, int) else node.lc.key(index))[0] + 1
            node = node[index]
        except (KeyError, IndexError, TypeError, AttributeError):
            break
    return line


def differences(old: object, new: object, key: str = "") -> dict[str, tuple[object, object]]:
    """The dotted keys at which two trees of plain values differ, with both values."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        pairs = [(name, old.get(name), new.get(name)) for name in dict.fromkeys([*old, *new])]
    elif isinstance(old, list | tuple) and isinstance(new, list | tuple) and len(old) == len(new):
        pairs = [(str(i), old[i], new[i]) for i in range(len(old))]
    else:
        return {} if old == new and type(old) is type(new) else {key: (old, new)}
    found: dict[str, tuple[object, object]] = {}
    for name, a, b in pairs:
        found |= differences(a, b, f"{key}.{name}" if key else str(name))
    return found

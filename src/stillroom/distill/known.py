"""What headers tell of a distillation's models and data, before anything is loaded."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillroom.costs.architecture import Architecture, read_architecture
from stillroom.costs.weights import read_model
from stillroom.cut.config import BestLayers, CutConfig, EveryLayer, Width
from stillroom.distill.config import DistillConfig, LiveTeacher, StoreTeacher
from stillroom.errors import DataError

WIDTHS = ("hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size")


@dataclass(frozen=True)
class Known:
    """What headers tell of a distillation."""

    student: Architecture
    teacher: Architecture | None = None
    """A live one."""
    store: Mapping[str, Any] | None = None
    """The manifest of a store."""
    num_tokens: float | None = None
    """Tokens in one pass over the data."""
    documents_share_rows: bool = True

    @property
    def teacher_width(self) -> int:
        """Hidden channels of the teacher's inner states."""
        if self.teacher is not None:
            return self.teacher.hidden_size
        return 0 if self.store is None else int(self.store.get("hidden_width", 0))

    @property
    def teacher_layers(self) -> int:
        if self.teacher is not None:
            return self.teacher.num_layers
        return 0 if self.store is None else int(self.store.get("num_layers", 0))


def read_known(config: DistillConfig) -> Known:
    """What the headers of the models tell, and the manifest of a store where it is there.

    Raises:
        MissingError, DataError: a model is not there, or not whole.
        ConfigError: its architecture is not known.
    """
    student, init, teacher = config.student, config.student.init, config.teacher
    asked = store = None
    if isinstance(teacher, LiveTeacher):
        asked = read_model(teacher.model, teacher.revision, "the teacher").config
    elif isinstance(teacher, StoreTeacher):
        store = _manifest(teacher.path)
    name = student.model or getattr(init, "model", None) or getattr(init, "like", None)
    source = asked if name is None else read_model(name, student.revision, "the student").config
    if getattr(init, "family", None) is not None:
        source = None
    return Known(
        read_architecture(student_values(config, source), "the student"),
        None if asked is None else read_architecture(asked, "the teacher"),
        store,
        None if store is None else float(store.get("tokens", store["positions"])),
        config.data.pack,
    )


def _manifest(path: str) -> Mapping[str, Any] | None:
    """The manifest of a store in a folder; None where none is there yet."""
    file = Path(path) / "manifest.json"
    if not file.is_file():
        return None
    try:
        values = json.loads(file.read_bytes())
        if all(isinstance(values[name], int) for name in ("positions", "length", "num_columns")):
            return values
        found = "other values"
    except (ValueError, TypeError, KeyError) as error:
        found = f"{type(error).__name__}: {error}"
    raise DataError(
        f"{file} is no manifest of a store",
        {"expected": "positions, length and num_columns", "found": found},
        why="They tell how much there is to learn.",
        fix="See what `stillroom store check` says of it.",
    )


def student_values(config: DistillConfig, source: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """The values of the student's config.json, of one that is new or cut from ``source``; else ``source`` itself.

    Args:
        source: the config of the student's model, of what it is like, or of what it is cut from; None for a family's
            name, whose sizes are all in the settings.
    """
    init = config.student.init
    if init is None:
        assert source is not None
        return source
    if init.kind == "config":
        begin = {"model_type": init.family} if source is None else source
        return {**begin, **init.settings}
    assert source is not None
    return cut_values(init, source)


def cut_values(cut: CutConfig, source: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config of a part of a model: how many layers it keeps, and its widths."""
    model = read_architecture(source, "the model that the student is cut from")
    there = dict(
        zip(WIDTHS, (model.hidden_size, model.num_heads, model.num_kv_heads, model.intermediate_size), strict=True)
    )
    found = {**source, "num_hidden_layers": _kept_layers(cut, model.num_layers)}
    if isinstance(cut.width, Width):
        asked = {name: value for name in WIDTHS if (value := getattr(cut.width, name)) is not None}
        if "num_attention_heads" in asked and "num_key_value_heads" not in asked:
            asked["num_key_value_heads"] = asked["num_attention_heads"] * model.num_kv_heads // model.num_heads
        return {**found, **there, "head_dim": model.head_dim, **asked}
    if cut.width is not None:
        share = {name: number * cut.width // model.hidden_size for name, number in there.items()}
        return {**found, **share, "head_dim": model.head_dim}
    return found


def _kept_layers(cut: CutConfig, num_layers: int) -> int:
    rule = cut.layers
    if rule is None:
        return num_layers
    if isinstance(rule, EveryLayer):
        return num_layers // rule.step
    if isinstance(rule, BestLayers):
        return min(rule.count, num_layers)
    return len(rule) if isinstance(rule, tuple) else min(rule, num_layers)

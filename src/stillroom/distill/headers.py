"""What headers tell of a distillation's models and data, before anything is loaded."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillroom.distill.config import DistillConfig
from stillroom.errors import DataError
from stillroom.estimates.architecture import Architecture, read_architecture
from stillroom.estimates.pruned_sizes import pruned_values
from stillroom.estimates.weights import read_architecture_of, read_config
from stillroom.teachers.config import LiveTeacherConfig, StoreTeacherConfig


@dataclass(frozen=True)
class DistillHeaders:
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


def read_headers(config: DistillConfig) -> DistillHeaders:
    """What the headers of the models tell, and the manifest of a store where it is there.

    Raises:
        MissingError, DataError: a model is not there, or not whole.
        ConfigError: its architecture is not known.
    """
    teacher, asked, model, store = config.teacher, None, None, None
    if isinstance(teacher, LiveTeacherConfig):
        files, model = read_architecture_of(teacher.model, teacher.revision, "the teacher")
        asked = files.config
    elif isinstance(teacher, StoreTeacherConfig):
        store = _manifest(teacher.path)
    return DistillHeaders(
        read_architecture(student_values(config, _source(config, asked)), "the student"),
        model,
        store,
        None if store is None else float(store.get("tokens", store["positions"])),
        config.data.pack,
    )


def _source(config: DistillConfig, teacher: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """The config of the student's model, of what it is cut from, or of what it is like, whose weights are not needed;
    the teacher's where none is named, and None for a family's name."""
    student, init = config.student, config.student.init
    if getattr(init, "family", None) is not None:
        return None
    if (like := getattr(init, "like", None)) is not None:
        return read_config(like, student.revision, "the model that the student is like")
    name = student.model or getattr(init, "model", None)
    return teacher if name is None else read_architecture_of(name, student.revision, "the student")[0].config


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
    return pruned_values(init, source, "model that the student is cut from")

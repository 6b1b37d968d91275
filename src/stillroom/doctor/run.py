"""`stillroom doctor`: a look at a run before it is paid for. Writes nothing."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from stillroom.doctor import findings
from stillroom.doctor.config import DoctorConfig
from stillroom.doctor.findings import Finding
from stillroom.doctor.overlap import TaskTexts, overlap
from stillroom.errors import StillroomError

Facts = dict[str, Any]
PARTS = ("fit", "data", "overlap", "measures", "own_text", "step")
Report = Callable[[str, Mapping[str, Any]], None]
ItemsOf = Callable[[str], tuple[str, Iterable[TaskTexts]]]
"""The name and the items of the task that a description file describes."""


class Trial(Protocol):
    """What there is to look at of a recipe, in this order; each raises StillroomError where a run would."""

    def fit(self) -> Facts:
        """Tokenizer, chat template, vocabularies."""
        ...

    def look(self) -> Facts:
        """What became of the rows."""
        ...

    def texts(self) -> Iterable[tuple[str, str]]:
        """The documents by name."""
        ...

    def measure(self) -> Facts:
        """What the models make of them."""
        ...

    def own_text(self) -> Facts | None:
        """What they make of text that the student writes; None where that tells nothing."""
        ...

    def step(self) -> Facts:
        """One real step."""
        ...


def run(config: DoctorConfig, trial: Trial, items_of: ItemsOf, report: Report = lambda *_: None) -> Facts:
    """All that was found, as JSON values.

    It has each of ``PARTS``, None where it was not come to or tells nothing; ``findings``; ``ready``, False where one
    of them is to be mended; and the ``verdict`` in words.

    Args:
        trial: of the recipe.
        items_of: reads a task.
        report: is told what is going on.
    """
    found: list[Finding] = []
    record: Facts = dict.fromkeys(PARTS)

    def try_(name: str, look: Callable[[], Facts | None], doing: str) -> bool:
        report("note", {"text": doing})
        try:
            record[name] = look()
        except StillroomError as error:
            found.append(Finding.from_error(name, error))
        return record[name] is not None

    def shared() -> Facts:
        result = overlap(trial.texts(), dict(items_of(path) for path in config.tasks))
        found.extend(findings.of_overlap(result))
        return {**result._asdict(), "shown": [one._asdict() for one in result.shown]}

    if try_("fit", trial.fit, "comparing tokenizers, templates and vocabularies") and try_(
        "data", trial.look, "reading the data"
    ):
        found += findings.of_data(record["data"])
        if config.tasks:
            try_("overlap", shared, "looking for the data in the tasks")
        if try_("measures", trial.measure, "loading the models, and measuring them on the data"):
            found += findings.of_measures(record["measures"], record["fit"]["columns"])
            finite = {name: _finite(value) for name, value in record["measures"].items()}
            sound, record["measures"] = finite == record["measures"], finite
            if sound:
                try_("own_text", trial.own_text, "measuring them on what the student writes")
                try_("step", trial.step, "one optimizer step on the longest rows")
    return {**record, **_concluded(found, record["step"] is not None)}


def _concluded(found: list[Finding], to_the_end: bool) -> Facts:
    errors = sum(finding.level == "error" for finding in found)
    return {
        "findings": [finding._asdict() for finding in found],
        "ready": not errors,
        "verdict": _verdict(errors, len(found) - errors, to_the_end),
    }


def _finite(value: Any) -> Any:
    """JSON knows no infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _verdict(errors: int, warnings: int, to_the_end: bool) -> str:
    if errors:
        rest = "" if to_the_end else "; what comes after the first was not tried"
        return f"not ready: {_things(errors)} to change before this run{rest}"
    return "ready: nothing found that stands in the way of this run" + (
        f"; {_things(warnings)} to think about" if warnings else ""
    )


def _things(number: int) -> str:
    return f"{number} thing{'s' * (number > 1)}"

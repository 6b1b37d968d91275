"""`stillroom doctor`: a look at a run before it is paid for. It writes nothing, and imports no torch."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Protocol

from pydantic import Field

from stillroom.config import Config, PathText
from stillroom.doctor import findings
from stillroom.doctor.findings import Finding, TaskTexts, overlap
from stillroom.errors import StillroomError

Facts = dict[str, Any]
PARTS = ("fit", "data", "overlap", "measures", "own_text", "step")
Report = Callable[[str, Mapping[str, Any]], None]
ItemsOf = Callable[[str], tuple[str, Iterable[TaskTexts]]]
"""Reads the name and the items of the task that a description file describes."""


class DoctorConfig(Config):
    """`stillroom doctor RECIPE`: look at a run before it is paid for."""

    sequences: Annotated[int, Field(gt=0)] = 256
    """The number of the recipe's documents that are looked at."""
    tasks: Annotated[tuple[PathText, ...], Field(strict=False)] = ()
    """Description files of tasks that the student will be evaluated on, in whose items the documents are looked for."""


class Trial(Protocol):
    """The checks of a recipe, in this order, as `distill.preflight` makes them. Each returns facts, and raises
    StillroomError where a run would."""

    def fit(self) -> Facts: ...
    def look(self) -> Facts: ...
    def texts(self) -> Iterable[tuple[str, str]]: ...
    def measure(self) -> Facts: ...
    def own_text(self) -> Facts | None: ...
    def step(self) -> Facts: ...


def run(config: DoctorConfig, trial: Trial, items_of: ItemsOf, report: Report = lambda *_: None) -> Facts:
    """Returns all that was found, as JSON values.

    It has each of ``PARTS``, None where it was not come to or means nothing; ``findings``; ``ready``, False where one
    of them is to be mended; and the ``verdict`` in words.

    Args:
        trial: the checks of the recipe.
        items_of: reads a task.
        report: is called with what is going on.
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
        found += [*findings.of_fit(record["fit"]), *findings.of_data(record["data"])]
        if config.tasks:
            try_("overlap", shared, "looking for the data in the tasks")
        if try_("measures", trial.measure, "loading the models, and measuring them on the data"):
            found += findings.of_measures(record["measures"], record["fit"]["columns"])
            unfit = [n for n, x in record["measures"].items() if isinstance(x, float) and not math.isfinite(x)]
            record["measures"] |= dict.fromkeys(unfit)  # JSON knows no infinity
            if not unfit:
                try_("own_text", trial.own_text, "measuring them on what the student writes")
                try_("step", trial.step, "one optimizer step on the longest rows")
    errors = sum(finding.level == "error" for finding in found)
    things = f"{errors or len(found)} thing{'s' * ((errors or len(found)) > 1)}"
    if errors:
        rest = "" if record["step"] is not None else "; what comes after the first was not tried"
        verdict = f"not ready: {things} to change before this run{rest}"
    else:
        verdict = "ready: nothing found that stands in the way of this run" + f"; {things} to think about" * bool(found)
    return {**record, "findings": [one._asdict() for one in found], "ready": not errors, "verdict": verdict}

"""The order of a pre-flight, and what is left of it where a part fails."""

import json
import math
from typing import Any

import pytest

from stillroom.doctor.findings import TaskTexts
from stillroom.doctor.run import DoctorConfig, run
from stillroom.errors import MismatchError, MissingError

WORDS = " ".join(f"w{i}" for i in range(13))


class Patient:
    """A recipe with nothing wrong, but for one part."""

    def __init__(self, sick: str | None = None, **measures: float) -> None:
        self.sick, self.measures, self.asked = sick, measures, []

    def _part(self, name: str, facts: dict[str, Any]) -> dict[str, Any]:
        self.asked.append(name)
        if name == self.sick:
            raise MismatchError(f"{name} is wrong", {"one": 1, "other": self}, why="Because.", fix="Mend it.")
        return facts

    def fit(self):
        return self._part("fit", {"columns": 100})

    def look(self):
        return self._part("look", {"rows": 2, "documents": 2})

    def texts(self):
        self.asked.append("texts")
        return [("a", WORDS), ("b", "other")]

    def measure(self):
        losses = {"cross_entropy_nats": 2.0, "teacher_cross_entropy_nats": 1.8}
        return self._part("measure", {"student": "trained", **losses, **self.measures})

    def own_text(self):
        return self._part("own_text", None)

    def step(self):
        return self._part("step", {"time_s": 1.0})


def no_task(path: str):
    raise MissingError(f"{path} is not there", why="Because.", fix="Mend it.")


def test_everything_is_looked_at_once_and_in_order():
    slow_group = Patient()
    record = run(DoctorConfig(), slow_group, no_task)
    assert slow_group.asked == ["fit", "look", "measure", "own_text", "step"]
    assert record["ready"]
    assert record["findings"] == []
    assert record["overlap"] is None
    assert record["verdict"] == "ready: nothing found that stands in the way of this run"


@pytest.mark.parametrize(
    ("sick", "asked", "part"),
    [
        ("fit", ["fit"], "fit"),
        ("look", ["fit", "look"], "data"),
        ("measure", ["fit", "look", "measure"], "measures"),
        ("step", ["fit", "look", "measure", "own_text", "step"], "step"),
    ],
)
def test_what_comes_after_a_failure_is_not_tried(sick, asked, part):
    slow_group = Patient(sick)
    record = run(DoctorConfig(), slow_group, no_task)
    assert slow_group.asked == asked
    assert not record["ready"]
    assert record[part] is None
    assert [finding["of"] for finding in record["findings"]] == [part]
    assert record["findings"][0]["fix"] == "Mend it."
    assert record["verdict"].startswith("not ready: 1 thing to change before this run; what comes after")
    json.dumps(record, allow_nan=False)


def test_a_step_is_made_though_the_student_could_not_write():
    record = run(DoctorConfig(), Patient("own_text"), no_task)
    assert record["step"] is not None
    assert record["verdict"] == "not ready: 1 thing to change before this run"


def test_text_of_a_task_is_found_and_the_rest_is_looked_at_all_the_same():
    slow_group = Patient()
    record = run(DoctorConfig(tasks=("quiz.yaml",)), slow_group, lambda _: ("quiz", [TaskTexts("q", [WORDS])]))
    assert slow_group.asked == ["fit", "look", "texts", "measure", "own_text", "step"]
    assert not record["ready"]
    assert record["overlap"]["num_shared"] == 1
    assert record["verdict"] == "not ready: 1 thing to change before this run"
    missing = run(DoctorConfig(tasks=("quiz.yaml",)), Patient(), no_task)
    assert missing["step"] is not None
    assert not missing["ready"]


def test_a_warning_does_not_stand_in_the_way():
    record = run(DoctorConfig(), Patient(teacher_cross_entropy_nats=1.0), no_task)
    assert record["ready"]
    assert record["verdict"].endswith("; 1 thing to think about")


def test_what_is_not_finite_is_told_and_is_still_json():
    slow_group = Patient(cross_entropy_nats=math.inf)
    record = run(DoctorConfig(), slow_group, no_task)
    assert slow_group.asked == ["fit", "look", "measure"]
    assert not record["ready"]
    assert record["measures"]["cross_entropy_nats"] is None
    json.dumps(record, allow_nan=False)

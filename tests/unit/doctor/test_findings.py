"""Findings: what of the numbers is said to stand in a run's way."""

import math

import pytest

from stillroom.doctor.findings import KNEE, Overlap, Shared, of_data, of_fit, of_measures, of_overlap

COLUMNS = 1000
GUESS = math.log(COLUMNS)


def measured(student: float, teacher: float | None, kind: str = "trained") -> dict:
    found = {"student": kind, "cross_entropy_nats": student}
    return found if teacher is None else {**found, "teacher_cross_entropy_nats": teacher}


@pytest.mark.parametrize(
    ("facts", "level", "said"),
    [
        (measured(2.0, 1.6), None, ""),
        (measured(2.0, 2.0 * KNEE - 0.01), "warning", "far ahead"),
        (measured(2.0, 2.0 * KNEE + 0.01), None, ""),
        (measured(GUESS, 1.0, "new"), None, ""),
        (measured(3 * GUESS, 1.0, "part"), None, ""),
        (measured(2.0, 2.1), "warning", "no better"),
        (measured(1.1 * GUESS, 1.0), "warning", "the student predicts this text worse than a guess"),
        (measured(2.0, 1.1 * GUESS), "error", "the teacher predicts this text worse than a guess"),
        (measured(GUESS, 1.1 * GUESS, "new"), "error", "the teacher predicts"),
        (measured(2.0, None), None, ""),
        (measured(math.nan, 1.0), "error", "not finite"),
        (measured(2.0, math.inf), "error", "not finite"),
    ],
)
def test_what_the_losses_say(facts, level, said):
    found = list(of_measures(facts, COLUMNS))
    assert [finding.level for finding in found] == ([] if level is None else [level])
    assert all(said in finding.what for finding in found)


def test_a_finding_reads_as_an_error_does():
    (finding,) = of_measures(measured(2.0, 1.0), COLUMNS)
    text = str(finding)
    assert text.startswith("warning: the teacher is far ahead of the student\n")
    assert "ratio: 0.500" in text
    assert "1/1.315 = 0.760" in text
    assert "arXiv 2502.08606" in text


def test_a_template_that_teaches_no_student_to_stop():
    assert not [*of_fit({"learns_to_stop": True}), *of_fit({"learns_to_stop": None})]
    (finding,) = of_fit({"learns_to_stop": False, "template": "1a2b"})
    assert finding.level == "warning"
    assert "never learns to stop" in str(finding)


def test_rows_that_lose_text():
    assert not list(of_data({"rows": 100, "documents": 90, "cut": 10, "dropped_overlong": 0}))
    assert not list(of_data({"documents": 90}))
    (finding,) = of_data({"rows": 100, "cut": 9, "split": 80, "dropped_empty": 2})
    assert finding.level == "warning"
    assert finding.what.startswith("11% of the rows")
    assert finding.values == {"rows": 100, "cut": 9, "dropped empty": 2}


def test_text_of_the_tasks_is_to_be_taken_out():
    none = Overlap(10, 0, {"quiz": 3}, {"quiz": 0}, {"quiz": 0}, ())
    assert not list(of_overlap(none))
    shown = (Shared("train.jsonl line 3", "quiz", "q7", "a b c"),)
    (finding,) = of_overlap(none._replace(num_shared=2, num_items_shared={"quiz": 1}, shown=shown))
    assert finding.level == "error"
    assert finding.values == {"quiz": "1 of 3 items", "train.jsonl line 3": "quiz q7: “a b c”"}

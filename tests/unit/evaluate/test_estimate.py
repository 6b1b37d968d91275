"""Costs of an evaluation: sums by hand, who is beside whom, and what is said not to be known."""

from dataclasses import replace

import pytest

from published import PUBLISHED
from stillroom.config import load
from stillroom.errors import ConfigError
from stillroom.estimates.flops import forward_flops
from stillroom.estimates.hardware import Hardware
from stillroom.estimates.headers import Headers
from stillroom.estimates.model_size import model_size
from stillroom.evaluate.config import EvaluateConfig
from stillroom.evaluate.estimate import LOGITS_BYTES, costs
from stillroom.evaluate.plan import make_plan
from stillroom.recipe import from_yaml

TEACHER, STUDENT = (model_size(PUBLISHED[name][0]) for name in ("Qwen2 7B", "Qwen2 1.5B"))
TEXT = "data={path: nowhere.jsonl, format: text, length: 4096}"
KNOWN = Headers({"teacher": TEACHER, "distilled": STUDENT, "other": STUDENT}, alone=frozenset(["other"]))


def planned(*words, known=KNOWN, **hardware):
    models = "models={teacher: t, distilled: d, other: o}"
    return costs(load(EvaluateConfig, None, [models, "out=x", *words]), known, Hardware(**hardware))


def values(report, section):
    return {name: figure.value for name, figure in report.sections[section].items()}


def test_a_model_lies_beside_the_teacher_and_a_batch_of_both():
    parts = values(planned(TEXT), "memory of a device")
    t, s = TEACHER.total, STUDENT.total
    assert (parts["teacher's weights"], parts["distilled's weights"]) == (2 * t, 2 * s)
    assert parts["last states"] == 2 * 16384 * 2 * (3584 + 1536)
    assert parts["logits"] == 2 * 4 * 151936 * (LOGITS_BYTES // (2 * 4 * 151936))
    assert parts["in all"] == sum(value for name, value in parts.items() if name != "in all")
    each = values(planned(TEXT), "memory while each is asked")
    assert each["teacher"] < each["other"] < each["distilled"] == parts["in all"]


def test_the_teacher_reads_once_more_beside_each_that_is_compared():
    report = planned(TEXT, data_tokens=1e6)
    t, s = forward_flops(TEACHER, 4096), forward_flops(STUDENT, 4096)
    assert values(report, "time on H100")["arithmetic"] == pytest.approx(1e6 * (2 * t + 2 * s))
    assert not any("--dry-run" in sentence for sentence in report.assumptions)
    guessed = planned(TEXT, known=replace(KNOWN, alone=None))
    assert any("--dry-run" in sentence for sentence in guessed.assumptions)


def test_what_does_not_fit_is_told_with_a_batch_that_does():
    advice = planned(TEXT, memory_gb=20.5).advice
    assert advice[0].startswith("does not fit")
    smaller = advice[1].split("with ")[1].split(":")[0]
    assert planned(TEXT, smaller, memory_gb=20.5).advice[0].startswith("fits")
    assert "no smaller batch" in planned(TEXT, memory_gb=10).advice[1]


def test_what_is_not_known_is_not_made_up():
    report = planned(TEXT)
    assert values(report, "time on H100")["tokens"] is None
    assert "time" not in report.sections["time on H100"]
    asked = planned("tasks=[hellaswag]", known=replace(KNOWN, questions={"hellaswag": None}))
    assert values(asked, "tasks") == {"hellaswag": None}
    assert "activations" not in asked.sections["memory of a device"]
    assert any("once they are tokenized" in sentence for sentence in asked.assumptions)
    with pytest.raises(ConfigError, match="no use for students"):
        planned(TEXT, students=2)


def test_a_dry_run_tells_it_of_what_was_compared(saved_model, text_files, tmp_path):
    (tmp_path / "items.jsonl").write_text('{"a": "good", "b": "bad"}\n' * 3)
    (tmp_path / "task.yaml").write_text("{kind: minimal_pairs, name: pairs, items: items.jsonl, good: a, bad: b}\n")
    folders = {name: saved_model("llama", seed=seed) for name, seed in (("teacher", 1), ("distilled", 2))}
    words = [*(f"models.{name}={folder}" for name, folder in folders.items()), f"data.path={text_files}/train.jsonl",
             "data.format=text", "data.length=32", f"tasks=[{tmp_path}/task.yaml]", "device=cpu",
             f"out={tmp_path}/x"]  # fmt: skip
    found = from_yaml(str(make_plan(load(EvaluateConfig, None, words))))["costs"]
    assert found["tasks"] == {"pairs": "3 (questions to each model)"}
    assert found["memory while each is asked"]["distilled"].endswith("(beside teacher)")
    assert not (tmp_path / "x").exists()

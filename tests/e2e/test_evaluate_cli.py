"""`stillroom evaluate` by the real command line: a distilled student beside its teacher and a baseline, with a task."""

import json
from pathlib import Path

import pytest

from stillroom.evaluate.results import Results
from stillroom.runs import read_json


def test_distil_then_evaluate(command, here, recipe, saved_model, text_files, tmp_path):
    student = tmp_path / "student"
    command("distill", str(recipe), "steps=2", f"out={student}")
    (tmp_path / "quiz.jsonl").write_text(
        "".join(json.dumps({"q": q, "c": ["drops", "word"], "t": 0}) + "\n" for q in "abcdefg")
    )
    (tmp_path / "quiz.yaml").write_text(
        "kind: multiple_choice\nname: quiz\nversion: '1'\nitems: quiz.jsonl\ncontext: q\nchoices: c\ntarget: t\n"
    )
    out = tmp_path / "report"
    words = ["evaluate", f"models.teacher={saved_model('llama', seed=2)}", f"models.distilled={student}/model",
             f"models.baseline={saved_model('llama', seed=1)}", f"data.path={text_files}/valid.jsonl",
             "data.format=text", "data.length=32", f"tasks=[{tmp_path}/quiz.yaml]", f"out={out}"]  # fmt: skip
    assert "token by token" in here(*words, "--dry-run").stdout
    assert not out.exists()
    printed = command(*words)
    assert "KL to the teacher" in printed.stdout
    assert "quiz" in printed.stdout
    assert f"{out}/results.json" in printed.stdout
    assert f"report    {out}/report.html" in printed.stdout
    page = (out / "report.html").read_text(encoding="utf-8")
    for part in ("tasks", "agreement", "training", "dots"):
        assert f'<title id="{part}-title">' in page, "the chart is not there"
    assert "tokens" in printed.stderr
    results = Results.model_validate_json((out / "results.json").read_text())
    assert results.runs == {"distilled": str(student)}
    assert results.metrics["distilled"]["forward_kl_nats"].value > 0
    assert results.tasks[0].scores.keys() == {"teacher", "distilled", "baseline"}
    assert (out / str(results.tasks[0].items)).is_file()
    assert read_json(out / "run.json")["status"] == "done"
    assert "done already" in here(*words, "--resume").stderr
    assert "exists" in here(*words, code=2).stderr


def test_real_models_with_three_tokenizers(here, shared_data: Path, tmp_path):
    models = shared_data / "models"
    out = tmp_path / "run"
    here("evaluate", f"models.teacher={models}/stories3M", f"models.same={models}/stories3M",
         f"models.small={models}/stories260K", f"data.path={shared_data}/text/tinystories_valid.jsonl",
         "data.format=text", "data.length=256", "data.max_documents=30", f"out={out}")  # fmt: skip
    results = Results.model_validate_json((out / "results.json").read_text())
    assert results.metrics["teacher"]["cross_entropy_nats"].value == pytest.approx(1.4, abs=0.1)
    assert results.metrics["same"]["forward_kl_nats"].value == 0
    assert "its tokenizer is not that of teacher" in results.refused["small"]["forward_kl_nats"]
    bits = {name: numbers["bits_per_byte"].value for name, numbers in results.metrics.items()}
    assert 0.4 < bits["teacher"] < 0.6 < bits["small"] < 1.2

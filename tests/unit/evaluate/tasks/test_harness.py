"""Tasks of lm-eval: its numbers, as our local tasks give them; what cannot be had fails alone."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from benchmarks import run_task
from conftest import build_model
from stillroom.errors import ConfigError, MissingError
from stillroom.evaluate.config import HarnessTask, LocalTask
from stillroom.evaluate.plan import open_benchmark
from stillroom.evaluate.results import read_items
from stillroom.evaluate.tasks import harness, harness_results
from stillroom.evaluate.tasks.lm import EvalModel

pytestmark = pytest.mark.filterwarnings("ignore")


def test_without_lm_eval_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(MissingError, match=r"stillroom\[eval\]"):
        open_benchmark(HarnessTask(kind="lm_eval", task="hellaswag"))


@pytest.fixture
def models(tiny_tokenizer: PreTrainedTokenizerFast) -> list[EvalModel]:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    models = [EvalModel(f"model{i}", build_model(seed=i), tiny_tokenizer, None, f"m{i}") for i in (1, 2)]
    for one in models:
        assert one.model is not None
        one.model.config.max_position_embeddings = 64
    return models


@pytest.fixture
def both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[HarnessTask, LocalTask]:
    """The same questions as a task of lm-eval and as a local one."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    words = ["still", "teacher", "student", "drops", "word", "first"]
    rows = [
        {"q": f"The {words[i % 6]}", "c": [words[(i + 1) % 6] * (1 + i % 2), words[(i + 3) % 6]], "t": i % 2}
        for i in range(12)
    ]
    (tmp_path / "quiz.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    examples = [{"q": "An example", "c": ["one", "two"], "t": 1}]
    theirs = {
        "task": "quiz_of_lm_eval",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "quiz.jsonl")}},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "Q: {{q}}\nA:",
        "doc_to_choice": "{{c}}",
        "doc_to_target": "{{t}}",
        "description": "Choose.",
        "num_fewshot": 1,
        "fewshot_config": {"sampler": "first_n", "samples": examples},
        "metric_list": [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc", "acc_norm")],
        "metadata": {"version": 2.0},
    }
    (tmp_path / "theirs.yaml").write_text(json.dumps(theirs))
    ours = {
        "kind": "multiple_choice",
        "name": "quiz",
        "items": "quiz.jsonl",
        "instruction": "Choose.",
        "context": "Q: {q}\nA:",
        "choices": "c",
        "target": "t",
        "metric": "acc_norm",
        "shots": 1,
        "examples": examples,
    }
    (tmp_path / "ours.yaml").write_text(json.dumps(ours))
    return (
        HarnessTask(kind="lm_eval", task=str(tmp_path / "theirs.yaml")),
        LocalTask(kind="local", path=str(tmp_path / "ours.yaml")),
    )


def test_a_local_task_gives_the_numbers_of_lm_eval(
    both: tuple[HarnessTask, LocalTask], models: list[EvalModel], tmp_path: Path
):
    theirs, ours = (run_task(task, models, tmp_path / "out", seed=0) for task in both)
    assert (theirs.name, theirs.source, theirs.shots, theirs.metric) == ("theirs", "lm-eval", 1, "acc_norm")
    assert theirs.version.startswith("2.0 (lm-eval ")
    assert theirs.num_items == ours.num_items == 12
    for name in ("model1", "model2"):
        for metric in ("acc", "acc_norm"):
            assert theirs.scores[name][metric].value == ours.scores[name][metric].value
            assert theirs.scores[name][metric].error == pytest.approx(ours.scores[name][metric].error)
    assert theirs.differences[0].value == ours.differences[0].value
    of_theirs, of_ours = (list(read_items(tmp_path / "out" / str(one.items))) for one in (theirs, ours))
    for one, other in zip(of_theirs, of_ours, strict=True):
        assert (one.question, one.gold, one.options) == (other.question, other.gold, other.options)
        for name, answer in one.models.items():
            assert answer.scores == pytest.approx(other.models[name].scores, abs=1e-5)
            assert answer.correct == other.models[name].correct


def test_our_engine_gives_the_numbers_of_lm_evals_own(
    both: tuple[HarnessTask, LocalTask], models: list[EvalModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]

    ours = run_task(both[0], models[:1], tmp_path / "ours", seed=0)
    own = HFLM(pretrained=models[0].model, tokenizer=models[0].tokenizer, batch_size=2)
    monkeypatch.setattr(harness, "_engine", lambda *_: own)
    theirs = run_task(both[0], models[:1], tmp_path / "theirs", seed=0)
    assert ours.scores == theirs.scores
    pairs = zip(
        read_items(tmp_path / "ours/items/theirs.jsonl"),
        read_items(tmp_path / "theirs/items/theirs.jsonl"),
        strict=True,
    )
    for one, other in pairs:
        assert one.models["model1"].scores == pytest.approx(other.models["model1"].scores, abs=1e-5)


def test_shots_and_limit_are_passed_on(both: tuple[HarnessTask, LocalTask], models: list[EvalModel], tmp_path: Path):
    task = both[0].model_copy(update={"limit": 3, "shots": 0})
    found = run_task(task, models[:1], tmp_path, seed=0)
    assert (found.num_items, found.shots) == (3, 0)


def test_a_task_without_network_fails_alone(models: list[EvalModel], tmp_path: Path):
    text = "task: far\ndataset_path: Rowan/hellaswag\noutput_type: multiple_choice\ntest_split: test\n"
    (tmp_path / "far.yaml").write_text(text + "doc_to_text: x\ndoc_to_target: y\ndoc_to_choice: z\n")
    found = run_task(HarnessTask(kind="lm_eval", task=str(tmp_path / "far.yaml")), models, tmp_path, seed=0)
    assert found.failed is not None
    assert "Rowan/hellaswag" in found.failed
    assert (found.name, found.scores, found.items) == ("far", {}, None)


@pytest.mark.usefixtures("models")
def test_an_unknown_name_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(harness, "_manager", lambda **_: SimpleNamespace(all_tasks=["hellaswag", "arc_easy"]))
    with pytest.raises(ConfigError, match="knows no task `helaswag`") as caught:
        open_benchmark(HarnessTask(kind="lm_eval", task="helaswag"))
    assert caught.value.values["did you mean"] == "hellaswag"
    open_benchmark(HarnessTask(kind="lm_eval", task="hellaswag"))


def found_for(**results: Any) -> dict[str, Any]:
    return {"results": results, "groups": {}}


def test_official_scores_stand_beside_the_raw_ones():
    metrics = {"acc,none": 0.37, "acc_stderr,none": 0.01}
    found = harness_results.official_scores("leaderboard_mmlu_pro", {"m": found_for(leaderboard_mmlu_pro=metrics)})
    assert found["m"].value == pytest.approx(0.3)
    assert found["m"].error == pytest.approx(0.01 / 0.9)
    assert harness_results.official_scores("leaderboard_musr", {"m": found_for()}) == {}


def test_metrics_keep_the_filter_that_is_not_the_first():
    metrics = {
        "exact_match,strict": 0.5,
        "exact_match_stderr,strict": "N/A",
        "exact_match,flexible": 0.75,
        "alias": "x",
    }
    found = harness_results._numbers(metrics, "strict")
    assert {name: number.value for name, number in found.items()} == {"exact_match": 0.5, "exact_match,flexible": 0.75}

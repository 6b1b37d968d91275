"""Whole local tasks: scores with errors, differences, the file of items, and its diff."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from benchmarks import run_task
from conftest import build_model
from stillroom.errors import DataError, MissingError
from stillroom.evaluate.config import LocalTask
from stillroom.evaluate.plan import open_benchmark
from stillroom.evaluate.results import Number, TaskResult, as_text, changes, normalize, read_items, scores
from stillroom.evaluate.tasks.lm import EvalModel
from stillroom.statistics import paired_bootstrap

WORDS = ["still", "teacher", "student", "drops", "word", "first", "slowly", "listens"]


@pytest.fixture
def task(tmp_path: Path) -> LocalTask:
    """Twenty questions of two choices, in two groups."""
    rows = [
        {"q": f"{WORDS[i % 8]} {i}", "c": [WORDS[(i + 1) % 8], WORDS[(i + 3) % 8]], "t": i % 2, "g": "ab"[i % 2]}
        for i in range(20)
    ]
    (tmp_path / "quiz.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = "kind: multiple_choice\nname: quiz\nversion: '3'\nitems: quiz.jsonl\ncontext: q\nchoices: c\ntarget: t\n"
    (tmp_path / "quiz.yaml").write_text(text + "group: g\n")
    return LocalTask(kind="local", path=str(tmp_path / "quiz.yaml"))


@pytest.fixture
def models(tiny_tokenizer: PreTrainedTokenizerFast) -> list[EvalModel]:
    return [EvalModel(f"model{i}", build_model(seed=i), tiny_tokenizer, None, f"m{i}") for i in (1, 2)]


def test_a_task_scores_every_model(task: LocalTask, models: list[EvalModel], tmp_path: Path):
    told: list[tuple[str, Any]] = []
    open_benchmark(task)
    found = run_task(task, models, tmp_path / "out", seed=7, report=lambda event, values: told.append((event, values)))
    assert (found.name, found.source, found.version, found.shots) == ("quiz", "local", "3", 0)
    assert (found.num_items, found.metric, found.failed) == (20, "acc", None)
    items = list(read_items(tmp_path / "out" / str(found.items)))
    assert [item.id for item in items] == [f"quiz.jsonl line {i}" for i in range(1, 21)]
    right = {name: [item.models[name].correct for item in items] for name in ("model1", "model2")}
    for item in items:
        for answer in item.models.values():
            assert answer.prediction == item.options[answer.scores.index(max(answer.scores))]
            assert answer.correct == (answer.prediction == item.gold)
    for name, ones in right.items():
        assert found.scores[name]["acc"].value == sum(ones) / 20
        assert found.scores[name]["acc a"].value == sum(ones[::2]) / 10
        assert found.normalised[name].value == pytest.approx((sum(ones) / 20 - 0.5) / 0.5)
    (one,) = found.differences
    assert (one.a, one.b, one.what) == ("model1", "model2", "quiz acc")
    assert (one.value, one.low, one.high) == paired_bootstrap(right["model1"], right["model2"], 7)
    assert told[-1] == ("task", {"task": "quiz", "model": "model2", "done": 40, "total": 40})
    assert TaskResult.model_validate_json(found.model_dump_json()) == found


def test_the_same_task_gives_the_same_bytes(task: LocalTask, models: list[EvalModel], tmp_path: Path):
    first, second = (run_task(task, models, tmp_path / name, seed=7) for name in ("a", "b"))
    assert first == second
    assert (tmp_path / "a/items/quiz.jsonl").read_bytes() == (tmp_path / "b/items/quiz.jsonl").read_bytes()


def test_a_diff_tells_gains_and_losses(task: LocalTask, models: list[EvalModel], tmp_path: Path):
    path = tmp_path / str(run_task(task, models, tmp_path, seed=0).items)
    changed = list(changes(path, "model1", "model2"))
    gained = [one.item.id for one in changed if one.kind == "gained"]
    lost = [one.item.id for one in changed if one.kind == "lost"]
    wanted = {item.id: item.models["model2"].correct - item.models["model1"].correct for item in read_items(path)}
    assert gained == [name for name, by in wanted.items() if by > 0]
    assert lost == [name for name, by in wanted.items() if by < 0]
    assert changed
    errors = changes(path, "model1", "model2", higher_is_better=False)  # as of scores that are errors
    assert [one.kind for one in errors] == [{"gained": "lost", "lost": "gained"}[one.kind] for one in changed]
    text = as_text(changed[0], "model1", "model2")
    assert text.startswith("+ " if changed[0].kind == "gained" else "- ")
    assert f"model2: {changed[0].b.prediction}" in text
    with pytest.raises(MissingError, match="tells nothing of model3"):
        list(changes(path, "model1", "model3"))


def test_a_broken_line_of_items_is_named(tmp_path: Path):
    (tmp_path / "x.jsonl").write_text('{"id": "1"}\n')
    with pytest.raises(DataError, match=r"x\.jsonl line 1 is not an item"):
        list(read_items(tmp_path / "x.jsonl"))
    with pytest.raises(MissingError, match="are not there"):
        list(read_items(tmp_path / "y.jsonl"))


def test_a_model_that_cannot_be_asked_leaves_the_others(task: LocalTask, models: list[EvalModel], tmp_path: Path):
    api = EvalModel("api", None, None, "http://127.0.0.1:9/v1", "x")
    found = run_task(task, [api, *models], tmp_path, seed=0)
    assert set(found.scores) == {"model1", "model2"}
    assert len(found.differences) == 1
    assert found.failed is not None
    assert found.failed.startswith("api: api cannot say how likely a given answer is")
    alone = run_task(task, [api], tmp_path / "alone", seed=0)
    assert (alone.scores, alone.items) == ({}, None)


def test_a_task_is_checked_before_any_model_runs(task: LocalTask, tmp_path: Path):
    with (tmp_path / "quiz.jsonl").open("a") as file:
        file.write('{"q": "?", "c": ["only"], "t": 0, "g": "a"}\n')
    with pytest.raises(DataError, match="line 21: there is nothing to choose"):
        open_benchmark(task)
    open_benchmark(task.model_copy(update={"limit": 20}))


def test_cut_questions_are_told(task: LocalTask, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path):
    short = EvalModel("short", build_model(max_position_embeddings=6), tiny_tokenizer, None, "m")
    notes: list[str] = []
    run_task(
        task, [short], tmp_path, seed=0, report=lambda event, v: notes.append(v["text"]) if event == "note" else None
    )
    assert "of 20 questions were too long for short and cut at their beginning" in notes[-1]
    assert sum(item.models["short"].num_cut > 0 for item in read_items(tmp_path / "items/quiz.jsonl")) > 0


def test_pairs_words_and_writing_run_too(models: list[EvalModel], tmp_path: Path):
    (tmp_path / "items.jsonl").write_text('{"a": "The still runs", "b": "runs The still"}\n{"a": "A b", "b": "b A"}\n')
    kinds = {
        "pairs": ("minimal_pairs", "good: a\nbad: b\n", "acc"),
        "words": ("last_word", "text: a\n", "acc"),
        "writing": ("exact_match", "context: a\ntarget: b\nmax_tokens: 3\n", "exact_match"),
    }
    for name, (kind, text, metric) in kinds.items():
        (tmp_path / f"{name}.yaml").write_text(f"kind: {kind}\nname: {name}\nitems: items.jsonl\n{text}")
        found = run_task(LocalTask(kind="local", path=str(tmp_path / f"{name}.yaml")), models, tmp_path, seed=0)
        assert (found.metric, found.num_items, found.failed) == (metric, 2, None)
        assert ("model1" in found.normalised) == (name == "pairs")
        assert ("perplexity" in found.scores["model1"]) == (name == "words")


def test_a_perplexity_is_of_the_mean_log_likelihood():
    found = scores({"acc": [1.0, 0.0], "log_likelihood_nats": [-1.0, -3.0]}, [None, None], "acc")["perplexity"]
    assert found.value == pytest.approx(2.718281828**2)
    assert found.low is not None
    assert found.high is not None
    assert found.low < found.value < found.high


def test_a_perplexity_that_no_number_can_hold_is_left_out():
    found = scores({"acc": [1.0, 0.0], "log_likelihood_nats": [-10.0, -8000.0]}, [None, None], "acc")
    assert "perplexity" not in found
    assert found["log_likelihood_nats"].value == -4005.0


def test_normalized_is_0_at_chance_and_1_at_perfect():
    assert normalize(Number(value=0.25), 0.25).value == 0
    assert normalize(Number(value=1.0), 0.25).value == 1
    below = Number(value=0.1, error=0.03, low=0.04, high=0.4)
    assert normalize(below, 0.25).value == pytest.approx(-0.2)
    clipped = normalize(below, 0.25, clip=True)
    assert (clipped.value, clipped.low, clipped.high) == (0, 0, pytest.approx(0.2))
    assert clipped.error == pytest.approx(0.04)

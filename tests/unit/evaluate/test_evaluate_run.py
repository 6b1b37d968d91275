"""Whole evaluations: what is refused and why, roles, runs, resuming, and every bad input."""

import gc
import json
import shlex
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import build_tokenizer
from stillroom.config import load
from stillroom.errors import ConfigError, DataError, MismatchError, MissingError, NonFiniteError, StorageError
from stillroom.evaluate import run as evaluation
from stillroom.evaluate.config import EvaluateConfig
from stillroom.evaluate.plan import NO_DISTRIBUTION, make_plan
from stillroom.evaluate.results import Results
from stillroom.evaluate.tasks.local import LocalBenchmark


@pytest.fixture(scope="module")
def teacher(saved_model) -> Path:
    return saved_model("llama", seed=1)


@pytest.fixture(scope="module")
def student(saved_model) -> Path:
    return saved_model("llama", seed=2)


@pytest.fixture(scope="module")
def stranger(saved_model, tmp_path_factory) -> Path:
    """A model with a tokenizer of its own, of fewer and so longer sequences of tokens."""
    folder = tmp_path_factory.mktemp("own-tokenizer")
    build_tokenizer(vocabulary=270).save_pretrained(folder)
    return saved_model("llama", seed=4, tokenizer=folder)


def settings(text_files: Path, out: Path, *words: str, **models: Path) -> list[str]:
    return [*(f"models.{name}={folder}" for name, folder in models.items()), f"data.path={text_files}/train.jsonl",
            "data.format=text", "data.length=32", f"out={out}", *words]  # fmt: skip


def evaluate(*words: str, **flags: Any) -> tuple[dict[str, Any], Results]:
    record = evaluation.run(load(EvaluateConfig, None, words), **flags)
    return record, Results.model_validate_json((Path(record["config"]["out"]) / "results.json").read_text())


def test_a_model_with_another_tokenizer_has_bits_per_byte_and_no_kl(text_files, tmp_path, teacher, student, stranger):
    words = settings(text_files, tmp_path / "run", teacher=teacher, distilled=student, stranger=stranger)
    _, results = evaluate(*words)
    numbers, why = results.metrics["stranger"], results.refused["stranger"]
    assert set(numbers) == {"cross_entropy_nats", "perplexity", "bits_per_byte", "entropy_nats", "calibration_error"}
    assert "forward_kl_nats" in why
    assert "recovered_gap" in why
    assert "tokenizer is not that of teacher" in why["forward_kl_nats"]
    assert results.text is not None
    nats = numbers["cross_entropy_nats"].value * (sum_of_tokens := tokens_of(text_files, stranger))
    assert numbers["bits_per_byte"].value == pytest.approx(nats / 0.6931471805599453 / results.text.num_bytes, rel=1e-6)
    assert sum_of_tokens > results.text.num_tokens
    pairs = {(d.a, d.b): d.what for d in results.differences if "stranger" in (d.a, d.b)}
    assert pairs == {("teacher", "stranger"): "bits_per_byte", ("distilled", "stranger"): "bits_per_byte"}
    assert set(results.worst) == {"distilled"}
    assert results.refused["distilled"] == {"recovered_gap": "no model is said to be the baseline"}


def tokens_of(text_files: Path, folder: Path) -> int:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [json.loads(line)["text"] for line in (text_files / "train.jsonl").read_text().splitlines()]
    return sum(len(tokenizer(text)["input_ids"]) for text in texts)  # one more by the end, one less by the beginning


def test_where_texts_are_cut_bytes_of_other_tokenizers_are_refused(text_files, tmp_path, teacher, stranger):
    words = settings(text_files, tmp_path / "run", "data.overlong=cut", teacher=teacher, stranger=stranger)
    _, results = evaluate(*words)
    assert "another part of it" in results.refused["stranger"]["bits_per_byte"]
    assert "bits_per_byte" in results.metrics["teacher"]


def test_recovered_gap_lies_between_baseline_and_teacher(text_files, tmp_path, teacher, student):
    """The roles are given; the teacher is the model whose cross-entropy is lowest of three."""
    folders = dict(zip("abc", (teacher, student, student), strict=True))
    words = settings(text_files, tmp_path / "first", **folders)
    _, plain = evaluate(*words)
    assert plain.refused["a"]["forward_kl_nats"] == "no model is said to be the teacher"
    nats = {name: plain.metrics[name]["cross_entropy_nats"].value for name in "ab"}
    best, worst = sorted("ab", key=lambda name: nats[name])
    models = [
        f"models.x={{model: {folders[best]}, role: teacher}}",
        f"models.y={{model: {folders[worst]}, role: baseline}}",
    ]
    words = [*settings(text_files, tmp_path / "run", distilled=folders[best]), *models]
    _, results = evaluate(*words)
    gap = results.metrics["distilled"]["recovered_gap"]
    assert gap.value == pytest.approx(1)
    assert gap.error == pytest.approx(0, abs=1e-9)
    assert "recovered_gap" not in results.metrics["y"]
    swapped = [
        f"models.x={{model: {folders[best]}, role: baseline}}",
        f"models.y={{model: {folders[worst]}, role: teacher}}",
    ]
    _, results = evaluate(*settings(text_files, tmp_path / "swapped", distilled=folders[best]), *swapped)
    assert "not above the teacher's" in results.refused["distilled"]["recovered_gap"]


def test_facts_runs_and_a_command_that_repeats_it(text_files, tmp_path, teacher, student):
    around = tmp_path / "distilling"
    around.mkdir()
    (around / "model").symlink_to(student)
    (around / "run.json").write_text("{}")
    (around / "metrics.jsonl").write_text("")
    words = settings(text_files, tmp_path / "run", teacher=teacher, distilled=around / "model")
    record, results = evaluate(*words)
    assert results.runs == {"distilled": str(around)}
    (first, second) = results.models
    weights = load_file(student / "model.safetensors")
    assert second.num_parameters == sum(tensor.numel() for tensor in weights.values())
    assert second.size_bytes == (student / "model.safetensors").stat().st_size
    assert first.role == "teacher"
    assert first.tokenizer == second.tokenizer
    assert second.tokens_per_s is not None
    assert second.peak_memory_bytes is None or second.peak_memory_bytes >= sum(t.nbytes for t in weights.values())
    again = results.command.replace(str(tmp_path / "run"), str(tmp_path / "again")).split()
    assert again[:2] == ["stillroom", "evaluate"]
    _, repeated = evaluate(*again[2:])
    assert repeated.metrics == results.metrics
    assert record["status"] == "done"
    assert record["metrics"]["teacher"]["perplexity"] == results.metrics["teacher"]["perplexity"].value


def test_tasks_are_asked_of_all_models_and_one_that_fails_leaves_the_others(tmp_path, teacher, monkeypatch):
    (tmp_path / "quiz.jsonl").write_text('{"q": "still", "c": ["a", "b"], "t": 0}\n' * 4)
    text = "kind: multiple_choice\nname: NAME\nversion: '1'\nitems: quiz.jsonl\ncontext: q\nchoices: c\ntarget: t\n"
    for name in ("one", "two"):
        (tmp_path / f"{name}.yaml").write_text(text.replace("NAME", name))
    whole = LocalBenchmark.ask

    def ask(self, *rest):
        if self.name == "one":
            raise ValueError("nobody foresaw this")
        return whole(self, *rest)

    monkeypatch.setattr(LocalBenchmark, "ask", ask)
    words = [f"models.teacher={teacher}", f"tasks=[{tmp_path}/one.yaml, {tmp_path}/two.yaml]", f"out={tmp_path}/run"]
    record, results = evaluate(*words)
    assert record["status"] == "failed"
    assert record["failed_tasks"]["one"].startswith("ValueError: nobody foresaw this (traceback in ")
    assert "nobody foresaw this" in (tmp_path / "run/failures/one-teacher.txt").read_text()
    assert set(record["tasks"]) == {"two"}
    assert results.text is None
    assert (tmp_path / "run" / str(results.tasks[1].items)).is_file()
    (tmp_path / "quiz.jsonl").write_text('{"q": "still", "c": ["a"], "t": 0}\n')
    with pytest.raises(DataError):
        make_plan(load(EvaluateConfig, None, words))


def quiz(folder: Path, name: str = "quiz", items: str = "quiz.jsonl") -> Path:
    (folder / items).write_text('{"q": "still", "c": ["a", "b"], "t": 0}\n' * 4)
    text = f"kind: multiple_choice\nname: {name}\nitems: {items}\ncontext: q\nchoices: c\ntarget: t\n"
    (folder / f"{name}.yaml").write_text(text)
    return folder / f"{name}.yaml"


def test_two_tasks_of_one_name_are_refused(tmp_path, teacher):
    path = quiz(tmp_path)
    words = [f"models.teacher={teacher}", f"out={tmp_path}/run"]
    twice = f"tasks=[{path}, {{kind: local, path: {path}, limit: 2}}]"
    with pytest.raises(ConfigError, match="two tasks are called quiz") as caught:
        make_plan(load(EvaluateConfig, None, [*words, twice]))
    assert "limit=2" in caught.value.values["second"]
    named = f"tasks=[{path}, {{kind: local, path: {path}, limit: 2, name: short}}]"
    _, results = evaluate(*words, named)
    assert [(task.name, task.num_items) for task in results.tasks] == [("quiz", 4), ("short", 2)]
    assert (tmp_path / "run/items/short.jsonl").read_text().count("\n") == 2
    prints = [task.fingerprint for task in results.tasks]
    assert len({*prints}) == 2
    assert all(prints)


def test_items_that_overwriting_would_delete_are_refused(tmp_path, teacher):
    (tmp_path / "run").mkdir()
    path = quiz(tmp_path, items="run/quiz.jsonl")
    with pytest.raises(ConfigError, match="lies inside the output folder"):
        make_plan(load(EvaluateConfig, None, [f"models.teacher={teacher}", f"tasks=[{path}]", f"out={tmp_path}/run"]))


def test_one_model_is_held_at_a_time_and_the_teacher_beside_it(text_files, tmp_path, teacher, student, monkeypatch):
    held, most = weakref.WeakSet[torch.nn.Module](), []
    whole = evaluation._load

    def load_counted(local, *rest, **flags):
        gc.collect()
        most.append((local.name, len(held)))
        model = whole(local, *rest, **flags)
        held.add(model)
        return model

    monkeypatch.setattr(evaluation, "_load", load_counted)
    models = {"teacher": teacher, "a": student, "b": student, "c": student}
    words = [*(f"models.{name}={folder}" for name, folder in models.items()), f"tasks=[{quiz(tmp_path)}]"]
    _, results = evaluate(*words, f"out={tmp_path}/tasks")
    assert most == [("teacher", 0), ("a", 0), ("b", 0), ("c", 0)]
    assert set(results.tasks[0].scores) == {*models}
    most.clear()
    evaluate(*settings(text_files, tmp_path / "text", f"tasks=[{quiz(tmp_path)}]", **models))
    assert most == [("teacher", 0), ("a", 1), ("b", 1), ("c", 1)]


def test_an_evaluation_that_is_made_again_keeps_nothing_of_the_first(tmp_path, teacher, monkeypatch):
    words = [f"models.teacher={teacher}", f"tasks=[{quiz(tmp_path)}]", f"out={tmp_path}/run"]
    with monkeypatch.context() as patch:
        patch.setattr(LocalBenchmark, "ask", lambda *_: 1 / 0)
        record, _ = evaluate(*words)
    assert record["failed_tasks"]["quiz"].startswith("ZeroDivisionError")
    (tmp_path / "run/items").mkdir()
    (tmp_path / "run/items/old.jsonl").write_text("")
    record, results = evaluate(*words, resume=True)
    assert record["failed_tasks"] == {}
    assert results.tasks[0].failed is None
    assert sorted(path.name for path in (tmp_path / "run/items").iterdir()) == ["quiz.jsonl"]
    assert not (tmp_path / "run/failures").exists()


def test_a_teacher_behind_an_address_compares_nobody(text_files, tmp_path, student, stranger):
    served = "models.teacher={model: m, url: 'http://127.0.0.1:9/v1'}"
    words = settings(text_files, tmp_path / "run", served, distilled=student, stranger=stranger)
    plan = make_plan(load(EvaluateConfig, None, words))
    for name in ("distilled", "stranger"):
        assert plan.details()["compares"][name] == f"not token by token: of teacher, {NO_DISTRIBUTION}"
    _, results = evaluate(*words)
    for name in ("distilled", "stranger"):
        assert results.refused[name]["forward_kl_nats"] == f"of teacher, {NO_DISTRIBUTION}"


def test_the_tokenizer_of_a_served_model_is_looked_for_first(tmp_path):
    served = "models.served={model: m, url: 'http://127.0.0.1:9/v1', tokenizer: ./nowhere}"
    with pytest.raises(MissingError, match="nowhere"):
        make_plan(load(EvaluateConfig, None, [served, f"tasks=[{quiz(tmp_path)}]", f"out={tmp_path}/run"]))


def test_a_text_that_yaml_would_read_otherwise_is_quoted_in_the_command():
    given = load(EvaluateConfig, None, ["models.a={model: m, revision: '1234567'}", "out=x", "tasks=[hellaswag]"])
    again = load(
        EvaluateConfig, None, shlex.split(evaluation._command(given.model_dump(mode="json", exclude_unset=True)))[2:]
    )
    assert again == given
    assert again.models["a"].revision == "1234567"


def test_a_finished_one_is_not_repeated_and_an_interrupted_one_starts_again(text_files, tmp_path, teacher, monkeypatch):
    words = settings(text_files, tmp_path / "run", teacher=teacher)
    with monkeypatch.context() as patch:
        patch.setattr(evaluation.HeldOutEval, "score", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            evaluate(*words)
    assert json.loads((tmp_path / "run/run.json").read_text())["status"] == "interrupted"
    assert not (tmp_path / "run/results.json").exists()
    notes: list[str] = []

    def report(event, values):
        if event == "note":
            notes.append(values["text"])

    first, _ = evaluate(*words, resume=True, report=report)
    again, _ = evaluate(*words, resume=True, report=report)
    assert "starts again" in notes[0]
    assert "done already" in notes[1]
    assert again == first
    with pytest.raises(StorageError, match="exists"):
        evaluate(*words)
    with pytest.raises(ConfigError, match="other settings"):
        evaluate(*words, "seed=1", resume=True)


def test_logits_that_are_no_numbers_are_an_error(text_files, tmp_path, teacher, student):
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in student.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    weights = load_file(broken / "model.safetensors")
    weights["lm_head.weight"][7] = torch.nan
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises((NonFiniteError, MismatchError)):
        evaluate(*settings(text_files, tmp_path / "run", teacher=teacher, distilled=broken))


BAD = [
    ("models={}", "at least 1", ConfigError),
    ("models.2x=y", "pattern", ConfigError),
    ("models.other={model: TEACHER, role: teacher}", "one teacher at the most", ConfigError),
    ("models.distilled={model: TEACHER, rolle: baseline}", "did you mean: role", ConfigError),
    ("data.weight=x", "data.weight", ConfigError),
    ("data.cache=x", "keeps no tokenized data", ConfigError),
    ("data=null", "nothing to measure", ConfigError),
    ("data.path=./nowhere.jsonl", "not there", MissingError),
    ("data.length=65", "longer than the teacher can read", ConfigError),
    ("batch_tokens=8", "less than a row", ConfigError),
    ("device=cuda:99", "not there", MissingError),
    ("models.distilled=./nowhere", "not a model folder", MissingError),
    ("models.distilled={model: TEACHER, tokenizer: OTHER}", "different tokenizers", MismatchError),
    ("models.distilled={model: TEACHER, run: nowhere}", "not the folder of a run", MissingError),
    ("out=TEACHER/..", "inside the output folder", ConfigError),
]


@pytest.mark.parametrize(("word", "message", "kind"), BAD, ids=[word for word, _, _ in BAD])
def test_bad_input_is_named(text_files, tmp_path, teacher, stranger, word, message, kind):
    word = word.replace("TEACHER", str(teacher)).replace("OTHER", str(stranger))
    words = [*settings(text_files, tmp_path / "run", teacher=teacher), word]
    with pytest.raises(kind) as caught:
        make_plan(load(EvaluateConfig, None, words))
    assert message in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_the_plan_says_who_is_compared_how_and_writes_nothing(text_files, tmp_path, teacher, student, stranger):
    served = "models.served={model: m, url: 'http://127.0.0.1:9/v1'}"
    models = {"distilled": student, "teacher": teacher, "stranger": stranger}
    plan = make_plan(load(EvaluateConfig, None, settings(text_files, tmp_path / "run", served, **models)))
    assert [local.name for local in plan.local_models] == ["teacher", "distilled", "stranger"]
    assert list(plan.details()["compares"]) == ["distilled", "teacher", "stranger", "served"]
    assert plan.details()["compares"]["distilled"] == "token by token"
    assert plan.details()["compares"]["stranger"].startswith("not token by token: its tokenizer")
    assert "tasks alone" in plan.details()["compares"]["served"]
    assert "results.json" in str(plan)
    assert not (tmp_path / "run").exists()


def test_chat_templates_of_teacher_and_student_must_agree(tmp_path, saved_model, chat_tokenizer_folder, chat_tokenizer):
    other = tmp_path / "other-template"
    chat_tokenizer.save_pretrained(other)
    (other / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    teacher = saved_model("llama", seed=1, tokenizer=chat_tokenizer_folder)
    distilled = saved_model("llama", seed=2, tokenizer=other)
    turns = [{"role": "user", "content": "Drops?"}, {"role": "assistant", "content": "12 drops."}]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    words = [f"models.teacher={teacher}", f"models.distilled={distilled}", f"data.path={tmp_path}/chat.jsonl",
             "data.format=chat", "data.length=64", f"out={tmp_path}/run"]  # fmt: skip
    with pytest.raises(MismatchError, match="different chat templates"):
        make_plan(load(EvaluateConfig, None, words))
    _, results = evaluate(*words, "data.template=teacher")
    assert results.text is not None
    assert results.text.num_bytes == len("12 drops.")
    number = results.metrics["distilled"]["forward_kl_nats"]
    assert number.error is None  # of a single document
    assert results.differences == ()


def test_without_the_plotting_library_there_is_markdown_and_a_note(tmp_path, monkeypatch):
    from evaluations import build_evaluation
    from stillroom.errors import require
    from stillroom.evaluate.report import charts
    from stillroom.evaluate.run import _write_report

    monkeypatch.setattr(charts, "check", lambda: require("no_such_package", "report", "the charts of report.html"))
    notes = []
    paths = _write_report(build_evaluation(tmp_path), tmp_path, lambda event, values: notes.append((event, values)))
    assert paths == [str(tmp_path / "report.md")]
    ((event, values),) = notes
    assert event == "note"
    assert "there is no report.html" in values["text"]
    assert f"`stillroom report {tmp_path}`" in values["text"]

"""What a report says: words for numbers, training curves, changed items, and what is missing."""

import json
from pathlib import Path

import pytest

from evaluations import build_evaluation
from stillroom.errors import DataError, MissingError
from stillroom.evaluate.report import tables
from stillroom.evaluate.report.content import SHOWN, make_report, pairs, read_changes, read_training, sentences
from stillroom.evaluate.report.page import read_results, rebuild
from stillroom.evaluate.report.tables import metric_table
from stillroom.evaluate.results import Difference, Item, ModelAnswer, Number, Results, write_items


@pytest.mark.parametrize(
    ("number", "unit", "wanted"),
    [
        (Number(value=0.12345), "%", "12.3 %"),
        (Number(value=0.12345, error=0.0004), "%", "12.35 %"),
        (Number(value=1.23456, error=0.011), "", "1.235"),
        (Number(value=180.24460891, error=3.8), "", "180.2"),
        (Number(value=12345.678), "", "12,345.7"),
        (Number(value=-0.0866, error=0.05), "%", "−8.7 %"),
        (Number(value=-0.00001, error=0.05), "%", "0.0 %"),
        (Number(value=float("nan")), "", "not a number"),
        (Number(value=float("inf")), "", "∞"),
    ],
)
def test_a_number_has_the_digits_that_its_error_bears(number, unit, wanted):
    assert tables.value_text(number, unit) == wanted


def test_an_interval_may_be_unknown():
    assert tables.interval_text(Number(value=1.0, error=0.1)) == ""
    assert tables.interval_text(Number(value=1.0, error=0.1, low=0.8, high=1.2)) == "0.80 to 1.20"


def test_sizes():
    assert [tables.size(n) for n in (None, 12, 2048, 5 << 30)] == ["–", "12 bytes", "2.0 KiB", "5.0 GiB"]


def test_a_long_name_keeps_its_ends():
    assert tables.shortened("abcdefghij", 7) == "abc…hij"
    assert tables.shortened("a\n b", 7) == "a b"


def test_bars_are_of_normalised_scores_where_all_models_have_them(tmp_path):
    results = build_evaluation(tmp_path, num_tasks=2)
    groups = make_report(results, tmp_path).task_groups
    assert [(g.title, g.note) for g in groups] == [("blimp", "acc_norm, normalised"), ("bbh_causal_judgement", "acc")]
    task = results.tasks[0]
    fewer = task.model_copy(update={"normalised": {"teacher": task.normalised["teacher"]}})
    (group,) = make_report(results.model_copy(update={"tasks": (fewer,)}), tmp_path).task_groups
    assert group.note == "acc_norm"


def test_the_axis_of_normalised_scores_says_what_they_are(tmp_path):
    results = build_evaluation(tmp_path, num_tasks=2)
    assert make_report(results, tmp_path).task_axis == "percent"
    normalised = results.model_copy(update={"tasks": results.tasks[:1]})
    assert make_report(normalised, tmp_path).task_axis == "0 is chance, 100 perfect"


@pytest.mark.parametrize(
    ("gap", "drawn"),
    [
        (Number(value=0.9), True),
        (Number(value=1.05, low=0.9, high=1.2), True),
        (Number(value=-0.3), False),
        (Number(value=1.6), False),
        (Number(value=0.5, low=-3.0, high=4.0), False),
    ],
)
def test_a_recovered_gap_that_is_no_share_is_not_drawn_among_shares(tmp_path, gap, drawn):
    results = build_evaluation(tmp_path, num_tasks=0)
    results.metrics["distilled"]["recovered_gap"] = gap
    report = make_report(results, tmp_path)
    assert ("recovered gap" in [group.title for group in report.agreement_groups]) == drawn
    assert ("it has its card" in report.agreement_note) != drawn
    assert report.headlines[0]["title"] == "recovered gap"


def test_a_score_that_is_no_share_is_not_drawn_and_that_is_said(tmp_path):
    results = build_evaluation(tmp_path, num_tasks=1)
    scores = {name: {"perplexity": Number(value=12.0)} for name in results.tasks[0].scores}
    task = results.tasks[0].model_copy(update={"metric": "perplexity", "scores": scores, "normalised": {}})
    report = make_report(results.model_copy(update={"tasks": (task,)}), tmp_path)
    assert report.task_groups == ()
    assert "Not drawn, since its score is no share: blimp." in report.task_note
    assert report.tasks.rows[0][5].text == "12.00"


def without(results: Results, name: str) -> Results:
    """The same, but the first task failed for one model."""
    task = results.tasks[0]
    scores = {one: numbers for one, numbers in task.scores.items() if one != name}
    normalised = {one: number for one, number in task.normalised.items() if one != name}
    task = task.model_copy(update={"scores": scores, "normalised": normalised, "failed": f"{name}: it is deaf"})
    return results.model_copy(update={"tasks": (task, *results.tasks[1:])})


def test_a_task_that_failed_for_one_model_is_shown_for_the_others(tmp_path):
    results = without(build_evaluation(tmp_path), "baseline")
    report = make_report(results, tmp_path)
    assert report.failed == ("leaderboard_mmlu_pro failed: the task's data could not be fetched",)
    raw, normalised, *_ = report.tasks.rows
    assert [(cell.text, cell.mark) for cell in raw[5:]] == [("80.0 %", ""), ("73.5 %", ""), ("–", "1")]
    assert [cell.text for cell in normalised[5:]] == ["60.0 %", "47.0 %", "–"]
    assert report.tasks.notes == ("blimp failed: baseline: it is deaf",)
    assert report.more_scores[0].notes == report.tasks.notes
    assert list(report.task_groups[0].numbers) == ["teacher", "distilled"]
    assert "no bar, in blimp; why is said below" in report.task_note
    assert [(one.task, one.a) for one in report.changes][:2] == [
        ("blimp", "teacher"),
        ("bbh_causal_judgement", "baseline"),
    ]
    assert "2 benchmarks of 16 items" in report.about


def difference(what: str, a: str, b: str) -> Difference:
    return Difference(what=what, a=a, b=b, value=1, low=0, high=2, num_items=9, sentence=f"{a} and {b}")


@pytest.mark.parametrize(
    ("pairs", "wanted"),
    [
        (
            [("cross_entropy_nats", "baseline"), ("bits_per_byte", "baseline"), ("bits_per_byte", "teacher")],
            ["cross-entropy: baseline and distilled", "bits per byte: teacher and distilled"],
        ),
        ([("bits_per_byte", "other"), ("entropy_nats", "other")], ["bits per byte: other and distilled"]),
    ],
)
def test_the_sentences_that_are_read_first(tmp_path, pairs, wanted):
    results = build_evaluation(tmp_path, names=("teacher", "distilled", "baseline", "other"), num_tasks=0)
    differences = tuple(difference(what, a, "distilled") for what, a in pairs)
    assert sentences(results.model_copy(update={"differences": differences})) == tuple(wanted)


def test_passages_near_to_the_teacher_are_none_of_the_furthest(tmp_path):
    results = build_evaluation(tmp_path)
    far, near = (results.worst["distilled"][0].model_copy(update={"mean_kl_nats": kl}) for kl in (0.01, 0.009))
    worst = {"distilled": (far, near), "baseline": (near,)}
    assert make_report(results.model_copy(update={"worst": worst}), tmp_path).worst == (
        ("distilled", (far,)),
        ("baseline", ()),
    )


@pytest.mark.parametrize(("base", "marked"), [("teacher", [False, True, False]), ("other", [False, True, True])])
def test_numbers_in_other_tokens_than_the_teachers_bear_a_note(tmp_path, base, marked):
    results = build_evaluation(tmp_path, names=(base, "distilled", "baseline"), num_tasks=0)
    fingerprints = [base, "another", "teacher"]
    models = tuple(
        facts.model_copy(update={"tokenizer": one}) for facts, one in zip(results.models, fingerprints, strict=True)
    )
    table = metric_table(results.model_copy(update={"models": models}))
    rows = {row[0].text: [cell.mark == "1" for cell in row[3:]] for row in table.rows}
    assert rows["cross-entropy"] == rows["perplexity"] == rows["calibration error (ECE, 15 bins)"] == marked
    assert not any(rows["bits per byte"] + rows["KL to the teacher"])
    assert table.notes == ("counted in its own tokens; compare bits per byte",)


def test_the_curves_of_a_run(tmp_path):
    results = build_evaluation(tmp_path)
    training = read_training({"distilled": Path(results.runs["distilled"])})
    titles = ["held-out cross-entropy", "held-out KL to the teacher", "training loss, each run's own objective"]
    assert [panel.title for panel in training.panels] == titles
    held_out, _, loss = training.panels
    assert held_out.level == 1.4
    (curve,) = held_out.curves
    assert curve.steps == [50, 100, 150, 200, 250, 300, 350, 400]
    (curve,) = loss.curves
    assert (curve.steps[0], curve.steps[-1], len(curve.steps)) == (1, 400, 240)
    lines = [json.loads(line) for line in (Path(results.runs["distilled"]) / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss_nats"] for line in lines if "loss_nats" in line]
    assert curve.values[0] == pytest.approx(sum(losses[:9]) / 9)
    assert curve.thin[0] == losses[0]


def test_a_run_that_is_gone_or_damaged_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss_nats": 2.0}\nnonsense\n{"step": 2}\n')
    training = read_training({"gone": tmp_path / "gone", "damaged": tmp_path})
    assert training.panels == ()
    assert training.missing == {
        "gone": f"{tmp_path}/gone/metrics.jsonl is not there",
        "damaged": f"{tmp_path}/metrics.jsonl is damaged, line 2",
    }


def test_students_are_compared_with_the_baseline_and_the_teacher(tmp_path):
    models = build_evaluation(tmp_path, names=("teacher", "distilled", "baseline", "other")).models
    assert pairs(models) == (("baseline", "distilled"), ("teacher", "distilled"))
    assert pairs(models[2:]) == (("baseline", "other"),)
    assert pairs(models[:1]) == ()


def test_changed_items_are_counted_and_some_of_both_kinds_are_shown(tmp_path):
    results = build_evaluation(tmp_path, num_tasks=1)

    def item(i: int) -> Item:
        right = {"baseline": float(i < 30), "distilled": float(i >= 30), "teacher": 1.0}
        answers = {name: ModelAnswer(prediction="p", correct=correct) for name, correct in right.items()}
        return Item(id=str(i), question="q", gold="g", models=answers)

    write_items(tmp_path / "items" / "task-0.jsonl", map(item, range(32)))
    one, other = read_changes(results.tasks, results.models, tmp_path)
    assert (one.a, one.b, one.gained, one.lost) == ("baseline", "distilled", 2, 30)
    assert [change.item.id for change in one.shown] == ["30", "31", *map(str, range(SHOWN - 2))]
    assert (other.a, other.b, other.gained, other.lost) == ("teacher", "distilled", 0, 30)
    assert len(other.shown) == SHOWN


@pytest.mark.parametrize(
    ("file", "why"), [("items/gone.jsonl", "are not there"), ("../secret.jsonl", "outside the evaluation's folder")]
)
def test_items_that_cannot_be_read_are_named(tmp_path, file, why):
    folder = tmp_path / "out"
    folder.mkdir()
    results = build_evaluation(folder, num_tasks=1)
    task = results.tasks[0].model_copy(update={"items": file})
    one, _ = read_changes([task], results.models, folder)
    assert why in str(one.missing)


def test_a_report_is_rebuilt_from_files_and_is_the_same_each_time(tmp_path):
    build_evaluation(tmp_path)
    first = [path.read_bytes() for path in rebuild(tmp_path)]
    assert [path.read_bytes() for path in rebuild(tmp_path)] == first


def test_results_that_are_not_there_or_not_results(tmp_path):
    with pytest.raises(MissingError, match="holds no evaluation"):
        read_results(tmp_path)
    (tmp_path / "results.json").write_text('{"models": [], "command": "x", "metrics": {"a": {"b": {"valu": 1}}}}')
    with pytest.raises(DataError, match=r"metrics\.a\.b\.value"):
        read_results(tmp_path)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (("breakdowns", 1, "num_tokens"), "num_tokens has 5 values for 6 labels"),
        (("breakdowns", 1, "forward_kl_nats", "distilled"), "distilled has 5 values for 6 labels"),
        (("breakdowns", 1, "labels"), "num_tokens has 6 values for 5 labels"),
        (("worst", "distilled", 2, "kl_nats"), r"kl_nats has \d+ values for \d+ tokens"),
    ],
)
def test_results_whose_lists_are_not_of_one_length_are_refused(tmp_path, keys, said):
    build_evaluation(tmp_path)
    path = tmp_path / "results.json"
    results = node = json.loads(path.read_text())
    for key in keys:
        node = node[key]
    node.pop()
    path.write_text(json.dumps(results))
    with pytest.raises(DataError, match=said):
        rebuild(tmp_path)

"""The leaderboard's normalised scores, against the published formula by hand."""

from pathlib import Path

import pytest

from stillroom.evaluate.results import Number
from stillroom.evaluate.tasks.harness_results import BBH_CHOICES, MUSR_CHOICES, official
from stillroom.recipe import from_yaml

RAW = {
    **{(f"leaderboard_bbh_{name}", "acc_norm"): 1 / number for name, number in BBH_CHOICES.items()},
    ("leaderboard_bbh_boolean_expressions", "acc_norm"): 0.75,
    ("leaderboard_bbh_object_counting", "acc_norm"): 0.01,
    ("leaderboard_musr_murder_mysteries", "acc_norm"): 0.6,
    ("leaderboard_musr_object_placements", "acc_norm"): 0.6,
    ("leaderboard_musr_team_allocation", "acc_norm"): 0.3,
    ("leaderboard_gpqa", "acc_norm"): 0.4,
    ("leaderboard_mmlu_pro", "acc"): 0.37,
    ("leaderboard_math_hard", "exact_match"): 0.12,
    ("leaderboard_ifeval", "prompt_level_strict_acc"): 0.3,
    ("leaderboard_ifeval", "inst_level_strict_acc"): 0.5,
}
WANTED = {
    "leaderboard_bbh": (0.75 - 0.5) / 0.5 / 24,
    "leaderboard_musr": (0.2 + 0.5 + 0) / 3,
    "leaderboard_gpqa": 0.2,
    "leaderboard_mmlu_pro": 0.3,
    "leaderboard_math_hard": 0.12,
    "leaderboard_ifeval": 0.4,
}


def raw(task: str, metric: str) -> Number:
    return Number(value=RAW[task, metric], error=0.02)


@pytest.mark.parametrize("task", WANTED)
def test_official_scores(task: str):
    found = official(task, raw)
    assert found is not None
    assert found.value == pytest.approx(WANTED[task])


def test_the_average_is_of_the_six():
    found = official("leaderboard", raw)
    assert found is not None
    assert found.value == pytest.approx(sum(WANTED.values()) / 6)


def test_errors_are_scaled_and_joined():
    one, three = official("leaderboard_gpqa", raw), official("leaderboard_musr", raw)
    assert one is not None
    assert one.error == pytest.approx(0.02 / 0.75)
    assert three is not None
    assert three.error == pytest.approx(((0.02 / 0.5) ** 2 + (0.02 / 0.8) ** 2 + (0.02 * 3 / 2) ** 2) ** 0.5 / 3)


def test_the_two_accuracies_of_ifeval_are_of_the_same_answers():
    found = official("leaderboard_ifeval", raw)
    assert found is not None
    assert found.error == pytest.approx(0.02)  # as though they went together wholly


def test_other_tasks_have_none_and_a_missing_part_is_not_made_up():
    assert official("hellaswag", raw) is None
    with pytest.raises(KeyError):
        official("leaderboard_musr", lambda *_: {}["nothing"])


def test_chances_are_those_of_lm_evals_tasks():
    lm_eval = pytest.importorskip("lm_eval.tasks", reason="lm-eval is not installed")
    folder = Path(lm_eval.__file__).parent / "leaderboard" / "bbh_mc"
    choices = {}
    for path in folder.glob("[a-z]*.yaml"):
        task = from_yaml(path.read_text())
        choices[task["task"].removeprefix("leaderboard_bbh_")] = len(task["doc_to_choice"])
    assert choices == BBH_CHOICES
    assert len(MUSR_CHOICES) == 3

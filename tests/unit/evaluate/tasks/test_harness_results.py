"""What lm-eval gives becomes results: of tags, of groups measured in several ways, of what is no mean."""

import json
from pathlib import Path
from typing import Any

import pytest

from stillroom.evaluate.results import TaskResult, read_items
from stillroom.evaluate.tasks.harness_results import harness_results

pytest.importorskip("lm_eval", reason="lm-eval is not installed")


def task(
    metrics: dict[str, list[float]], filtered: str = "none", higher: bool = True, scores: dict[str, float] | None = None
) -> dict[str, Any]:
    """A task as lm-eval logs it: what each item counts by each metric. The scores are the means, or ``scores``."""
    number = len(next(iter(metrics.values())))
    logged = [
        {
            "doc_id": i,
            "filter": filtered,
            "arguments": [["Q", " no"], ["Q", " certainly"]],
            "filtered_resps": [[-3.0, False], [-4.0, False]],
            "target": 1,
            **{name: values[i] for name, values in metrics.items()},
        }
        for i in range(number)
    ]
    means = scores or {name: sum(values) / number for name, values in metrics.items()}
    results = {f"{name},{filtered}": value for name, value in means.items()}
    listed = [{"metric": name} for name in metrics]
    return {"samples": logged, "results": results, "higher": dict.fromkeys(metrics, higher), "metrics": listed}


def found(group: dict[str, float] | None = None, **tasks: dict[str, Any]) -> dict[str, Any]:
    """What lm-eval gives for one model."""
    together = {} if group is None else {"all": group}
    return {
        "samples": {name: one["samples"] for name, one in tasks.items()},
        "results": {**{name: one["results"] for name, one in tasks.items()}, **together},
        "configs": {name: {"metric_list": one["metrics"]} for name, one in tasks.items()},
        "higher_is_better": {name: one["higher"] for name, one in tasks.items()},
        "n-shot": dict.fromkeys(tasks, 0),
        "versions": dict.fromkeys(tasks, 1.0),
    }


def results_of(tmp_path: Path, **by_model: dict[str, Any]) -> list[TaskResult]:
    return harness_results("all", "all", by_model, None, tmp_path, 0)


GOOD, BAD = [1.0] * 7 + [0.0], [0.0] * 7 + [1.0]


def test_a_tag_is_the_mean_of_all_its_items(tmp_path: Path):
    a = found(one=task({"acc": GOOD}), two=task({"acc": BAD}))
    b = found(one=task({"acc": BAD}), two=task({"acc": GOOD}))
    (result,) = results_of(tmp_path, a=a, b=b)
    assert (result.name, result.metric, result.num_items) == ("all", "acc", 16)
    assert {name: one["acc"].value for name, one in result.scores.items()} == {"a": 0.5, "b": 0.5}
    assert (result.scores["a"]["acc one"].value, result.scores["b"]["acc one"].value) == (0.875, 0.125)
    assert result.differences[0].value == 0


def test_a_group_has_lm_evals_own_score(tmp_path: Path):
    a = found({"acc,none": 0.7}, one=task({"acc": GOOD}), two=task({"acc": BAD[:4]}))
    (result,) = results_of(tmp_path, a=a, b=a)
    assert result.scores["a"]["acc"].value == 0.7  # weighted otherwise than by items, which so cannot be compared
    assert (result.differences, result.items) == ((), None)


def test_tasks_without_a_metric_in_common_have_a_result_each(tmp_path: Path):
    a = found({"acc,none": 0.5}, one=task({"acc": GOOD, "acc_norm": BAD}), two=task({"exact_match": GOOD}, "strict"))
    one, two = results_of(tmp_path, a=a)
    assert (one.name, one.metric, one.scores["a"]["acc_norm"].value) == ("all.one", "acc_norm", 0.125)
    assert (two.name, two.metric, two.scores["a"]["exact_match"].value) == ("all.two", "exact_match", 0.875)
    assert [len(list(read_items(tmp_path / str(result.items)))) for result in (one, two)] == [8, 8]


def test_a_common_metric_goes_before_a_finer_one_of_some(tmp_path: Path):
    a = found(one=task({"acc": GOOD, "acc_norm": BAD}), two=task({"acc": GOOD}))
    (result,) = results_of(tmp_path, a=a)
    assert (result.metric, result.scores["a"]["acc"].value) == ("acc", 0.875)


def test_tasks_with_other_filters_are_not_dropped(tmp_path: Path):
    a = found(one=task({"exact_match": GOOD}, "none"), two=task({"exact_match": BAD}, "strict"))
    (result,) = results_of(tmp_path, a=a)
    assert (result.num_items, result.scores["a"]["exact_match"].value) == (16, 0.5)
    assert result.scores["a"]["exact_match two"].value == 0.125


def test_the_lower_wins_where_lm_eval_says_so(tmp_path: Path):
    a, b = (found(all=task({"pct_stereotype": values}, higher=False)) for values in (GOOD * 4, BAD * 4))
    (result,) = results_of(tmp_path, a=a, b=b)
    assert not result.higher_is_better
    assert result.differences[0].sentence.startswith("b beats a by 75.0 points")


def test_what_is_no_mean_of_items_is_not_compared_by_items(tmp_path: Path):
    """A perplexity, whose items are log-likelihoods, after an accuracy and alone."""
    metrics, scores = {"perplexity": [-5.0, -6.0], "acc": [1.0, 0.0]}, {"perplexity": 244.7, "acc": 0.5}
    (result,) = results_of(tmp_path, a=found(all=task(metrics, scores=scores)))
    assert (result.metric, result.scores["a"]["perplexity"].value) == ("acc", 244.7)
    del metrics["acc"], scores["acc"]
    both = {name: found(all=task(metrics, scores=scores, higher=False)) for name in "ab"}
    (result,) = results_of(tmp_path, **both)
    assert (result.metric, result.differences, result.items) == ("perplexity", (), None)


def test_a_task_without_a_score_is_named(tmp_path: Path):
    a = found(one=task({"acc": GOOD}), two=task({"bypass": GOOD}))
    a["results"]["two"] = {"alias": "two"}
    one, two = results_of(tmp_path, a=a)
    assert one.scores["a"]["acc"].value == 0.875
    assert (two.name, two.failed) == ("all.two", "lm-eval gives no score of two")


@pytest.mark.parametrize(("metric", "wanted"), [("acc", "no"), ("acc_norm", "certainly")])
def test_the_prediction_is_by_the_metric_that_is_shown(tmp_path: Path, metric: str, wanted: str):
    (result,) = results_of(tmp_path, a=found(all=task({metric: GOOD})))
    item = next(read_items(tmp_path / str(result.items)))
    assert (item.gold, item.models["a"].prediction) == ("certainly", wanted)


def test_what_comes_out_is_json(tmp_path: Path):
    (result,) = results_of(tmp_path, a=found(all=task({"acc": GOOD})))
    assert TaskResult.model_validate(json.loads(result.model_dump_json())) == result

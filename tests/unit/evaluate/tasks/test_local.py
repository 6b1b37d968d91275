"""Local tasks: what models of known likelihood and writing score, and what filters make of an answer."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from conftest import build_model
from stillroom.errors import DataError, MissingError
from stillroom.evaluate.config import Filter, LocalTask, Regex, read_description
from stillroom.evaluate.tasks import local
from stillroom.evaluate.tasks.likelihood import Likelihood
from stillroom.evaluate.tasks.lm import EvalModel, Generation, likelihoods
from stillroom.evaluate.tasks.local import LOG_LIKELIHOOD, LocalBenchmark, ModelReply, apply, questions
from stillroom.recipe import to_yaml

NOBODY = EvalModel("nobody", None, None, None, "")


def said_of(folder: Path, rows: list[dict[str, Any]], **settings: Any) -> tuple[list[ModelReply], float | None]:
    (folder / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "task.yaml").write_text(to_yaml({"name": "task", "items": "items.jsonl", **settings}))
    description = read_description(LocalTask(kind="local", path=str(folder / "task.yaml")))
    asked = LocalBenchmark(description, tuple(questions(description)), ())
    return asked.ask(NOBODY, lambda *_: None), asked.chance


def tell(monkeypatch: pytest.MonkeyPatch, told: dict[str, tuple[float, int]]) -> None:
    """The model finds continuations so likely, and they have so many tokens; those above −1 nat are greedy."""

    def answer(_model: Any, pairs: Any, _name: Any, _done: Any) -> list[Likelihood]:
        return [Likelihood(told[text][0], told[text][0] > -1, told[text][1], 0) for _, text in pairs]

    monkeypatch.setattr(local, "likelihoods", answer)


def test_each_length_chooses_for_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """é has one character and two bytes: by sum "a" wins, by characters "bbb", by bytes "ééé", by tokens "c c"."""
    tell(monkeypatch, {"a": (-4.0, 1), "bbb": (-9.0, 3), "ééé": (-10.2, 2), "c c": (-11.0, 5)})
    rows = [{"q": "?", "c": ["a", "bbb", "ééé", "c c"], "t": gold} for gold in range(4)]
    settings = {"kind": "multiple_choice", "context": "q", "choices": "c", "target": "t", "delimiter": ""}
    found, guess = said_of(tmp_path, rows, **settings)
    right = {name: [one.metrics[name] for one in found].index(1.0) for name in found[0].metrics}
    assert right == {"acc": 0, "acc_norm": 1, "acc_bytes": 2, "acc_tokens": 3}
    assert (found[0].prediction, found[0].scores) == ("a", (-4.0, -9.0, -10.2, -11.0))
    assert guess == 0.25
    found, _ = said_of(tmp_path, rows, **settings, metric="acc_bytes")
    assert found[0].prediction == "ééé"


def test_chance_is_the_mean_over_items(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tell(monkeypatch, {"a": (-1.0, 1), "b": (-2.0, 1), "c": (-3.0, 1), "d": (-3.0, 1)})
    rows = [{"q": "?", "c": ["a", "b"], "t": 0}, {"q": "?", "c": ["a", "b", "c", "d"], "t": 0}]
    _, guess = said_of(tmp_path, rows, kind="multiple_choice", context="q", choices="c", target="t", delimiter="")
    assert guess == pytest.approx((1 / 2 + 1 / 4) / 2)


def test_the_good_one_of_a_pair_should_be_likelier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tell(monkeypatch, {"yes": (-2.0, 1), "no": (-3.0, 1)})
    rows = [{"g": "yes", "b": "no"}, {"g": "no", "b": "yes"}, {"g": "no", "b": "no"}]
    found, guess = said_of(tmp_path, rows, kind="minimal_pairs", good="g", bad="b")
    assert [one.metrics["acc"] for one in found] == [1, 0, 1]  # the same text twice counts as in lm-eval
    assert guess == 0.5


def test_the_last_word_counts_where_it_is_the_likeliest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tell(monkeypatch, {" end": (-0.5, 1), " other": (-3.0, 2)})
    found, guess = said_of(tmp_path, [{"t": "the end"}, {"t": "the other"}], kind="last_word", text="t")
    assert [one.metrics for one in found] == [{"acc": 1, LOG_LIKELIHOOD: -0.5}, {"acc": 0, LOG_LIKELIHOOD: -3.0}]
    assert guess is None


def test_an_answer_is_filtered_and_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked: dict[str, Any] = {}

    def generate(_model: Any, prompts: Any, **settings: Any) -> list[Generation]:
        asked.update(settings)
        return [Generation(text, 0) for text in (" It is 1,234.0 drops", "I do not know")][: len(prompts)]

    monkeypatch.setattr(local, "answers", generate)
    rows = [{"q": "how many?", "a": "so 1234"}, {"q": "how many?", "a": "so 1234"}]
    settings = {"kind": "exact_match", "context": "q", "target": "a", "until": ["\n\n"], "max_tokens": 9}
    filters = {"filters": ["last_number"], "target_filters": ["last_number"]}
    found, guess = said_of(tmp_path, rows, **settings, **filters)
    assert [one.metrics["exact_match"] for one in found] == [1, 0]
    assert (found[0].prediction, found[1].prediction, guess) == ("1234", "", None)
    assert (asked["until"], asked["max_tokens"]) == (("\n\n",), 9)


@pytest.mark.parametrize(
    ("filters", "text", "wanted"),
    [
        (["strip"], " a b\n", "a b"),
        (["strip", "lower"], " Yes ", "yes"),
        (["last_number"], "from 3 to -4.50, or 1,000.", "1000"),
        (["last_number"], "x = -0.5!", "-0.5"),
        (["last_number"], "none", ""),
        (["last_number"], "from 10-12", "12"),
        (["last_number"], "1,2,3", "3"),
        (["last_number"], "1,234,567.50", "1234567.5"),
        (["last_number"], ".5", "0.5"),
        (["last_number"], "(-0)", "0"),
        (["last_number"], "007", "7"),
        ([Regex(kind="regex", pattern=r"answer is \((\w)\)")], "the answer is (A), no, the answer is (B).", "B"),
        ([Regex(kind="regex", pattern=r"\d+")], "1 and 22", "22"),
        ([Regex(kind="regex", pattern=r"\d+")], "none", ""),
    ],
)
def test_filters(filters: list[Filter], text: str, wanted: str):
    assert apply(filters, text) == wanted


def test_a_pattern_that_never_ends_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(local, "LONGEST_MATCH_S", 0.05)
    pattern = Regex(kind="regex", pattern=r"^(a|aa)+$")
    with pytest.raises(DataError, match="takes too long"):
        apply([pattern], "a" * 60 + "b")


def test_a_server_without_a_tokenizer_is_refused():
    with pytest.raises(MissingError, match="cannot say how likely"):
        likelihoods(EvalModel("api", None, None, "http://127.0.0.1:1", "x"), [("a", "b")], str, lambda _: None)


def test_a_uniform_model_has_the_closed_form(tiny_tokenizer: PreTrainedTokenizerFast):
    """With all weights 0 every token has probability 1/304."""
    model = build_model()
    for parameter in model.parameters():
        parameter.data.zero_()
    (found,) = likelihoods(
        EvalModel("flat", model, tiny_tokenizer, None, ""), [("The still", " runs")], str, lambda _: None
    )
    assert found.log_likelihood == pytest.approx(-found.num_tokens * math.log(304), abs=1e-5)

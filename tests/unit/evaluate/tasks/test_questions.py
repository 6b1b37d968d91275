"""Items become questions: templates, choices, targets, examples; and what cannot be asked is named by file and line."""

import json
from pathlib import Path
from typing import Any

import pytest

from stillroom.errors import ConfigError, DataError, MissingError
from stillroom.evaluate.config import LocalTask, read_description
from stillroom.evaluate.tasks.local import Question, questions
from stillroom.recipe import to_yaml


def asked(folder: Path, rows: list[dict[str, Any]], limit: int | None = None, **settings: Any) -> list[Question]:
    (folder / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "task.yaml").write_text(to_yaml({"name": "task", "items": "items.jsonl", **settings}))
    return questions(read_description(LocalTask(kind="local", path=str(folder / "task.yaml"))), limit)


QUIZ = {"kind": "multiple_choice", "context": "Q: {q}\nA:", "choices": "options", "target": "right"}
ROWS = [
    {"q": "one?", "options": ["a", "bb"], "right": 1},
    {"q": "two?", "options": ["x", "y", "z"], "right": "z"},
]


def test_choices_come_from_a_column(tmp_path: Path):
    first, second = asked(tmp_path, ROWS, **QUIZ)
    assert (first.context, first.options, first.labels, first.gold) == ("Q: one?\nA:", (" a", " bb"), ("a", "bb"), 1)
    assert (second.gold, second.id) == (2, "items.jsonl line 2")


def test_choices_may_be_the_same_for_all_or_filled_in(tmp_path: Path):
    rows = [{"q": "one?", "a": "left", "right": "no"}]
    (found,) = asked(tmp_path, rows, **{**QUIZ, "choices": ["yes", "no"], "delimiter": ""})
    assert (found.options, found.gold) == (("yes", "no"), 1)
    (found,) = asked(tmp_path, [{**rows[0], "right": 0}], **{**QUIZ, "choices": ["to the {a}", "no"]})
    assert (found.labels, found.gold) == (("to the left", "no"), 0)


def test_examples_stand_before_each_question(tmp_path: Path):
    settings = {"instruction": "Answer.\n", "shots": 1, "examples": [ROWS[0], ROWS[1]], "separator": "\n--\n"}
    found = asked(tmp_path, [ROWS[1]], **QUIZ, **settings)
    assert found[0].context == "Answer.\nQ: one?\nA: bb\n--\nQ: two?\nA:"
    assert found[0].shown == "Q: two?\nA:"
    (tmp_path / "shots.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    assert asked(tmp_path, [ROWS[1]], **QUIZ, **settings | {"examples": "shots.jsonl"}) == found


def test_too_few_examples_are_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="too few examples") as caught:
        asked(tmp_path, ROWS, **QUIZ, shots=3, examples=[ROWS[0]])
    assert caught.value.values == {"shots": 3, "examples": 1}


def test_pairs_have_the_good_one_first(tmp_path: Path):
    rows = [{"good": "He runs.", "bad": "He run.", "set": "agreement", "number": 7}]
    settings = {"kind": "minimal_pairs", "good": "good", "bad": " {bad}", "group": "set", "id": "number"}
    (found,) = asked(tmp_path, rows, **settings)
    assert (found.context, found.options, found.gold) == ("", ("He runs.", " He run."), 0)
    assert (found.group, found.id) == ("agreement", "7")


def test_the_last_word_follows_the_rest(tmp_path: Path):
    (found,) = asked(tmp_path, [{"t": "He said\nhello  world. "}], kind="last_word", text="t")
    assert (found.context, found.options) == ("He said\nhello", ("  world.",))


def test_several_answers_may_be_right(tmp_path: Path):
    rows = [{"q": "?", "a": ["one", 1]}, {"q": "?", "a": 2.5}]
    first, second = asked(tmp_path, rows, kind="exact_match", context="q", target="a")
    assert (first.answers, second.answers) == (("one", "1"), ("2.5",))


def test_only_the_first_items_are_asked_and_read(tmp_path: Path):
    assert len(asked(tmp_path, [ROWS[0], {"broken": 1}], limit=1, **QUIZ)) == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"q": None}, "items.jsonl line 2: the column `q` does not hold a text"),
        ({"options": ["only"]}, "items.jsonl line 2: there is nothing to choose"),
        ({"options": ["a", 2]}, "items.jsonl line 2: there is nothing to choose"),
        ({"options": ["a", " "]}, "items.jsonl line 2: a choice is empty"),
        ({"options": ["a", "a"]}, "items.jsonl line 2: two choices are the same"),
        ({"right": 3}, "items.jsonl line 2: the target is none of the choices"),
        ({"right": "w"}, "items.jsonl line 2: the target is none of the choices"),
        ({"right": True}, "items.jsonl line 2: the target is none of the choices"),
    ],
)
def test_what_cannot_be_asked_is_named_by_file_and_line(tmp_path: Path, change: dict[str, Any], said: str):
    with pytest.raises(DataError) as caught:
        asked(tmp_path, [ROWS[0], ROWS[1] | change], **QUIZ)
    assert caught.value.what == f"{tmp_path}/{said}"


@pytest.mark.parametrize("column", ["q", "options", "right"])
def test_a_missing_field_is_named_with_file_and_line(tmp_path: Path, column: str):
    row = {key: value for key, value in ROWS[1].items() if key != column}
    with pytest.raises(DataError) as caught:
        asked(tmp_path, [ROWS[0], row], **QUIZ)
    assert caught.value.what == f"{tmp_path}/items.jsonl line 2 has no column `{column}`"


@pytest.mark.parametrize(
    ("row", "settings", "said"),
    [
        ({"t": "word"}, {"kind": "last_word", "text": "t"}, "there is no last word after others"),
        ({"q": "?", "a": []}, {"kind": "exact_match", "context": "q", "target": "a"}, "the target is no answer"),
        ({"g": "", "b": "x"}, {"kind": "minimal_pairs", "good": "g", "bad": "b"}, "a choice is empty"),
    ],
)
def test_each_kind_refuses_what_it_cannot_ask(tmp_path: Path, row: dict[str, Any], settings: dict[str, Any], said: str):
    with pytest.raises(DataError, match=f"items.jsonl line 1: {said}"):
        asked(tmp_path, [row], **settings)


def test_two_items_with_one_id_are_refused(tmp_path: Path):
    rows = [{**row, "n": "same"} for row in ROWS]
    with pytest.raises(DataError, match="line 2: an item `same` came before"):
        asked(tmp_path, rows, **QUIZ, id="n")


def test_no_items_are_missing(tmp_path: Path):
    with pytest.raises(MissingError, match="has no items"):
        asked(tmp_path, [], **QUIZ)
    with pytest.raises(MissingError, match="is not there"):
        asked(tmp_path, ROWS, **QUIZ | {"items": "no.jsonl"})


def test_a_template_that_cannot_be_meant_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="`context of task` is not valid"):
        asked(tmp_path, ROWS, **QUIZ | {"context": "Q: {q"})

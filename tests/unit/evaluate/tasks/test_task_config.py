"""Which task a text or settings mean, and what a description may say."""

from pathlib import Path
from typing import Annotated

import pytest
from pydantic import Field

from stillroom.config import Config, load
from stillroom.errors import ConfigError, MissingError
from stillroom.evaluate.config import (
    LEADERBOARD,
    HarnessTask,
    LocalTask,
    MultipleChoice,
    TaskConfig,
    expand,
    read_description,
)


class Whole(Config):
    tasks: Annotated[tuple[TaskConfig, ...], Field(strict=False)] = ()


def test_a_text_is_a_path_or_a_name():
    found = load(
        Whole, overrides=["tasks=[hellaswag, my.yaml, tasks/x.yml, {kind: lm_eval, task: arc_easy, shots: 5}]"]
    )
    assert found.tasks == (
        HarnessTask(kind="lm_eval", task="hellaswag"),
        LocalTask(kind="local", path="my.yaml"),
        LocalTask(kind="local", path="tasks/x.yml"),
        HarnessTask(kind="lm_eval", task="arc_easy", shots=5),
    )


def test_an_unknown_setting_of_a_task_is_named():
    with pytest.raises(ConfigError, match=r"tasks\.0\.shot`[\s\S]*did you mean: shots"):
        load(Whole, overrides=["tasks=[{kind: lm_eval, task: arc_easy, shot: 5}]"])


def test_the_leaderboard_is_its_six_tasks():
    local = LocalTask(kind="local", path="x.yaml")
    found = expand([HarnessTask(kind="lm_eval", task="leaderboard", limit=3), local])
    assert [getattr(one, "task", None) for one in found] == [*LEADERBOARD, None]
    named = expand([HarnessTask(kind="lm_eval", task="leaderboard", name="short")])
    assert [one.name for one in named][:2] == ["short_ifeval", "short_bbh"]
    assert [one.limit for one in found] == [3] * 6 + [None]


def description(folder: Path, text: str) -> LocalTask:
    (folder / "task.yaml").write_text(text)
    return LocalTask(kind="local", path=str(folder / "task.yaml"))


CHOICE = "kind: multiple_choice\nname: quiz\nitems: quiz.jsonl\ncontext: q\nchoices: c\ntarget: t\n"


def test_paths_are_relative_to_the_description(tmp_path: Path):
    found = read_description(description(tmp_path, CHOICE + "examples: shots.jsonl\nshots: 1\n"))
    assert isinstance(found, MultipleChoice)
    assert (found.items, found.examples) == (str(tmp_path / "quiz.jsonl"), str(tmp_path / "shots.jsonl"))


def test_a_task_changes_items_name_and_shots(tmp_path: Path):
    task = description(tmp_path, CHOICE)
    changed = read_description(task.model_copy(update={"items": "/data/other set.jsonl", "shots": 2}))
    assert isinstance(changed, MultipleChoice)
    assert (changed.items, changed.name, changed.shots) == ("/data/other set.jsonl", "quiz-other-set", 2)
    assert read_description(task.model_copy(update={"name": "mine"})).name == "mine"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name: x\n", "describes no task"),
        ("kind: multiple-choice\nname: x\n", "did you mean: multiple_choice"),
        (CHOICE + "targte: x\n", r"unknown setting `targte`[\s\S]*line 7"),
        (CHOICE.replace("choices: c", "choices: [only]"), r"`choices[\s\S]*nothing to choose"),
        ("kind: minimal_pairs\nname: x\nitems: x.jsonl\ngood: g\n", "bad: is required"),
        (
            "kind: exact_match\nname: x\nitems: y\ncontext: q\ntarget: t\nfilters: [{kind: regex, pattern: '('}]\n",
            "not a regular expression",
        ),
    ],
)
def test_a_description_that_cannot_be_meant_is_refused(tmp_path: Path, text: str, said: str):
    with pytest.raises(ConfigError, match=said):
        read_description(description(tmp_path, text))


def test_a_description_that_is_not_there_is_missing(tmp_path: Path):
    with pytest.raises(MissingError, match="not there"):
        read_description(LocalTask(kind="local", path=str(tmp_path / "no.yaml")))


def test_pairs_take_no_examples(tmp_path: Path):
    task = description(tmp_path, "kind: minimal_pairs\nname: x\nitems: x.jsonl\ngood: g\nbad: b\n")
    with pytest.raises(ConfigError, match="takes no examples"):
        read_description(task.model_copy(update={"shots": 1}))


def test_descriptions_of_the_recipes_can_be_read(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("STILLROOM_DATA", "/data")
    paths = sorted((Path(__file__).parents[4] / "recipes" / "tasks").glob("*.yaml"))
    names = [read_description(LocalTask(kind="local", path=str(path))).name for path in paths]
    assert names == [path.stem.replace("-", "_") for path in paths]
    assert len(names) >= 5

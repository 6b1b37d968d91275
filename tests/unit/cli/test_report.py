"""`stillroom report`."""

import pytest

from evaluations import build_evaluation
from stillroom.evaluate.results import read_items


def test_reports_are_made_anew_from_files(here, tmp_path):
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
        build_evaluation(folder, num_tasks=1)
    printed = here("report", *map(str, folders)).stdout
    paths = [folder / name for folder in folders for name in ("report.md", "report.html")]
    assert printed == "".join(f"report    {path}\n" for path in paths)
    assert all(path.is_file() for path in paths)


@pytest.mark.parametrize("words", [[], ["between=[a,b]"], ["a", "b", "between=[a,b]"], ["a", "--resume"]])
def test_what_cannot_be_meant(here, words):
    assert "`report` takes the folders of evaluations" in here("report", *words, code=2).stderr


def test_a_folder_without_results(here, tmp_path):
    assert "holds no evaluation" in here("report", str(tmp_path), code=2).stderr


def test_items_that_two_models_part_on_are_printed(here, tmp_path):
    build_evaluation(tmp_path, num_tasks=2)
    printed = here("report", str(tmp_path), "between=[baseline,distilled]", "task=bbh_causal_judgement").stdout
    head, *lines = printed.splitlines()
    items = list(read_items(tmp_path / "items" / "task-1.jsonl"))
    right = [(item.id, item.models["baseline"].correct, item.models["distilled"].correct) for item in items]
    gained, lost = ([i for i, a, b in right if (b - a) * sign > 0] for sign in (1, -1))
    assert gained
    assert lost
    assert (
        head == f"bbh_causal_judgement, baseline -> distilled: {len(gained)} gained, {len(lost)} lost of {len(items)}"
    )
    for sign, ids in (("+", gained), ("-", lost)):
        assert [line.split(":")[0][2:] for line in lines if line.startswith(f"{sign} ")] == ids
    assert "\x1b" not in printed
    assert not (tmp_path / "report.md").exists()
    both = here("report", str(tmp_path), "between=[baseline,distilled]").stdout
    assert both.count(" gained, ") == 2


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["between=[a]"], "between"),
        (["between=[baseline,nobody]"], "tells nothing of nobody"),
        (["between=[baseline,distilled]", "task=none"], "has no items to compare"),
        (["between=[baseline,distilled]", "tusk=none"], "did you mean"),
    ],
)
def test_what_cannot_be_compared(here, tmp_path, words, told):
    build_evaluation(tmp_path, num_tasks=1)
    assert told in here("report", str(tmp_path), *words, code=2).stderr

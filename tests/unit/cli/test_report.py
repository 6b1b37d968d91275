"""`stillroom report`."""

import pytest

from evaluations import build_evaluation


def test_reports_are_made_anew_from_files(here, tmp_path):
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
        build_evaluation(folder, num_tasks=1)
    printed = here("report", *map(str, folders)).stdout
    paths = [folder / name for folder in folders for name in ("report.md", "report.html")]
    assert printed == "".join(f"report    {path}\n" for path in paths)
    assert all(path.is_file() for path in paths)


@pytest.mark.parametrize("words", [[], ["a", "b=1"], ["a", "--resume"]])
def test_what_cannot_be_meant(here, words):
    assert "`report` takes the folders of evaluations" in here("report", *words, code=2).stderr


def test_a_folder_without_results(here, tmp_path):
    assert "holds no evaluation" in here("report", str(tmp_path), code=2).stderr

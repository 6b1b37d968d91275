"""The report that the demo ends with: all five models on modules, and on questions, that none of them has seen."""

import sys
from pathlib import Path

from demo_table import RUNS

from stillroom.cli.main import main as stillroom

NAMES = {"hard labels": "baseline", "+ hidden": "hidden"}
"""What runs are called in the report, where it is not their own name."""


def evaluate(folder: Path, settings: list[str]) -> int:
    """Teacher, students and baseline side by side; of a run's settings those of its held-out text are the text's."""
    print("\nhow much of the teacher did the students keep?", file=sys.stderr)
    models = []
    for run, recipe in RUNS.items():
        name = NAMES.get(run, run)
        role = name if name in ("teacher", "baseline") else "distilled"
        models += [f"models.{name}.model={folder / recipe}/model", f"models.{name}.role={role}"]
    text = [f"data.path={folder}/text/valid.jsonl", "data.format=text", "data.length=128"]
    text += [f"data.{word.removeprefix('held_out.')}" for word in settings if word.startswith("held_out.")]
    tasks = f"tasks=[{folder}/questions/next-line.yaml]"
    return stillroom(["evaluate", "--resume", *models, *text, tasks, f"out={folder}/report"])

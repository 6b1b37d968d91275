"""The demo's benchmark: which line of Python comes next, asked about modules that no model was trained on."""

import json
import random
import shutil
from pathlib import Path

DESCRIPTION = """\
# Which of four lines comes next in a module of the standard library? A random model scores 0.25.
kind: multiple_choice
name: next_line
items: next-line.jsonl
context: before
delimiter: "\\n"
choices: lines
target: right
metric: acc_norm
"""
LINES_BEFORE, SHORTEST, CHOICES = 6, 12, 4


def write_questions(text: Path, folder: Path, number: int = 400, seed: int = 0) -> None:
    """next-line.yaml and its items: the lines before, the one that follows, and three from elsewhere in `text`."""
    draw = random.Random(seed)
    modules = [json.loads(line)["text"].splitlines() for line in text.read_text().splitlines()]
    places = [
        (m, i)
        for m, lines in enumerate(modules)
        for i in range(LINES_BEFORE, len(lines))
        if len(lines[i].strip()) >= SHORTEST and lines[i - 1].strip()
    ]
    every_line = sorted({modules[m][i] for m, i in places})
    temporary = folder.with_suffix(".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    with (temporary / "next-line.jsonl").open("w") as file:
        for m, i in draw.sample(places, min(number, len(places))):
            before, right = modules[m][i - LINES_BEFORE : i], modules[m][i]
            others = draw.sample([line for line in every_line if line != right], CHOICES - 1)
            lines = draw.sample([right, *others], CHOICES)
            file.write(json.dumps({"before": "\n".join(before), "lines": lines, "right": lines.index(right)}) + "\n")
    (temporary / "next-line.yaml").write_text(DESCRIPTION)
    temporary.rename(folder)

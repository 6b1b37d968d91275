"""A teacher and four students on this machine's own Python source: on hard labels; from the teacher's logits; from its
hidden states too; and one that starts as a part of the teacher. Then a report of how much of it they kept.

    python examples/demo.py [FOLDER] [key=value …]     the folder is runs/demo; settings go to all runs

Interrupt it whenever you like: the same command goes on where it stopped.
"""

import sys
from pathlib import Path

from demo_questions import write_questions
from demo_report import evaluate
from demo_table import RUNS, table
from demo_text import write_text, write_tokenizer

from stillroom.cli.main import main as stillroom


def demo(folder: Path, settings: list[str]) -> int:
    text, tokenizer = folder / "text", folder / "tokenizer"
    if not text.exists():
        print("collecting the standard library's source", file=sys.stderr)
        write_text(text)
    if not tokenizer.exists():
        print("training a tokenizer", file=sys.stderr)
        write_tokenizer(text / "train.jsonl", tokenizer)
    if not (folder / "questions").exists():
        write_questions(text / "valid.jsonl", folder / "questions")
    recipes = Path(__file__).parent.parent / "recipes"
    for name, recipe in RUNS.items():
        print(f"\n{name}: recipes/{recipe}.yaml", file=sys.stderr)
        paths = [f"data.path={text}/train.jsonl", f"held_out.path={text}/valid.jsonl", f"out={folder / recipe}"]
        model = [
            f"student.tokenizer={tokenizer}" if name == "teacher" else f"teacher.model={folder}/demo-teacher/model"
        ]
        if code := stillroom(["distill", f"{recipes / recipe}.yaml", "--resume", *paths, *model, *settings]):
            return code
    print(f"\n{table(folder)}\n\nThe runs, with their models: {folder}/demo-*\n")
    return evaluate(folder, settings)


if __name__ == "__main__":
    folder, settings = [w for w in sys.argv[1:] if "=" not in w], [w for w in sys.argv[1:] if "=" in w]
    try:
        code = demo(Path(*(folder or ["runs/demo"])), settings)
    except KeyboardInterrupt:
        code = 130
    if code == 130:
        print("The demo goes on where it stopped when you start it again.", file=sys.stderr)
    sys.exit(code)

"""A teacher and two students on this machine's own Python source: one learns from hard labels, one from the teacher.

    python examples/demo.py [FOLDER] [key=value …]     the folder is runs/demo; settings go to all three runs

Interrupt it whenever you like: the same command goes on where it stopped.
"""

import json
import sys
from pathlib import Path

from demo_text import write_text, write_tokenizer

from stillroom.cli.main import main as stillroom

RUNS = {"teacher": "demo-teacher", "hard labels": "demo-hard-labels", "distilled": "demo-distilled"}


def table(folder: Path) -> str:
    """What the runs measured on the held-out modules."""
    lines = [
        f"{'':12} {'cross-entropy':>14} {'KL to teacher':>14} {'top-1 agreement':>16} {'parameters':>11} "
        f"{'tokens/s':>9}",
        f"{'':12} {'nats/token':>14} {'nats/token':>14} {'with teacher':>16} {'':>11} {'training':>9}",
    ]
    for name, recipe in RUNS.items():
        run = json.loads((folder / recipe / "run.json").read_text())
        held_out = run["held_out"]
        kl, agreement = held_out.get("forward_kl_nats"), held_out.get("top1_agreement")
        lines.append(
            f"{name:12} {held_out['cross_entropy_nats']:14.4f} {'-' if kl is None else format(kl, '.4f'):>14} "
            f"{'-' if agreement is None else format(agreement, '.1%'):>16} {run['student']['num_parameters']:11,} "
            f"{run['num_kept'] / run['time_s']:9,.0f}"
        )
    return "\n".join(lines)


def demo(folder: Path, settings: list[str]) -> int:
    text, tokenizer = folder / "text", folder / "tokenizer"
    if not text.exists():
        print("collecting the standard library's source", file=sys.stderr)
        write_text(text)
    if not tokenizer.exists():
        print("training a tokenizer", file=sys.stderr)
        write_tokenizer(text / "train.jsonl", tokenizer)
    recipes = Path(__file__).parent.parent / "recipes"
    for name, recipe in RUNS.items():
        print(f"\n{name}: recipes/{recipe}.yaml", file=sys.stderr)
        paths = [f"data.path={text}/train.jsonl", f"held_out.path={text}/valid.jsonl", f"out={folder / recipe}"]
        model = [
            f"student.tokenizer={tokenizer}" if name == "teacher" else f"teacher.model={folder}/demo-teacher/model"
        ]
        if code := stillroom(["distill", f"{recipes / recipe}.yaml", "--resume", *paths, *model, *settings]):
            return code
    print(f"\n{table(folder)}\n\nThe runs, with their models: {folder}/demo-*")
    return 0


if __name__ == "__main__":
    folder, settings = [w for w in sys.argv[1:] if "=" not in w], [w for w in sys.argv[1:] if "=" in w]
    sys.exit(demo(Path(*(folder or ["runs/demo"])), settings))

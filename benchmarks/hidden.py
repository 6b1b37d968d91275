"""Hidden-state distillation and cut students: which help, and which do not. Real teacher, real text, seeds.

Teacher stories3M (6 layers x 192); students of 3 layers x 128, from random weights or cut from the teacher (layers by
loss increase, widths by use), and of 3 layers x 192, cut in depth alone. Each learns from hard labels, from logits,
from hidden states, and from both; equal tokens in the same order, by seed; measured on held-out stories.

    python benchmarks/hidden.py [--seeds 3] [--steps 300] [--documents 2400] [--out runs/hidden]
"""

import argparse
import json
import statistics
from pathlib import Path

from results import data_folder, machine, save

from stillroom.runs import git_commit

LAYERS = "{kind: best, count: 3, by: loss_increase}"
SMALL = "{hidden_size: 128, num_attention_heads: 4, num_key_value_heads: 2, intermediate_size: 344}"
STARTS = {
    "3 x 128 from scratch": "{kind: config, settings: {hidden_size: 128, num_hidden_layers: 3, intermediate_size: 344, "
    "num_attention_heads: 4, num_key_value_heads: 2}}",
    "3 x 128 cut": f"{{kind: from_teacher, layers: {LAYERS}, width: {SMALL}}}",
    "3 x 192 cut": f"{{kind: from_teacher, layers: {LAYERS}}}",
}
HIDDEN = "{kind: hidden, weight: 1.0}"
OBJECTIVES = {
    "hard labels": "[{kind: cross_entropy}]",
    "logits": "[{kind: forward_kl}]",
    "hidden": f"[{HIDDEN}]",
    "hidden, then hard labels": "[{kind: hidden, weight: {kind: linear, start: 1.0, stop: 0.0}}, "
    "{kind: cross_entropy, weight: {kind: linear, start: 0.0, stop: 1.0}}]",
    "logits + hidden": f"[{{kind: forward_kl}}, {HIDDEN}]",
}
MEASURED = ("cross_entropy_nats", "forward_kl_nats", "top1_agreement")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--documents", type=int, default=2400, help="stories to learn from; a sixth of it held out")
    parser.add_argument("--out", type=Path, default=Path("runs/hidden"))
    parser.add_argument("--start", choices=STARTS, help="only make the runs of this start, to share the work")
    options = parser.parse_args()
    runs = {
        (start, objectives): [train(start, objectives, seed, options) for seed in range(options.seeds)]
        for start in ([options.start] if options.start else STARTS)
        for objectives in OBJECTIVES
    }
    if options.start:
        return
    summary = {
        f"{start}, {objectives}": {name: spread([run["held_out"][name] for run in of_arm]) for name in MEASURED}
        for (start, objectives), of_arm in runs.items()
    }
    first = next(iter(runs.values()))[0]
    save(
        __file__,
        {
            "machine": machine(),
            "tokens_per_run": first["num_kept"],
            "steps": options.steps,
            "teacher_cross_entropy_nats": first["held_out"]["teacher_cross_entropy_nats"],
            "before_training": {
                start: run["held_out_before"] for (start, _), (run, *_) in runs.items() if "held_out_before" in run
            },
            "objectives": OBJECTIVES,
            "summary": summary,
        },
    )
    print(f"teacher: cross-entropy {first['held_out']['teacher_cross_entropy_nats']:.4f} nats")
    for arm, values in summary.items():
        print(f"{arm:46}", ", ".join(f"{n} {v['mean']:.4f} ± {v['sd']:.4f}" for n, v in values.items()))


def train(start: str, objectives: str, seed: int, options: argparse.Namespace) -> dict:
    """One run, or what it wrote where it has run before."""
    from stillroom.cli.main import main as stillroom

    out = options.out / f"{start}-{objectives}-{seed}".replace(" ", "-").replace(",", "")
    data = data_folder()
    recipe = Path(__file__).parents[1] / "recipes" / "tinystories-3m-to-1m.yaml"
    words = [
        "distill", str(recipe), "--resume", f"out={out}", f"seed={seed}", f"steps={options.steps}",
        f"student.init={STARTS[start]}", f"objectives={OBJECTIVES[objectives]}",
        f"teacher.model={data}/models/stories3M", f"data.path={data}/text/tinystories_train.jsonl",
        f"held_out.path={data}/text/tinystories_valid.jsonl", f"data.max_documents={options.documents}",
        f"held_out.max_documents={options.documents // 6}",
    ]  # fmt: skip
    if code := stillroom(words):
        raise SystemExit(code)
    run = json.loads((out / "run.json").read_text())
    if run["git_commit"] != (commit := git_commit()):
        raise SystemExit(f"{out} is of commit {run['git_commit']}, this is {commit}: delete it, or give another --out")
    return run


def spread(values: list[float]) -> dict[str, float]:
    return {"mean": statistics.fmean(values), "sd": statistics.stdev(values) if len(values) > 1 else 0.0}


if __name__ == "__main__":
    main()

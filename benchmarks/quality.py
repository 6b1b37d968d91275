"""Forward-KL distillation, live and from a store, against hard labels at equal steps: real teacher, real text, seeds.

Teacher stories3M (6 layers x 192), student 3 layers x 128 from random weights with the same tokenizer, about a million
tokens of TinyStories; measured on the held-out stories. All arms see the same tokens in the same order, by seed. The
store is captured once, with the default signal; it is measured on a held-out store that has the labels and the top 50,
so its KL is that of the top 50 and the bucket, which is a little lower than the whole.

    python benchmarks/quality.py [--seeds 3] [--steps 1100] [--documents N] [--out runs/quality]
"""

import argparse
import json
import statistics
from pathlib import Path

from results import data_folder, machine, save

from stillroom.runs import git_commit

ARMS = {
    "hard labels": "[{kind: cross_entropy}]",
    "forward KL": "[{kind: forward_kl}]",
    "forward KL from a store": "[{kind: forward_kl}]",
}
MEASURED = ("cross_entropy_nats", "forward_kl_nats", "top1_agreement")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1100)
    parser.add_argument(
        "--documents", type=int, help="train on the first so many stories only; measure on a sixth of that"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/quality"))
    options = parser.parse_args()
    runs = {arm: [train(arm, seed, options) for seed in range(options.seeds)] for arm in ARMS}
    summary = {
        arm: {name: spread([run["held_out"][name] for run in of_arm]) for name in MEASURED}
        for arm, of_arm in runs.items()
    }
    gains = {arm: [gain(*pair) for pair in zip(runs["hard labels"], runs[arm], strict=True)] for arm in [*ARMS][1:]}
    live, stored = (statistics.fmean(values) for values in gains.values())
    first = runs["hard labels"][0]
    save(
        __file__,
        {
            "machine": machine(),
            "tokens_per_run": first["num_kept"],
            "steps": options.steps,
            "teacher_cross_entropy_nats": first["held_out"]["teacher_cross_entropy_nats"],
            "summary": summary,
            "gain_nats": {arm: {**spread(values), "by_seed": values} for arm, values in gains.items()},
            "gain_from_store_of_live": stored / live,
            "store": json.loads((options.out / "captured" / "run.json").read_text())["store"],
            "runs": {arm: [run["held_out"] for run in of_arm] for arm, of_arm in runs.items()},
        },
    )
    print(f"teacher: cross-entropy {first['held_out']['teacher_cross_entropy_nats']:.4f} nats")
    for arm, values in summary.items():
        print(f"{arm:12}", ", ".join(f"{n} {v['mean']:.4f} ± {v['sd']:.4f}" for n, v in values.items()))
    for arm, values in gains.items():
        print(f"gain of {arm}: {spread(values)['mean']:.4f} ± {spread(values)['sd']:.4f} nats of cross-entropy")
    print(f"from a store: {stored / live:.1%} of live")


def gain(hard: dict, distilled: dict) -> float:
    return hard["held_out"]["cross_entropy_nats"] - distilled["held_out"]["cross_entropy_nats"]


def capture(out: Path, text: str, *settings: str) -> Path:
    from stillroom.cli.main import main as stillroom

    data = data_folder()
    words = [f"teacher.model={data}/models/stories3M", f"data.path={data}/text/{text}", "data.format=text",
             "data.length=256", f"out={out}", *settings]  # fmt: skip
    if code := stillroom(["capture", "--resume", *words]):
        raise SystemExit(code)
    return out / "store"


def train(arm: str, seed: int, options: argparse.Namespace) -> dict:
    """One run, or what it wrote where it has run before."""
    from stillroom.cli.main import main as stillroom

    out = options.out / f"{arm.replace(' ', '-')}-{seed}"
    data = data_folder()
    recipe = Path(__file__).parents[1] / "recipes" / "tinystories-3m-to-1m.yaml"
    some, some_held_out = [], []
    if options.documents is not None:
        some, some_held_out = ([f"data.max_documents={n}"] for n in (options.documents, options.documents // 6))
    words = ["distill", str(recipe), "--resume", f"out={out}", f"seed={seed}", f"steps={options.steps}",
             f"objectives={ARMS[arm]}"]  # fmt: skip
    if "store" in arm:
        store = capture(options.out / "captured", "tinystories_train.jsonl", *some)
        held_out = capture(
            options.out / "held-out", "tinystories_valid.jsonl", *some_held_out, "signal={kind: top_k, label: true}"
        )
        words += [f"teacher={{kind: store, path: {store}}}", "data={format: store}", f"held_out.path={held_out}",
                  f"student.init.like={data}/models/stories3M"]  # fmt: skip
    else:
        words += [f"teacher.model={data}/models/stories3M", f"data.path={data}/text/tinystories_train.jsonl",
                  f"held_out.path={data}/text/tinystories_valid.jsonl", *some,
                  *(word.replace("data.", "held_out.") for word in some_held_out)]  # fmt: skip
    code = stillroom(words)
    if code:
        raise SystemExit(code)
    run = json.loads((out / "run.json").read_text())
    if run["git_commit"] != (commit := git_commit()):
        raise SystemExit(f"{out} is of commit {run['git_commit']}, this is {commit}: delete it, or give another --out")
    return run


def spread(values: list[float]) -> dict[str, float]:
    return {"mean": statistics.fmean(values), "sd": statistics.stdev(values) if len(values) > 1 else 0.0}


if __name__ == "__main__":
    main()

"""Whether a change made anything slower: runs of two checkouts in turn, as ratios of pairs.

python benchmarks/pairs.py --before CHECKOUT [--pairs 10] [--only NAME …]

Each pair is the code before and this code, one right after the other, and the order changes from pair to pair, so that
a machine that others use too slows both. What is told is the median of the pairs' ratios, this code's speed over that
of before (so above 1 is better), with a 95 % interval by a bootstrap over pairs; of memory this code's peak over
that of before. The data lie in $STILLROOM_DATA. It takes about 25 minutes on two cores.
"""

import argparse
import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from results import data_folder, machine, save

HERE = Path(__file__).parents[1]
STUDENT = "student.init={kind: config, like: $STILLROOM_DATA/models/stories3M, settings: {hidden_size: 128, " \
    "num_hidden_layers: 3, intermediate_size: 344, num_attention_heads: 4, num_key_value_heads: 2}}"  # fmt: skip
TRAINING = ["batch.tokens=1024", "optimizer.learning_rate=2e-3", "objectives=[{kind: forward_kl}]", STUDENT]
TEXT = ["data={path: $STILLROOM_DATA/text/tinystories_train.jsonl, format: text, length: 256, max_documents: 250}"]
TEACHER = ["teacher={kind: model, model: $STILLROOM_DATA/models/stories3M}"]
COMMANDS = {
    "capture": ["capture", "teacher.model=$STILLROOM_DATA/models/stories3M", *TEXT],
    "distill, live": ["distill", *TRAINING, *TEACHER, *TEXT, "steps=35"],
    "distill, stored": ["distill", *TRAINING, "teacher={kind: store, path: STORE}", "data.format=store", "steps=40"],
    "start": ["distill", *TRAINING, *TEACHER, *TEXT, "steps=60", "--dry-run"],
}
LOSSES = """
import json, sys, time, torch, loss_jobs
torch.set_num_threads(1)
p, found = loss_jobs.problem(512, 32_000), {}
for name, job in loss_jobs.all_jobs(peers=False)[0].items():
    if "compiled" in name or name == "four":
        continue
    work = job(p)
    def step():
        for x in p.trained:
            x.grad = None
        value = work()
        if value.requires_grad:
            value.backward()
    step()
    start = time.process_time()
    step()
    found[name] = time.process_time() - start
print(json.dumps(found))
"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--before", type=Path, required=True, help="the root of a checkout of the code before")
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--only", nargs="+", default=[*COMMANDS, "losses"])
    options = parser.parse_args()
    os.environ.update(STILLROOM_DATA=str(data_folder()), HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    checkouts = {"before": options.before.resolve(), "now": HERE}
    result: dict[str, Any] = {"machine": machine(), "load": os.getloadavg()[0], "pairs": options.pairs, "jobs": {}}
    with tempfile.TemporaryDirectory() as folder:
        for which, checkout in checkouts.items():  # compiled once, and a store for those that learn from one
            run(checkout, COMMANDS["capture"], Path(folder, f"store-{which}"))
        for name in options.only:
            pairs: list[dict[str, dict[str, float]]] = []
            for number in range(options.pairs + 1):
                pair = {}
                for which in ("before", "now") if number % 2 else ("now", "before"):
                    place = Path(folder, which)
                    shutil.rmtree(place, ignore_errors=True)
                    pair[which] = (
                        losses(checkouts[which])
                        if name == "losses"
                        else run(checkouts[which], COMMANDS[name], place, Path(folder, f"store-{which}", "store"))
                    )
                pairs.append(pair)
            result["jobs"][name] = compared(pairs[1:])  # the first pair fills caches
            for measure, values in result["jobs"][name].items():
                low, high = values["interval"]
                print(f"{name:16} {measure:28} {values['ratio']:.3f}  [{low:.3f}, {high:.3f}]", flush=True)
    save(__file__, result)


def run(checkout: Path, words: list[str], out: Path, store: Path | None = None) -> dict[str, float]:
    """The speeds of a command and its peak memory, from its run.json and the system's account of the process."""
    words = [word.replace("STORE", str(store)) for word in words]
    command = [sys.executable, "-m", "stillroom", *words, f"out={out}", "device=cpu", "--quiet"]
    if words[0] == "capture":
        command.remove("device=cpu")
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(checkout / "src")}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    after, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - start
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    if "--dry-run" in words:
        return {"speed, CPU time": 1 / cpu, "speed, wall time": 1 / wall}
    record = json.loads((out / "run.json").read_text())
    return {
        "whole command, CPU time": 1 / cpu,
        "speed, wall time": 1 / record["time_s"],
        "peak memory": record["peak_memory_bytes"],
    }


def losses(checkout: Path) -> dict[str, float]:
    """The speeds of all losses with their backward passes, by CPU time, in a process of its own."""
    path = os.pathsep.join([str(checkout / "src"), str(checkout / "benchmarks")])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LOSSES], env={**os.environ, "PYTHONPATH": path},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return {name: 1 / value for name, value in json.loads(done.stdout.splitlines()[-1]).items()}


def compared(pairs: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, Any]]:
    """The median of the ratios of pairs by measure, with a 95 % interval by a bootstrap over pairs."""
    found, draw = {}, random.Random(0)
    for measure in pairs[0]["now"].keys() & pairs[0]["before"].keys():
        ratios = [pair["now"][measure] / pair["before"][measure] for pair in pairs]
        medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(2000))
        found[measure] = {
            "ratio": round(statistics.median(ratios), 4),
            "interval": [round(medians[50], 4), round(medians[-51], 4)],
            "before": round(statistics.median(pair["before"][measure] for pair in pairs), 6),
            "now": round(statistics.median(pair["now"][measure] for pair in pairs), 6),
        }
    return dict(sorted(found.items()))


if __name__ == "__main__":
    main()

"""What hidden-state objectives cost beside logits alone: time and memory of a training step, side by side.

Three mapped layers, a projector each. Two shapes: the one of throughput.py (teacher 512 wide with 8 layers, student 256
with 4, vocabulary 128,000, 2,048 tokens), and one where little else is to be done: the same with a vocabulary of 4,096.
Each side runs in processes of its own, in turn. Extra memory is the peak resident size during steps, less the resident
size between steps.

    python benchmarks/hidden_cost.py [--rounds 3] [--steps 3]
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable

import throughput
from results import machine, save

from stillroom.losses.config import DISTANCES

SIDES = ("logits", *DISTANCES)
VOCABULARIES = (128_000, 4_096)
PAIRS = ((0, 1), (2, 4), (3, 7))


def step_of(side: str) -> Callable[[], float]:
    import torch

    from stillroom.batch import Batch
    from stillroom.config import LOGITS_BYTES
    from stillroom.losses.divergences import forward_kl
    from stillroom.losses.objective import Objective
    from stillroom.teachers.live import LiveTeacher
    from stillroom.training.hidden_objective import HiddenLoss, HiddenSpec, layers_of
    from stillroom.training.step import StudentStep

    specs = []
    if side != "logits":
        free = side in ("linear_cka", "attention_relation")
        arguments = {"heads": 4} if side == "attention_relation" else {}
        specs = [HiddenSpec("hidden", side, PAIRS, (256, 512), arguments, start=None if free else "orthogonal")]
    teacher = LiveTeacher(throughput.build("teacher"), *layers_of(specs, 1))
    module = StudentStep(
        throughput.build("student"), (Objective("forward_kl", forward_kl),), vocab_size=None,
        logits_bytes=LOGITS_BYTES, hidden=[HiddenLoss(spec) for spec in specs],
    ).train()  # fmt: skip
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True)
    ids = throughput.tokens()
    positions = torch.arange(throughput.LENGTH).expand(throughput.ROWS, -1)
    batch = Batch(ids[:, :-1], ids[:, 1:], torch.ones_like(positions, dtype=torch.bool), positions, positions * 0)

    def step() -> float:
        result = module(batch, teacher.forward(batch), batch.num_kept)
        result.loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return result.loss.item()

    return step


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--worker", nargs=2)
    options = parser.parse_args()
    if options.worker:
        side, vocabulary = options.worker
        throughput.VOCABULARY = int(vocabulary)
        throughput.SIDES[side] = lambda: step_of(side)
        print(json.dumps(throughput.work(side, options.steps)))
        return
    result = {}
    for vocabulary in VOCABULARIES:
        runs: dict[str, list[dict]] = {side: [] for side in SIDES}
        for _ in range(options.rounds):
            for side in SIDES:
                command = [sys.executable, __file__, "--worker", side, str(vocabulary), "--steps", str(options.steps)]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                runs[side].append(json.loads(done.stdout))
        result[str(vocabulary)] = ratios(runs)
        for side, values in result[str(vocabulary)].items():
            print(f"{vocabulary:7} {side:20}", ", ".join(f"{name} {value:.3f}" for name, value in values.items()))
    save(__file__, {"machine": machine(), "pairs": PAIRS, "bars": {"each": "<= 1.15 of logits alone"}, "of": result})


def ratios(runs: dict[str, list[dict]]) -> dict[str, dict[str, float]]:
    """Of each side to logits alone: medians of the rounds' ratios."""
    found = {}
    for side in SIDES[1:]:
        pairs = list(zip(runs[side], runs["logits"], strict=True))
        found[side] = {
            name: statistics.median(value(ours) / value(plain) for ours, plain in pairs)
            for name, value in (
                ("wall", lambda run: statistics.median(run["wall_s"])),
                ("cpu", lambda run: statistics.median(run["cpu_s"])),
                ("extra_memory", lambda run: run["extra_bytes"]),
            )
        }
    plain = runs["logits"]
    found["logits alone"] = {
        "wall_s": statistics.median(t for run in plain for t in run["wall_s"]),
        "extra_MiB": statistics.median(run["extra_bytes"] for run in plain) / 2**20,
    }
    return found


if __name__ == "__main__":
    main()

"""Training throughput and memory against a plain Hugging Face loop on full logits, side by side.

Same models, losses, optimizer and tokens: teacher 512 wide with 8 layers, student 256 wide with 4, vocabulary 128,000,
4 rows of 512 tokens, float32, 0.9 forward KL + 0.1 cross-entropy. Each side runs in processes of its own, in turn.
Extra memory is the peak resident size during steps, less the resident size between steps (models, optimizer state).

    python benchmarks/throughput.py [--rounds 3] [--steps 3]
"""

import argparse
import ctypes
import gc
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from results import machine, save

VOCABULARY, ROWS, LENGTH = 128_000, 4, 512
SHAPES = {"teacher": (512, 8), "student": (256, 4)}


def build(who: str):
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    hidden, layers = SHAPES[who]
    torch.manual_seed(hidden)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, num_hidden_layers=layers, intermediate_size=hidden * 8 // 3,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64, max_position_embeddings=LENGTH,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def tokens():
    import torch

    return torch.randint(VOCABULARY, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(0))


def plain_step() -> Callable[[], float]:
    """What a training script does: both models' full logits, `torch.nn.functional` losses, autograd."""
    import torch
    from torch.nn import functional

    student, teacher = build("student").train(), build("teacher").eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4, fused=True)
    ids = tokens()

    def step() -> float:
        with torch.no_grad():
            teacher_logits = teacher(input_ids=ids[:, :-1], use_cache=False).logits.flatten(0, 1)
        logits = student(input_ids=ids[:, :-1], use_cache=False).logits.flatten(0, 1)
        kl = functional.kl_div(
            functional.log_softmax(logits, -1), functional.log_softmax(teacher_logits, -1),
            log_target=True, reduction="batchmean",
        )  # fmt: skip
        loss = 0.9 * kl + 0.1 * functional.cross_entropy(logits, ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def stillroom_step() -> Callable[[], float]:
    import torch

    from stillroom.batch import Batch
    from stillroom.config import LOGITS_BYTES
    from stillroom.losses.divergences import forward_kl
    from stillroom.losses.logits import cross_entropy
    from stillroom.losses.objective import Objective
    from stillroom.teachers.live import LiveTeacher
    from stillroom.training.step import StudentStep

    teacher = LiveTeacher(build("teacher"))
    objectives = (Objective("forward_kl", forward_kl, 0.9), Objective("cross_entropy", cross_entropy, 0.1))
    module = StudentStep(build("student"), objectives, vocab_size=None, logits_bytes=LOGITS_BYTES).train()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True)
    ids = tokens()
    positions = torch.arange(LENGTH).expand(ROWS, -1)
    batch = Batch(ids[:, :-1], ids[:, 1:], torch.ones_like(positions, dtype=torch.bool), positions, positions * 0)

    def step() -> float:
        result = module(batch, teacher.forward(batch), batch.num_kept)
        result.loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return result.loss.item()

    return step


SIDES = {"plain": plain_step, "stillroom": stillroom_step}


def resident_bytes(field: str) -> int:
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def work(side: str, steps: int) -> dict:
    """Runs in a process of its own: one step to warm up, then ``steps`` measured ones."""
    step = SIDES[side]()
    losses = [step()]
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = resident_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # starts the peak anew
    wall, cpu = [], []
    for _ in range(steps):
        start_wall, start_cpu = time.perf_counter(), time.process_time()
        losses.append(step())
        wall.append(time.perf_counter() - start_wall)
        cpu.append(time.process_time() - start_cpu)
    return {"losses": losses, "wall_s": wall, "cpu_s": cpu, "extra_bytes": resident_bytes("VmHWM") - before}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--worker", choices=SIDES)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(work(options.worker, options.steps)))
        return
    runs: dict[str, list[dict]] = {side: [] for side in SIDES}
    for _ in range(options.rounds):
        for side in SIDES:
            command = [sys.executable, __file__, "--worker", side, "--steps", str(options.steps)]
            runs[side].append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    summary = {
        side: {
            "tokens_per_s": ROWS * LENGTH / statistics.median(t for run in of_side for t in run["wall_s"]),
            "cpu_s_per_step": statistics.median(t for run in of_side for t in run["cpu_s"]),
            "extra_bytes": statistics.median(run["extra_bytes"] for run in of_side),
            "losses": of_side[0]["losses"],
        }
        for side, of_side in runs.items()
    }
    plain, ours = summary["plain"], summary["stillroom"]
    ratios = {
        "tokens_per_s": ours["tokens_per_s"] / plain["tokens_per_s"],
        "cpu_s_per_step": ours["cpu_s_per_step"] / plain["cpu_s_per_step"],
        "extra_bytes": ours["extra_bytes"] / plain["extra_bytes"],
    }
    bars = {"tokens_per_s": ">= 1.3", "extra_bytes": "<= 0.5"}
    save(__file__, {"machine": machine(), "summary": summary, "ratios": ratios, "bars": bars, "runs": runs})
    for name, value in ratios.items():
        print(f"{name:16} stillroom / plain = {value:.3f}   {bars.get(name, '')}")


if __name__ == "__main__":
    main()

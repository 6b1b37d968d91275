"""Training throughput and memory against a plain Hugging Face loop on full logits and TRL's trainers, side by side.

Same models, optimizer and tokens: teacher 512 wide with 8 layers, student 256 wide with 4, vocabulary 128,000, 4 rows
of 512 tokens, float32, 0.9 forward KL + 0.1 cross-entropy; TRL's trainers have the forward KL alone, and their own
training step, given these tokens in the place of text that a model writes. Each side runs in processes of its own, in
turn. Extra memory is the peak resident size during steps, less the resident size between steps (models, optimizer
state). `make .venv/.bench` installs TRL.

    python benchmarks/throughput.py [--rounds 3] [--steps 3] [--sides plain stillroom …]
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
from importlib.util import find_spec
from pathlib import Path
from typing import Any

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


def gkd_step() -> Callable[[], float]:
    """TRL's GKD, of the data alone: no text is drawn from the student."""
    import torch
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    ids = tokens()
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    return trainer_step(GKDTrainer, GKDConfig, inputs, lmbda=0.0)


def distillation_step() -> Callable[[], float]:
    """TRL's DistillationTrainer: the first token of each row is the prompt, and the others are its answer."""
    import torch
    from trl.trainer.distillation_config import DistillationConfig
    from trl.trainer.distillation_trainer import DistillationTrainer

    ids = tokens()
    parts = {"prompt": ids[:, :1], "completion": ids[:, 1:]}
    inputs = {f"{name}_ids": part for name, part in parts.items()}
    inputs |= {f"{name}_mask": torch.ones_like(part) for name, part in parts.items()}
    return trainer_step(DistillationTrainer, DistillationConfig, inputs)


def trainer_step(trainer_class: Any, config_class: Any, inputs: dict[str, Any], **settings: Any) -> Callable[[], float]:
    import tempfile

    import torch
    from datasets import Dataset
    from same_results import make_tokenizer

    student, teacher = build("student"), build("teacher").eval().requires_grad_(False)
    tokenizer = make_tokenizer(())
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    config = config_class(
        tempfile.mkdtemp(), use_cpu=True, bf16=False, activation_checkpointing=False, beta=0.0, temperature=1.0,
        per_device_train_batch_size=ROWS, report_to="none", **settings,
    )  # fmt: skip
    rows = Dataset.from_dict({"prompt": ["a"] * ROWS})
    trainer = trainer_class(student, teacher, config, train_dataset=rows, processing_class=tokenizer)
    trainer._prepare_inputs = lambda given: given  # in the place of what it would write
    trainer.current_gradient_accumulation_steps = 1
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4, fused=True)
    student.train()

    def step() -> float:
        loss = trainer.training_step(student, dict(inputs), torch.tensor(ROWS * LENGTH))
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


SIDES = {"plain": plain_step, "stillroom": stillroom_step, "trl GKD": gkd_step, "trl distillation": distillation_step}


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
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES), help="run only these, and stillroom")
    parser.add_argument("--worker", choices=SIDES)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(work(options.worker, options.steps)))
        return
    sides = [side for side in SIDES if side in {*options.sides, "stillroom"}]
    if any(side.startswith("trl") for side in sides) and find_spec("trl") is None:
        raise SystemExit("trl is not installed: run `make .venv/.bench`, or name --sides plain stillroom")
    runs: dict[str, list[dict]] = {side: [] for side in sides}
    for _ in range(options.rounds):
        for side in sides:
            command = [sys.executable, __file__, "--worker", side, "--steps", str(options.steps)]
            said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            runs[side].append(json.loads(said.splitlines()[-1]))
    summary = {
        side: {
            "tokens_per_s": ROWS * LENGTH / statistics.median(t for run in of_side for t in run["wall_s"]),
            "cpu_s_per_step": statistics.median(t for run in of_side for t in run["cpu_s"]),
            "extra_bytes": statistics.median(run["extra_bytes"] for run in of_side),
            "losses": of_side[0]["losses"],
        }
        for side, of_side in runs.items()
    }
    ours = summary["stillroom"]
    measures = ("tokens_per_s", "cpu_s_per_step", "extra_bytes")
    ratios = {
        side: {name: ours[name] / theirs[name] for name in measures}
        for side, theirs in summary.items()
        if side != "stillroom"
    }
    bars = {"tokens_per_s": ">= 1.3", "extra_bytes": "<= 0.5"}
    save(__file__, {"machine": machine(), "summary": summary, "ratios": ratios, "bars": bars, "runs": runs})
    print(f"{'stillroom: tokens a second':32}{ours['tokens_per_s']:8.0f}")
    for side, of_side in ratios.items():
        print(f"{f'stillroom / {side}':32}" + "  ".join(f"{name} {value:.3f}" for name, value in of_side.items()))


if __name__ == "__main__":
    main()

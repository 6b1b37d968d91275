"""Peak memory of six real runs on a CPU, beside what `stillroom plan` predicts of them.

Each run is made twice: with the C library's allocator as it is, which keeps some of what is freed, and for which the
plan adds an assumed share; and told to give back all that it can, where there is no such share. The first has the bar.

Each run is `stillroom distill` in a process of its own, with random weights at sizes where the models dominate. Before
it, the same process makes a run of a tiny student, so that imports, compiled kernels and threads are there already; the
resident size then is what is subtracted from the peak. The peak is that of the second step and all after it.

    python benchmarks/memory.py [--only NAME]
"""

import argparse
import ctypes
import gc
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from results import data_folder, machine, save

BAR = 0.15
STEPS = 3
STUDENT = {
    "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8,
    "num_key_value_heads": 4,
}  # fmt: skip
TEACHER = {
    "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 12,
    "num_key_value_heads": 12,
}  # fmt: skip
TINY = {name: 8 if "size" in name else 1 for name in STUDENT}
MICRO_TOKENS, LENGTH = 2048, 512
HEAPS = {"as it is": {}, "giving back": {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "1048576"}}
RUNS: dict[str, list[str]] = {
    "live": [],
    "stored": ["teacher={kind: store, path: $FOLDER/captured/store}", "data={format: store}"],
    "hidden": ["objectives=[{kind: forward_kl}, {kind: hidden}]"],
    "lora": ["student.lora={rank: 16}"],
    "no checkpointing": ["teacher=null", "objectives=[{kind: cross_entropy}]", f"batch.tokens={3 * MICRO_TOKENS}"],
    "checkpointing": [
        "teacher=null", "objectives=[{kind: cross_entropy}]", f"batch.tokens={3 * MICRO_TOKENS}",
        "student.gradient_checkpointing=true",
    ],
}  # fmt: skip


def prepare(folder: Path) -> None:
    """Writes the teacher, and a store of what it says."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from stillroom.capture.config import CaptureConfig
    from stillroom.capture.run import run
    from stillroom.config import load

    tokenizer = AutoTokenizer.from_pretrained(data_folder() / "tokenizers" / "llama2")
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=LENGTH, **TEACHER)
    LlamaForCausalLM(config).save_pretrained(folder / "teacher")
    tokenizer.save_pretrained(folder / "teacher")
    settings = [f"teacher.model={folder}/teacher", *data(), "data.max_documents=40", f"out={folder}/captured"]
    run(load(CaptureConfig, None, settings))


def data() -> list[str]:
    path = data_folder() / "text" / "tinystories_valid.jsonl"
    return ["data.format=text", f"data.path={path}", f"data.length={LENGTH}"]


def settings(name: str, folder: Path, sizes: dict[str, int]) -> list[str]:
    student = {"kind": "config", "like": f"{folder}/teacher", "settings": sizes}
    found = [
        f"student.init={json.dumps(student)}", f"student.tokenizer={folder}/teacher",
        f"teacher={{kind: model, model: {folder}/teacher}}", *data(), "objectives=[{kind: forward_kl}]",
        f"steps={STEPS}", f"batch={{tokens: {MICRO_TOKENS}, micro_tokens: {MICRO_TOKENS}}}",
        "optimizer.learning_rate=1e-4", f"data.cache={folder}/cache", "device=cpu",
        f"out={folder}/{name.replace(' ', '-')}-{sizes['hidden_size']}",
    ]  # fmt: skip
    own = [word.replace("$FOLDER", str(folder)) for word in RUNS[name]]
    replaced = {word.partition("=")[0] for word in own}
    kept = [w for w in found if not any(w.partition("=")[0] == r or w.startswith(f"{r}.") for r in replaced)]
    return [*kept, *own]


def resident_bytes(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def work(name: str, folder: Path) -> dict[str, Any]:
    """Measures and predicts one run, in a process of its own."""
    from stillroom.config import load
    from stillroom.distill.config import DistillConfig
    from stillroom.distill.estimate import load_of, read_headers
    from stillroom.distill.run import run
    from stillroom.estimates.hardware import Hardware
    from stillroom.estimates.memory import memory

    run(load(DistillConfig, None, [*settings(name, folder, TINY), "steps=1"]))
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = resident_bytes("VmRSS")
    peaks = []

    def report(event: str, values: Any) -> None:
        if event == "step" and values["step"] == 1:
            Path("/proc/self/clear_refs").write_text("5")  # starts the peak anew
        elif event == "step":
            peaks.append(resident_bytes("VmHWM") - before)

    config = load(DistillConfig, None, settings(name, folder, STUDENT))
    run(config, report=report)
    told = memory(load_of(config, read_headers(config), Hardware(device="CPU")))
    returning = "MALLOC_MMAP_THRESHOLD_" in os.environ
    total = told.total - (told.stays["freed and kept"] if returning else 0)
    return {
        "measured_bytes": peaks[-1],
        "predicted_bytes": total,
        "ratio": total / peaks[-1],
        "moment": told.moment,
        "predicted": {part: round(value / 2**20, 1) for part, value in {**told.stays, **told.comes}.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", choices=RUNS)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--worker")
    options = parser.parse_args()
    if options.worker:
        prepare(options.folder) if options.worker == "prepare" else print(
            json.dumps(work(options.worker, options.folder))
        )
        return
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        worker(folder, "prepare", {})
        for name in [options.only] if options.only else RUNS:
            found[name] = {how: json.loads(worker(folder, name, variables)) for how, variables in HEAPS.items()}
            shown = []
            for how, run in found[name].items():
                measured, predicted = run["measured_bytes"] / 2**20, run["predicted_bytes"] / 2**20
                shown.append(f"{how}: {measured:.0f} MiB, predicted {predicted:.0f}, ratio {run['ratio']:.3f}")
            print(f"{name:18}{'; '.join(shown)}", flush=True)
    if options.only is None:
        worst = {how: max(abs(run[how]["ratio"] - 1) for run in found.values()) for how in HEAPS}
        save(__file__, {"machine": machine(), "runs": found, "worst": worst, "bar": BAR})


def worker(folder: Path, name: str, variables: dict[str, str]) -> str:
    """What a process of its own prints."""
    command = [sys.executable, __file__, "--worker", name, "--folder", str(folder)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, **variables})
    shutil.rmtree(folder / f"{name.replace(' ', '-')}-{TINY['hidden_size']}", ignore_errors=True)
    shutil.rmtree(folder / f"{name.replace(' ', '-')}-{STUDENT['hidden_size']}", ignore_errors=True)
    return done.stdout


if __name__ == "__main__":
    main()

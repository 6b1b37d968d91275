"""What only a CUDA device can tell, in one command of at most 20 minutes: each part in a process of its own.

    kernels   the fused Triton kernels, through `linear_losses`, against each loss's formula in float64
    bfloat16  the error of each loss of bfloat16 hidden states, against float32 and against float64 of the same numbers
    memory    the peak memory of live distillation steps, beside what `stillroom plan` predicts
    speed     tokens a second of the fused head and divergence at 151,936 entries, beside liger-kernel's and TRL's
    cli       a live run, a capture and a run from its store, by the command line's own entry point

A part without its device or package is skipped with a message. A part that fails, misses its bar of exactness or runs
past its limit is recorded with its error, the others still run, and the command ends with 1. No time has a bar.

    python benchmarks/gpu.py [--only PART] [--device cpu --small]

With --small the sizes are tiny and nothing is saved; on a CPU the Triton kernels are run by Triton's interpreter.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
from gpu_exactness import VOCABULARY, bfloat16, kernels
from loss_jobs import PEER_TASKS, all_jobs, problem
from losses import clear, note_failure, on_device, on_processor, step, versions
from memory import BAR
from results import machine, save
from throughput import resident_bytes


def made_run(
    folder: Path, device: str, vocabulary: int, length: int, tokens: int, *, teacher: dict[str, int]
) -> tuple[list[str], list[str]]:
    """Writes a teacher of random weights, its tokenizer of bytes and a text; returns settings of data and of training
    that lack only the student, steps and ``out``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    words += [f"<{i}>" for i in range(vocabulary - len(words))]  # entries that no text meets
    backend = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(folder / "teacher")
    torch.manual_seed(0)
    shape = {"vocab_size": vocabulary, "max_position_embeddings": length, "bos_token_id": 0, "eos_token_id": 1}
    LlamaForCausalLM(LlamaConfig(**shape, **teacher)).save_pretrained(folder / "teacher")
    drops = " ".join(f"Drop {i} falls, and {i * i % 97} follow it." for i in range(10 * length))
    texts = [drops[start : start + 4 * length] for start in range(0, 200 * length, 4 * length)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    data = [f"data={{path: {folder}/text.jsonl, format: text, length: {length}, cache: {folder}/cache}}"]
    return data, [
        f"student.tokenizer={folder}/teacher", "objectives=[{kind: forward_kl}]", f"device={device}",
        f"batch={{tokens: {tokens}, micro_tokens: {tokens}}}", "optimizer.learning_rate=1e-3",
    ]  # fmt: skip


def student(folder: Path, sizes: dict[str, int]) -> str:
    return f"student.init={json.dumps({'kind': 'config', 'like': f'{folder}/teacher', 'settings': sizes})}"


def sizes(hidden: int, layers: int) -> dict[str, int]:
    heads = max(1, hidden // 64)
    return {"hidden_size": hidden, "intermediate_size": hidden * 11 // 4, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": heads}  # fmt: skip


def memory(device: str, small: bool) -> dict[str, Any]:
    from stillroom.config import load
    from stillroom.distill.config import DistillConfig
    from stillroom.distill.estimate import load_of, read_headers
    from stillroom.distill.run import run
    from stillroom.estimates import memory as estimate
    from stillroom.estimates.hardware import Hardware

    on_gpu, measured = device == "cuda", {}

    def report(event: str, told: Any) -> None:
        if event == "step" and told["step"] == 1:  # the peak starts anew
            torch.cuda.reset_peak_memory_stats() if on_gpu else Path("/proc/self/clear_refs").write_text("5")
        elif event == "step" and on_gpu:
            free, total = torch.cuda.mem_get_info()
            measured["peak"] = torch.cuda.max_memory_allocated()
            measured.update(reserved=torch.cuda.max_memory_reserved(), used_on_device=total - free)
        elif event == "step":
            measured["peak"] = resident_bytes("VmHWM")

    with tempfile.TemporaryDirectory() as temporary:
        folder, shape = Path(temporary), (500, 64, 128) if small else (32_000, 1024, 8192)
        data, words = made_run(folder, device, *shape, teacher=sizes(128, 2) if small else sizes(2048, 12))
        words += [*data, f"teacher={{kind: model, model: {folder}/teacher}}"]
        warm = [student(folder, sizes(8, 1)), "steps=1", f"out={folder}/warm"]  # imports, kernels, workspaces
        run(load(DistillConfig, None, [*words, *warm]))
        before = torch.cuda.memory_allocated() if on_gpu else resident_bytes("VmRSS")
        real = [student(folder, sizes(64, 2) if small else sizes(1024, 12)), "steps=4", f"out={folder}/run"]
        config = load(DistillConfig, None, [*words, *real])
        run(config, report=report)
        hardware = Hardware.called(torch.cuda.get_device_name()) if on_gpu else Hardware(device="CPU")
        plan = estimate.memory(load_of(config, read_headers(config), hardware or Hardware()))
    predicted = plan.total - plan.stays.get("driver and workspaces", 0)  # torch does not count the driver's
    peak = measured["peak"] - before
    print(f"  {peak / 2**20:.0f} MiB, predicted {predicted / 2**20:.0f}, ratio {predicted / peak:.3f}")
    return {"measured_bytes": peak, "predicted_bytes": predicted, "ratio": predicted / peak, "bar": BAR,
            "met": abs(predicted / peak - 1) <= BAR, "before_bytes": before, "raw_bytes": measured,
            "predicted_with_driver_bytes": plan.total, "moment": plan.moment,
            "parts": {**plan.stays, **plan.comes}}  # fmt: skip


def speed(device: str, small: bool) -> dict[str, Any]:
    n, vocabulary, hidden, teacher_hidden = (32, 500, 16, 24) if small else (8192, VOCABULARY, 2048, 4096)
    dtype, clock = (torch.bfloat16, on_device) if device == "cuda" else (torch.float32, on_processor)
    p = problem(n, vocabulary, hidden=hidden, teacher_hidden=teacher_hidden, dtype=dtype, device=device)
    jobs, missing = all_jobs(peers=True)
    for sentence in missing:
        print(f"  skipped: {sentence}")
    names = [name for name in jobs if name.removesuffix(" compiled").split()[-1] in ("four", *PEER_TASKS)]
    failed: dict[str, str] = {}
    ready, times = {}, {name: [] for name in names}
    for round_ in range(4 if small else 10):
        for name in (name for name in names if name not in failed):
            try:
                if round_ == 0:
                    ready[name] = jobs[name](p)
                took = next(iter(clock(lambda name=name: step(ready[name])).values()))
                times[name] += [took] if round_ else []  # the first round compiles
            except Exception as error:
                note_failure(name, error, failed)
            clear(p)
    of = {name: {"median_s": statistics.median(t), "rounds_s": t} for name, t in times.items() if name not in failed}
    for name, found in of.items():
        found["tokens_per_s"] = n / found["median_s"]
        print(f"  {name:32}{found['tokens_per_s']:14,.0f} tokens/s")
    return {"positions": n, "vocabulary": vocabulary, "hidden": hidden, "teacher_hidden": teacher_hidden,
            "dtype": str(dtype), "versions": versions(), "skipped peers": missing,
            "failed": failed, "of": of}  # fmt: skip


def cli(device: str, small: bool) -> dict[str, Any]:
    from stillroom.cli.main import main

    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder, shape = Path(temporary), (300, 32, 128) if small else (8000, 256, 4096)
        data, words = made_run(folder, device, *shape, teacher=sizes(64 if small else 512, 2))
        words += [student(folder, sizes(32 if small else 256, 2)), "steps=3" if small else "steps=30"]
        engine = f"{{kind: transformers, device: {device}}}"
        store = f"teacher={{kind: store, path: {folder}/capture/store}}"
        lines = {
            "live": ["distill", *words, *data, f"teacher={{kind: model, model: {folder}/teacher}}"],
            "capture": ["capture", *data, f"teacher={{model: {folder}/teacher, engine: {engine}}}"],
            "stored": ["distill", *words, store, "data.format=store"],
        }
        for name, line in lines.items():
            if code := main([*line, f"out={folder}/{name}"]):
                raise RuntimeError(f"`stillroom {line[0]}` ({name}) ended with {code}")
            record = json.loads((folder / name / "run.json").read_text())
            found[name] = {key: value for key, value in record.items() if isinstance(value, str | int | float)}
            if line[0] == "distill":
                last = (folder / name / "metrics.jsonl").read_text().splitlines()[-1]
                found[name]["last_loss_nats"] = json.loads(last)["loss_nats"]
    return found


# --- all of them -----------------------------------------------------------------------------------------------------
PARTS = {kernels: 240, bfloat16: 120, memory: 240, speed: 400, cli: 180}
"""Each with the seconds after which it is ended."""


def in_own_process(part: str, limit: int, options: argparse.Namespace) -> dict[str, Any]:
    interpreted = {"TRITON_INTERPRET": "1"} if options.device == "cpu" and part == "kernels" else {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result.json"
        command = [sys.executable, __file__, "--worker", part, "--json", str(path), "--device", options.device]
        command += ["--small"] if options.small else []
        try:
            code = subprocess.run(command, timeout=limit, env={**os.environ, **interpreted}).returncode
        except subprocess.TimeoutExpired:
            return {"error": f"not done after {limit} s"}
        return json.loads(path.read_text()) if path.exists() else {"error": f"its process ended with {code}"}


def main() -> int:
    names = {part.__name__: limit for part, limit in PARTS.items()}
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to try the parts; nothing is saved")
    parser.add_argument("--only", choices=names)
    parser.add_argument("--worker", choices=names, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        warnings.filterwarnings("ignore")
        try:
            result = {part.__name__: part for part in PARTS}[options.worker](options.device, options.small)
        except Exception as error:
            traceback.print_exc()
            result = {"error": f"{type(error).__name__}: {error}"[:1000]}
        options.json.write_text(json.dumps(result))
        return 0
    if options.device == "cpu" and not options.small:
        parser.error("--device cpu goes with --small")
    missing = options.device == "cuda" and not torch.cuda.is_available()
    found: dict[str, dict[str, Any]] = {}
    for name in [options.only] if options.only else names:
        print(name, flush=True)
        skipped = {"skipped": "torch sees no CUDA device"}
        found[name] = skipped if missing else in_own_process(name, names[name], options)
        state = next((f"{key}: {found[name][key]}" for key in ("skipped", "error") if key in found[name]), "done")
        print(f"{name}: {state}", flush=True)
    if not (missing or options.small or options.only):
        device = {"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
        save(__file__, {"machine": machine() | device, "parts": found})
    return int(any("error" in result for result in found.values()))


if __name__ == "__main__":
    sys.exit(main())

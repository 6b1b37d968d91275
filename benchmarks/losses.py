"""The loss family: time, memory and exactness of every loss, beside bare matrix products, full logits and two peers.

Student 256 wide, teacher 512 wide, 2,048 positions, float32, vocabularies 32,000 and 128,000. Times are of the loss and
its backward, in rounds in which every job has its turn, and ratios are medians of the rounds' own ratios. The products,
forward KL, cross-entropy and what is compared with it are measured in every round, other losses in every second one,
peers in the first one and every fourth after it; above 32,000 columns there are three rounds at most. Extra memory is
the peak resident size during a loss and its backward, less that before, in a process of its own for each. Where there
is a GPU: 8,192 positions, both 4,096 wide, bfloat16, 128,256 columns. It takes a machine that does nothing else.

    python benchmarks/losses.py [--repeats 5] [--vocabularies 32000 128000] [--skip-memory] [--skip-peers] [--gpu]
"""

import argparse
import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from formulas import FORMULAS, values
from loss_jobs import (
    ARGUMENTS,
    NEEDS_NO_TEACHER,
    PEER_TASKS,
    SAMPLES_24,
    TOP_50,
    Problem,
    all_jobs,
    chunk_rows,
    objective,
    own_jobs,
    problem,
)
from loss_report import MIB, bars, markdown
from results import machine, save
from throughput import resident_bytes
from torch import Tensor

from stillroom.losses.config import LOSSES

OFTEN = ("four", "forward_kl", NEEDS_NO_TEACHER, TOP_50, SAMPLES_24)
BASES = ("four", "forward_kl", NEEDS_NO_TEACHER, *PEER_TASKS)
"""What every time is divided by, besides."""
GROWTH = (2048, 8192, 32768)
GPU = {"positions": 8192, "vocabulary": 128_256, "hidden": 4096, "teacher_hidden": 4096}


def main() -> None:
    options = parse()
    warnings.filterwarnings("ignore")
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.worker:
        print(json.dumps(extra_memory(options.worker, options.tokens, options.vocabularies[0])))
        return
    if options.gpu and not torch.cuda.is_available():
        raise SystemExit("--gpu was asked for, and torch sees no CUDA device")
    missing = all_jobs(peers=not options.skip_peers)[1]
    result: dict[str, Any] = {
        "machine": machine() | versions(), "threads": torch.get_num_threads(), "tokens": options.tokens,
        "load": os.getloadavg()[0], "arguments": {name: ARGUMENTS.get(name, {}) for name in LOSSES},
        "not measured": missing,
    }  # fmt: skip
    for sentence in missing:
        print(sentence, flush=True)
    if result["load"] > 0.5:
        print(f"This machine is busy (load {result['load']:.1f}): two threads will wait for each other.", flush=True)
    if not options.skip_cpu:
        result |= on_cpu(options)
    if torch.cuda.is_available():
        result["gpu"] = on_gpu(options)
    result["bars"] = [vars(bar) | {"met": bar.met} for bar in bars(result)]
    save(__file__, result)
    print(markdown(result))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=5, help="rounds at up to 32,000 columns")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[32_000, 128_000])
    parser.add_argument("--threads", type=int)
    parser.add_argument("--skip-memory", action="store_true")
    parser.add_argument("--skip-peers", action="store_true")
    parser.add_argument("--skip-cpu", action="store_true", help="measure on the GPU only")
    parser.add_argument("--gpu", action="store_true", help="fail where there is none; one that is there is used anyway")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def versions() -> dict[str, str | None]:
    found = {}
    for package in ("liger-kernel", "trl"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def on_cpu(options: argparse.Namespace) -> dict[str, Any]:
    result: dict[str, Any] = {"time": {}}
    for vocabulary in options.vocabularies:
        rounds = options.repeats if vocabulary <= 32_000 else min(options.repeats, 3)
        result["time"][str(vocabulary)] = timings(problem(options.tokens, vocabulary), rounds, not options.skip_peers)
    result["gradient error"] = gradient_errors()
    print("gradient error", result["gradient error"], flush=True)
    result["smallest value"] = smallest_values()
    print("smallest value", result["smallest value"], flush=True)
    if not options.skip_memory:
        largest = max(options.vocabularies)
        names = [name for name in all_jobs(peers=not options.skip_peers)[0] if name != "four"]
        result["memory"] = {
            "vocabulary": largest,
            "of": {name: in_own_process(name, options.tokens, largest, options.threads) for name in names},
        }
        smallest = min(options.vocabularies)
        growth = [n * options.tokens // GROWTH[0] for n in GROWTH]
        result["memory growth"] = {
            "vocabulary": smallest,
            "of": {str(n): in_own_process("forward_kl", n, smallest, options.threads) for n in growth},
        }
    return result


# Time.


def due(name: str, round_: int) -> bool:
    if name in OFTEN:
        return True
    return round_ % (2 if name in LOSSES else 4) == 0


Clock = Callable[[Callable[[], Any]], dict[str, float]]
"""Runs something and says what time it took, by name of the measure."""


def on_processor(work: Callable[[], Any]) -> dict[str, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}


def on_device(work: Callable[[], Any]) -> dict[str, float]:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return {"device_s": start.elapsed_time(end) / 1000}


def step(loss: Callable[[], Tensor]) -> Tensor:
    value = loss()
    if value.requires_grad:
        value.backward()
    return value.detach()


def clear(p: Problem) -> None:
    for x in p.trained:
        x.grad = None


def timings(p: Problem, rounds: int, peers: bool, clock: Clock = on_processor) -> dict[str, Any]:
    """By job: the times of each round, their medians, and the ratios to the bare products and to forward KL."""
    torch.compiler.reset()
    ready: dict[str, Callable[[], Tensor]] = {}
    failed: dict[str, str] = {}
    for name, job in all_jobs(peers=peers)[0].items():
        try:
            small = p if "compiled" in name or p.student.is_cuda else p.first(16)
            step(job(small))
            ready[name] = job(p)
        except Exception as error:
            note_failure(name, error, failed)
        clear(p)
    times: dict[str, dict[int, dict[str, float]]] = {name: {} for name in ready}
    losses: dict[str, Tensor] = {}
    for round_ in range(rounds):
        names = list(ready)
        for name in names[round_ % len(names) :] + names[: round_ % len(names)]:
            if name in failed or not due(name, round_):
                continue
            clear(p)
            try:
                times[name][round_] = clock(lambda name=name: losses.update({name: step(ready[name])}))
            except Exception as error:
                note_failure(name, error, failed)
                continue
            shown = ", ".join(f"{key} {value:.3f}" for key, value in times[name][round_].items())
            print(f"{len(p.head)} columns, round {round_}: {name}: {shown}", flush=True)
    clear(p)
    measures = next(iter(times["four"].values()))
    return {
        "rounds": rounds,
        "chunk_positions": chunk_rows(len(p.head)),
        "failed": failed,
        "of": {
            name: {
                "loss": float(losses[name]),
                **{m: statistics.median(t[m] for t in of_job.values()) for m in measures},
                **{
                    f"{m} of {other}": ratio(of_job, times[other], m)
                    for m in measures
                    for other in BASES
                    if times.get(other)
                },
                "rounds": list(of_job.values()),
            }
            for name, of_job in times.items()
            if of_job
        },
    }


def note_failure(name: str, error: Exception, failed: dict[str, str]) -> None:
    """A peer that fails is told of; what is ours may not."""
    if name == "four" or name in own_jobs():
        raise error
    failed[name] = f"{type(error).__name__}: {error}"[:300]
    print(f"{name} failed: {failed[name]}", flush=True)


def ratio(job: dict[int, dict[str, float]], other: dict[int, dict[str, float]], measure: str) -> float:
    return statistics.median(job[i][measure] / other[i][measure] for i in job if i in other)


# Memory.


def extra_memory(name: str, tokens: int, vocabulary: int) -> dict[str, Any]:
    """Runs in a process of its own. What is compiled is compiled before; else a few positions come first."""
    job = all_jobs(peers=name not in own_jobs())[0][name]
    p = problem(tokens, vocabulary)
    ready = job(p)
    few = p.first(16)
    step(ready) if "compiled" in name else step(job(few))
    clear(p)
    del few
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = resident_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # starts the peak anew
    step(ready)
    extra = resident_bytes("VmHWM") - before
    return {"extra_bytes": extra, "of which gradient_bytes": p.gradient_bytes, "tokens": tokens}


def in_own_process(name: str, tokens: int, vocabulary: int, threads: int | None) -> dict[str, Any]:
    command = [sys.executable, __file__, "--worker", name, "--tokens", str(tokens), "--vocabularies", str(vocabulary)]
    command += ["--threads", str(threads)] if threads else []
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode != 0:
        reason = (run.stderr.strip().splitlines() or [f"ended with {run.returncode}"])[-1]
        print(f"{name} failed: {reason}", flush=True)
        return {"failed": reason}
    found = json.loads(run.stdout.splitlines()[-1])
    print(f"memory, {vocabulary} columns, {tokens} tokens: {name}: {found['extra_bytes'] / MIB:.0f} MiB", flush=True)
    return found


# Exactness.


def gradient_errors(positions: int = 256, vocabulary: int = 8192) -> dict[str, dict[str, float]]:
    """|g − g64| / |g64|, the larger of hidden states' and head's; and that of the naive formula in the inputs' type.

    For two teachers: one of its own, and one close to the student, where the gradient is a small difference.
    """
    errors: dict[str, dict[str, float]] = {}
    for distance, apart in (("of its own", None), ("0.1 apart", 0.1)):
        for dtype in (torch.float32, torch.bfloat16):
            p = problem(positions, vocabulary, apart=apart, dtype=dtype)
            student, head = (x.detach().double().requires_grad_() for x in p.trained)
            exact = Problem(student, head, p.teacher.double(), p.teacher_head.double(), p.labels)
            of_type = str(dtype).removeprefix("torch.")
            for name in (x for x in LOSSES if x in FORMULAS or x == NEEDS_NO_TEACHER):
                step(lambda name=name, exact=exact: naive_value(name, exact))
                found = errors.setdefault(name, {})
                step(own_jobs()[name](p))
                found[f"{of_type}, teacher {distance}"] = furthest(p, exact)
                clear(p)
                step(lambda name=name, p=p: naive_value(name, p))
                found[f"naive {of_type}, teacher {distance}"] = furthest(p, exact)
                clear(p)
                clear(exact)
    return errors


def furthest(p: Problem, exact: Problem) -> float:
    errors = []
    for x, y in zip(p.trained, exact.trained, strict=True):
        assert x.grad is not None
        assert y.grad is not None
        errors.append(float((x.grad.double() - y.grad).norm() / y.grad.norm()))
    return max(errors)


def naive_value(name: str, p: Problem) -> Tensor:
    student, teacher = p.student @ p.head.T, p.teacher @ p.teacher_head.T
    return values(name, teacher, student, p.labels, **ARGUMENTS.get(name, {})).mean()


@torch.no_grad()
def smallest_values(positions: int = 2048, vocabulary: int = 8192) -> dict[str, dict[str, float]]:
    """Of each loss over many positions, where the teacher is the student and a little noise, or none."""
    found: dict[str, dict[str, float]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        for apart in (0.0, 1e-4, 1e-2):
            p = problem(positions, vocabulary, apart=apart, dtype=dtype)
            nats = p.losses([objective(name) for name in LOSSES], p.dense()).nats
            key = f"{str(dtype).removeprefix('torch.')}, {apart} apart"
            for name, of_loss in zip(LOSSES, nats, strict=True):
                found.setdefault(name, {})[key] = float(of_loss.min())
    return found


# On a GPU.


def on_gpu(options: argparse.Namespace) -> dict[str, Any]:
    p = problem(GPU["positions"], GPU["vocabulary"], hidden=GPU["hidden"], teacher_hidden=GPU["teacher_hidden"],
                dtype=torch.bfloat16, device="cuda")  # fmt: skip
    failed: dict[str, str] = {}
    result: dict[str, Any] = GPU | {
        "device": torch.cuda.get_device_name(),
        "time": timings(p, max(options.repeats, 5), not options.skip_peers, on_device),
        "memory": {},
    }
    for name, job in all_jobs(peers=not options.skip_peers)[0].items():
        if name == "four":
            continue
        try:
            result["memory"][name] = extra_device_memory(p, job(p))
        except Exception as error:
            note_failure(name, error, failed)
        else:
            print(f"gpu memory: {name}: {result['memory'][name]}", flush=True)
    return result | {"failed": failed}


def extra_device_memory(p: Problem, loss: Callable[[], Tensor]) -> dict[str, int]:
    step(loss)
    clear(p)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(loss)
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before
    clear(p)
    return {"extra_bytes": extra, "of which gradient_bytes": p.gradient_bytes}


if __name__ == "__main__":
    main()

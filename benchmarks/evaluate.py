"""Likelihoods of answers: our engine beside lm-eval's own for Hugging Face models, side by side in one process.

The model is stories3M in float32 on one thread. Each side gets the same pairs of context and continuation, as text, and
gives each one's log-likelihood: of both sentences of every seventh pair of BLiMP, and of both answers to BIG-Bench
Hard's boolean expressions after three examples. lm-eval gets each of several batch sizes, and the fastest counts.

    python benchmarks/evaluate.py [--rounds 5]
"""

import argparse
import logging
import os
import statistics
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from results import data_folder, machine, save

BATCH_SIZES = (16, 64, 128)
TASKS = {"blimp": 7, "bbh-boolean-expressions": 1}
"""The description of a task, and of how many items one is taken."""


class Instance(NamedTuple):
    """A request as lm-eval's engine takes it."""

    args: tuple[str, str]


def measure(work: Callable[[], list[float]]) -> tuple[float, float, list[float]]:
    wall, cpu = time.perf_counter(), time.process_time()
    found = work()
    return time.perf_counter() - wall, time.process_time() - cpu, found


def pairs_of(name: str, step: int) -> list[tuple[str, str]]:
    from stillroom.evaluate.config import LocalTask, read_description
    from stillroom.evaluate.tasks.local import questions

    path = Path(__file__).parents[1] / "recipes" / "tasks" / f"{name}.yaml"
    asked = questions(read_description(LocalTask(kind="local", path=str(path))))[::step]
    return [(question.context, option) for question in asked for option in question.options]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    os.environ["STILLROOM_DATA"] = str(data_folder())

    import torch
    from lm_eval.models.huggingface import HFLM

    from stillroom.evaluate.tasks.likelihood import encode, log_likelihoods
    from stillroom.models.loading import load_model
    from stillroom.tokenizers import load_tokenizer

    torch.set_num_threads(1)
    logging.disable()
    folder = str(data_folder() / "models" / "stories3M")
    model, tokenizer = load_model(folder, dtype=torch.float32), load_tokenizer(folder)
    theirs = HFLM(pretrained=model, tokenizer=load_tokenizer(folder), batch_size=1)
    summary = {}
    for name, step in TASKS.items():
        pairs = pairs_of(name, step)

        def ours(pairs: list[tuple[str, str]] = pairs) -> list[float]:
            return [one.log_likelihood for one in log_likelihoods(model, encode(tokenizer, pairs, str))]

        def lm_eval(size: int, pairs: list[tuple[str, str]] = pairs) -> list[float]:
            theirs.batch_size_per_gpu = size
            return [one[0] for one in theirs.loglikelihood([Instance(pair) for pair in pairs], disable_tqdm=True)]

        sides = {"stillroom": ours} | {
            f"lm-eval, batches of {size}": lambda size=size: lm_eval(size) for size in BATCH_SIZES
        }
        times: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
        scores: dict[str, list[float]] = {}
        for _ in range(rounds + 1):  # the first one warms up
            for side, work in sides.items():
                wall, cpu, scores[side] = measure(work)
                times[side].append((wall, cpu))
        medians = {
            side: {
                "wall_s": statistics.median(wall for wall, _ in of_side[1:]),
                "cpu_s": statistics.median(cpu for _, cpu in of_side[1:]),
            }
            for side, of_side in times.items()
        }
        best = min((side for side in sides if side != "stillroom"), key=lambda side: medians[side]["cpu_s"])
        summary[name] = {
            "num_pairs": len(pairs),
            "medians": medians,
            "fastest_lm_eval": best,
            "speed_cpu": medians[best]["cpu_s"] / medians["stillroom"]["cpu_s"],
            "speed_wall": medians[best]["wall_s"] / medians["stillroom"]["wall_s"],
            "largest_difference_nats": max(abs(a - b) for a, b in zip(scores["stillroom"], scores[best], strict=True)),
        }
        print(name, {key: value for key, value in summary[name].items() if key != "medians"})
    versions = {"lm_eval": metadata.version("lm_eval")}
    save(
        __file__, {"machine": machine() | versions, "rounds": rounds, "summary": summary, "bars": {"speed_cpu": ">= 1"}}
    )


if __name__ == "__main__":
    main()

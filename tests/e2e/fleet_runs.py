"""One of several processes that make runs together, one after the other; started with RANK, WORLD_SIZE and so on set.

python fleet_runs.py RECIPE RUNS.json, where RUNS.json is a list of {"words": [key=value, …]} with, as needed,
"stop_at": the step after which the first process is sent SIGTERM, "resume": true, and
"die": {"rank": R, "in": "step" | "save" | "name", "at": N}, a process that kills itself the Nth time it comes there, or
with "how": "cut" takes its host off the network.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from stillroom.config import load
from stillroom.distill.config import DistillConfig
from stillroom.distill.run import run
from stillroom.distributed import init
from stillroom.errors import Stopped
from stillroom.models.loading import quiet
from stillroom.training import checkpoint, loop


def die() -> None:
    """As a lost machine does."""
    os.kill(os.getpid(), signal.SIGKILL)


def cut() -> None:
    """Takes this process's host off the network, where it is a namespace with an interface eth0."""
    subprocess.run(["ip", "link", "set", "eth0", "down"], check=True)


def dying(function: Callable[..., Any], at: int, end: Callable[[], None]) -> Callable[..., Any]:
    """The function, which the Nth time it is called ends its process in some way first."""
    times = 0

    def count(*args: Any, **settings: Any) -> Any:
        nonlocal times
        times += 1
        if times == at:
            end()
        return function(*args, **settings)

    return count


def prepare_to_die(rank: int, where: str, at: int, how: str = "kill") -> None:
    if int(os.environ["RANK"]) != rank or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        return
    end = cut if how == "cut" else die
    if where == "step":
        loop.gradients_summed_later = dying(loop.gradients_summed_later, at, end)  # pyright: ignore
    elif where == "save":
        checkpoint.save_tensors = dying(checkpoint.save_tensors, at, end)  # pyright: ignore
    else:
        checkpoint.Checkpoints._name = dying(checkpoint.Checkpoints._name, at, end)  # pyright: ignore


def main(recipe: str, runs: list[dict[str, Any]]) -> None:
    quiet()
    for made in runs:
        config = load(DistillConfig, Path(recipe), made["words"])
        if "die" in made:
            prepare_to_die(made["die"]["rank"], made["die"]["in"], made["die"]["at"], made["die"].get("how", "kill"))

        def report(event: str, values: Mapping[str, Any], made: dict[str, Any] = made) -> None:
            if event == "step" and values["step"] == made.get("stop_at"):
                signal.raise_signal(signal.SIGTERM)

        try:
            run(config, resume=made.get("resume", False), report=report)
        except (Stopped, SystemExit):
            assert "stop_at" in made
            init.destroy_distributed()


if __name__ == "__main__":
    main(sys.argv[1], json.loads(Path(sys.argv[2]).read_text()))

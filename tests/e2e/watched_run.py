"""One of several processes of a run of `stillroom distill`: tells what it held at most, and what each step sent.

It is started with RANK, WORLD_SIZE and so on set, and writes {"before": bytes at the start, "most": {phase: bytes above
that}, "sent": [{kind: [times, bytes]} of each step]}. What is loaded once, with whatever model, counts as there before.
"""

import ctypes
import gc
import json
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stillroom.config import load
from stillroom.distill import run
from stillroom.distill.config import DistillConfig
from stillroom.models import safetensors_io
from stillroom.models.loading import quiet
from stillroom.training import checkpoint, loop, student

FILE_BYTES = 2**22
"""Of the files of the exported model, so that a small one has several."""


class Sent(TorchDispatchMode):
    """Counts collectives: of a gather or a scatter what is whole, of a sum what is added up."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, list[int]] = defaultdict(lambda: [0, 0])

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            sizes = [x.numel() * x.itemsize for x in tree_leaves(args) if isinstance(x, torch.Tensor)]
            kind = self.found[func._schema.name.removeprefix("c10d::")]
            kind[0] += 1
            kind[1] += max(sizes, default=0)
        return func(*args, **(kwargs or {}))


class Held:
    """The most memory of its own that this process holds in each phase, above what it held before."""

    def __init__(self) -> None:
        self.give_back()
        self.before, self.phase, self.ended = own_bytes(), "start", False
        self.most: dict[str, int] = defaultdict(int)
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()

    def watch(self) -> None:
        while not self.ended:
            self.look()
            time.sleep(0.001)

    def look(self) -> None:
        self.most[self.phase] = max(self.most[self.phase], own_bytes() - self.before)

    def during(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **settings: Any) -> Any:
            self.give_back()
            before, self.phase = self.phase, phase
            try:
                return function(*args, **settings)
            finally:
                self.look()
                self.phase = before

        return watched

    def give_back(self) -> None:
        """What nobody holds any more is not counted."""
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)


def own_bytes() -> int:
    """Memory that is this process's alone, without the pages of files that it reads."""
    (line,) = [text for text in Path("/proc/self/status").read_text().splitlines() if text.startswith("RssAnon")]
    return int(line.split()[1]) * 1024


def main(out: str, recipe: str, tiny: list[str], words: list[str]) -> None:
    """Makes a tiny run and then the watched one."""
    quiet()
    run.run(load(DistillConfig, Path(recipe), tiny))
    config = load(DistillConfig, Path(recipe), words)
    held, sent = Held(), []
    step = loop.optimizer_step

    def counted(*args: Any, **settings: Any) -> Any:
        with Sent() as found:
            values = step(*args, **settings)
        sent.append(found.found)
        return values

    loop.optimizer_step = held.during("step", counted)
    run.build_pair = held.during("load", run.build_pair)
    run.build_state = held.during("load", run.build_state)
    checkpoint.Checkpoints.save = held.during("save", checkpoint.Checkpoints.save)
    student.Student.save = held.during("export", student.Student.save)
    safetensors_io.save_weights.__kwdefaults__["file_bytes"] = FILE_BYTES
    run.run(config)
    held.ended = True
    held.thread.join()
    Path(out).write_text(json.dumps({"before": held.before, "most": held.most, "sent": sent}))

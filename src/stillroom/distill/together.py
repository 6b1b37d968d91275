"""What the processes of a run do together besides training: they meet and part, compare what they have, run the
teacher for each other, and know what began the run."""

import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from stillroom.distill.build import AnyTeacher, build_teacher, compared_layers
from stillroom.distill.config import DistillConfig
from stillroom.distill.config import LiveTeacher as LiveTeacherConfig
from stillroom.distill.distant import DistantTeacher, serve
from stillroom.distill.hidden import layers_of
from stillroom.distill.meeting import Meeting, leave, meet
from stillroom.distill.parallel_config import Fsdp
from stillroom.distill.plan import Plan
from stillroom.distill.teacher import LiveTeacher
from stillroom.errors import Interrupted
from stillroom.files import read_json
from stillroom.interrupt import deferred_interrupts
from stillroom.runs import versions
from stillroom.tokenizers import fingerprint


def launcher() -> str:
    """What has started this process, as no other is called at the same time."""
    return f"process {os.getppid()} of {socket.gethostname()}"


def began(out: str, launchers: Sequence[str]) -> bool:
    """Whether the run that lies there was begun by any of what has started these processes: one node may be new."""
    path = Path(out) / "run.json"
    return path.is_file() and not set(launchers).isdisjoint(read_json(path).get("launchers", ()))


def must_be_same(plan: Plan) -> dict[str, object]:
    """What must be the same in all processes before anything is loaded."""
    config = plan.config.model_dump(mode="json", exclude={"data": {"cache"}})
    found = versions()
    return {
        **{f"versions of {name}": found.get(name, "none") for name in ("python", "stillroom", "torch", "transformers")},
        "settings": config,
        "tokenizers": fingerprint(plan.tokenizer),
    }


def teach(plan: Plan, meeting: Meeting) -> dict[str, Any]:
    """Runs the teacher for the processes that train, until they have left."""
    teacher = build_teacher(plan, meeting)
    assert isinstance(teacher, LiveTeacher)
    assert isinstance(plan.config.teacher, LiveTeacherConfig)
    teacher.ask_for(*layers_of(compared_layers(plan, None), 1))
    with deferred_interrupts() as interrupted:  # those that train are told, and say when to stop
        serve(teacher, meeting, plan.config.device, interrupted, together=plan.config.teacher.placement != "whole")
    return {}


@contextmanager
def leaving(teacher: AnyTeacher | None) -> Iterator[None]:
    """Tells a teacher on processes of its own when it is no longer needed: after the run, or when it is interrupted."""
    try:
        yield
    except Interrupted:
        if isinstance(teacher, DistantTeacher):
            teacher.leave()
        raise
    if isinstance(teacher, DistantTeacher):
        teacher.leave()


@contextmanager
def together(config: DistillConfig) -> Iterator[Meeting]:
    """The processes that were started together, until the end of the run."""
    teacher, parallel = config.teacher, config.parallel
    live = teacher if isinstance(teacher, LiveTeacherConfig) else None
    number = config.device.partition(":")[2]
    meeting = meet(
        "cuda" if config.device.startswith(("auto", "cuda")) and torch.cuda.is_available() else "cpu",
        timeout_s=getattr(parallel, "timeout_s", 60.0),
        sharded=isinstance(parallel, Fsdp) or (live is not None and live.placement in ("sharded", "offloaded")),
        replicas=parallel.replicas if isinstance(parallel, Fsdp) else 1,
        num_teachers=(live.ranks or 0) if live is not None else 0,
        device=int(number) if number.isdecimal() else None,
    )
    try:
        yield meeting
    except BaseException:
        if meeting.everybody.size == 1:
            leave()
        raise  # groups of which a process is lost cannot be left in good order
    else:
        leave()

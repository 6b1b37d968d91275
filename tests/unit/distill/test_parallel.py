"""What "auto" takes on several processes, and what does not fit them."""

from typing import Any

import pytest

from published import PUBLISHED
from stillroom.config import load
from stillroom.distill.config import DistillConfig
from stillroom.distill.estimate import resolve_parallel
from stillroom.distributed.group import RankGroup
from stillroom.distributed.init import DistContext
from stillroom.errors import ConfigError, OutOfMemoryError
from stillroom.estimates.headers import Headers
from stillroom.estimates.model_size import model_size

SMALL, BIG = (model_size(PUBLISHED[name][0], "the model") for name in ("Qwen2 1.5B", "Llama 3.1 70B"))
GB = 10**9


def settings(*words: str) -> DistillConfig:
    return load(
        DistillConfig,
        None,
        [
            "student.model=s", "data={path: d, format: text, length: 2048}", "objectives=[{kind: forward_kl}]",
            "teacher={kind: model, model: t, dtype: bfloat16}", "steps=1", "batch.tokens=65536",
            "batch.micro_tokens=2048", "optimizer.learning_rate=1e-4", "out=o", "device=cuda", "precision=bfloat16",
            "logits_bytes=1000000", "student.gradient_checkpointing=true", *words,
        ],
    )  # fmt: skip


def context(students: int, teachers: int = 0) -> DistContext:
    world = RankGroup(0, students + teachers)
    return DistContext(world, RankGroup(0, students), num_teachers=teachers)


def resolved(config: DistillConfig, size: int, memory_gb: float, student: Any = SMALL, teachers: int = 0) -> Any:
    headers = Headers({"student": student, "teacher": SMALL})
    return resolve_parallel(config, headers, context(size, teachers), int(memory_gb * GB))


def test_one_process_is_alone_with_a_whole_teacher():
    found = resolved(settings(), 1, 80)
    assert (found.parallel.kind, found.teacher.placement) == ("none", "whole")
    assert found.checkpoints.background is True  # on a GPU


def test_what_fits_is_replicated_and_what_does_not_is_sharded():
    assert resolved(settings(), 8, 80).parallel.kind == "ddp"
    found = resolved(settings("parallel={kind: auto, timeout_s: 5}"), 8, 30)
    assert (found.parallel.kind, found.parallel.timeout_s, found.teacher.placement) == ("fsdp", 5, "sharded")
    assert resolved(settings(), 64, 80, BIG).parallel.kind == "fsdp"


def test_an_architecture_that_nobody_knows_is_sharded_and_not_foreseen():
    assert resolve_parallel(settings(), None, context(8), GB).parallel.kind == "fsdp"


def test_a_teacher_on_its_own_processes_is_whole_where_it_fits():
    assert resolved(settings("teacher.ranks=2"), 8, 80, teachers=2).teacher.placement == "whole"
    assert (
        resolved(
            settings("teacher.ranks=2", "parallel={kind: fsdp, offload: true}"), 16, 3.5, teachers=2
        ).teacher.placement
        == "sharded"
    )


def test_many_processes_for_a_run_of_one_are_refused():
    with pytest.raises(ConfigError, match="2 processes were started for a run of one"):
        resolved(settings("parallel.kind=none"), 2, 80)


def test_what_will_not_fit_is_told_with_what_would():
    with pytest.raises(OutOfMemoryError, match="does not fit 8 processes") as raised:
        resolved(settings("parallel.kind=fsdp"), 8, 80, BIG)
    assert "num_devices=" in raised.value.fix
    assert "offload" in raised.value.fix
    resolved(settings("parallel={kind: fsdp, offload: true}"), 8, 80, BIG)


def test_copies_need_the_memory_of_a_copy():
    resolved(settings("parallel.kind=fsdp"), 32, 80, BIG)
    with pytest.raises(OutOfMemoryError):
        resolved(settings("parallel={kind: fsdp, replicas: 4}"), 32, 80, BIG)

"""Joining and leaving process groups, more than once in a process; and which run a restarted process belongs to."""

import itertools
import json
import os
import socket
import subprocess
import sys
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import HashStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.fsdp import fully_shard

from stillroom.distributed import init
from stillroom.distributed.group import RankGroup
from stillroom.distributed.init import began, destroy_distributed, init_distributed
from stillroom.runs import write_json

SCRIPT = """
import json
from stillroom.distributed.failures import FailureReport
from stillroom.distributed.init import destroy_distributed, init_distributed
import torch

found = []
for entry in range(3):
    context = init_distributed("cpu", timeout_s=60, sharded=entry == 1)
    world = context.world
    assert context.group.mesh.size() == 2
    failures = FailureReport(world)
    before = failures.ends()  # of this entry alone
    world.barrier()
    failures.end("failed", f"in {entry}")
    total = world.all_reduce_(torch.tensor([10.0**entry * (world.rank + 1)])).item()
    found.append([total, world.all_gather((entry, world.rank)), before, world.on_rank0(lambda: entry)])
    world.barrier()
    destroy_distributed()
print(json.dumps(found))
"""


@pytest.mark.parametrize("of_torchrun", [False, True], ids=["own port", "torchrun's port"])
def test_two_processes_join_and_leave_more_than_once(of_torchrun):
    store = TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=60), wait_for_workers=False)
    port = store.port
    if not of_torchrun:
        del store
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
    own = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    own |= {"TORCHELASTIC_USE_AGENT_STORE": str(of_torchrun)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT],
            stdout=subprocess.PIPE,
            env={**os.environ, **own, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    texts = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    for rank, text in enumerate(texts):
        entries = json.loads(text)
        assert [entry[0] for entry in entries] == [3.0, 30.0, 300.0]
        assert [entry[1] for entry in entries] == [[[number, 0], [number, 1]] for number in range(3)]
        assert [entry[2] for entry in entries] == [{}, {}, {}]
        assert [entry[3] for entry in entries] == ([0, 1, 2] if rank == 0 else [None] * 3)


def test_an_attempt_of_torchrun_meets_nobody_of_the_attempt_before(monkeypatch):
    """torchrun's store keeps what they have written; who does not come is named."""
    monkeypatch.setattr(init, "_stores", {("here", 1): HashStore()})
    monkeypatch.setattr(init, "JOIN_TIME", timedelta(milliseconds=50))
    for name, value in {"MASTER_ADDR": "here", "MASTER_PORT": "1", "TORCHELASTIC_USE_AGENT_STORE": "True"}.items():
        monkeypatch.setenv(name, value)

    def join(rank: int, attempt: int) -> None:
        monkeypatch.setattr(init, "_entries", itertools.count(1))
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(attempt))
        init._join_store(RankGroup(rank, 2))

    with pytest.raises(RuntimeError, match="rank 0 did not come"):
        join(1, attempt=0)
    join(0, attempt=0)
    with pytest.raises(RuntimeError, match="rank 1 did not come"):
        join(0, attempt=1)


def test_one_process_that_shards_joins_and_leaves_twice(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    weights = []
    for _ in range(2):
        context = init_distributed("cpu", timeout_s=60, sharded=True)
        torch.manual_seed(0)
        layer = nn.Linear(4, 3)
        assert context.group.mesh is not None
        fully_shard(layer, mesh=context.group.mesh)
        optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
        layer(torch.ones(2, 4)).sum().backward()
        optimizer.step()
        weights.append(layer.weight.full_tensor())  # pyright: ignore
        destroy_distributed()
        assert not dist.is_initialized()
    assert torch.equal(*weights)


def test_a_run_was_begun_by_whom_its_record_names(tmp_path):
    assert not began(str(tmp_path), ["process 1 of a"])  # there is no run
    write_json(tmp_path / "run.json", {"launchers": ["process 1 of a", "process 2 of b"]})
    assert began(str(tmp_path), ["process 3 of c", "process 2 of b"])
    assert not began(str(tmp_path), ["process 3 of c"])
    write_json(tmp_path / "run.json", {})
    assert not began(str(tmp_path), ["process 1 of a"])

"""Process groups: the processes that `torchrun` starts find each other, and are divided into trainers and teachers."""

import datetime
import itertools
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import HashStore, PrefixStore, Store, TCPStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.device_mesh import DeviceMesh

from stillroom.distributed.group import SINGLE_RANK, RankGroup
from stillroom.errors import ConfigError, MissingError, ReportedElsewhere
from stillroom.runs import read_json


def rank_info() -> RankGroup:
    """Reads RANK, WORLD_SIZE and LOCAL_RANK, which `torchrun` sets; without WORLD_SIZE this process is the only one.

    Raises:
        ConfigError: one of them is not a number.
        MissingError: MASTER_ADDR or MASTER_PORT is not set.
    """
    if os.environ.get("WORLD_SIZE", "") in ("", "0", "1"):
        return SINGLE_RANK
    values = {}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        text = os.environ.get(name, "0" if name == "LOCAL_RANK" else "")
        if not text.isdecimal():
            raise ConfigError(
                f"the environment does not say this process's {name}",
                {name: text or "not set", "WORLD_SIZE": os.environ["WORLD_SIZE"]},
                why="Each process must know which it is, and how many there are.",
                fix="Start the run with `torchrun`, which sets it; or unset WORLD_SIZE to run one process.",
            )
        values[name] = int(text)
    if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]:
        raise MissingError(
            f"the environment does not say where the processes meet: {' and '.join(missing)} not set",
            {"RANK": values["RANK"], "WORLD_SIZE": values["WORLD_SIZE"]},
            why="They find each other through a port of the first one's host.",
            fix="Start the run with `torchrun`, which sets them; or set them to the first host's address and a port.",
        )
    return RankGroup(values["RANK"], values["WORLD_SIZE"], values["LOCAL_RANK"])


@dataclass(frozen=True)
class DistContext:
    """All processes of a run: first the trainers, then the teachers, if the teacher has processes of its own."""

    world: RankGroup
    group: RankGroup
    """The processes of this one's kind: trainers or teachers."""
    is_teacher: bool = False
    """Whether this process runs the teacher."""
    num_teachers: int = 0
    requests: dist.ProcessGroup | None = None
    """The group that carries requests to the teachers."""
    responses: dist.ProcessGroup | None = None
    """The group that carries their responses."""

    @property
    def num_trainers(self) -> int:
        return self.world.world_size - self.num_teachers


JOIN_TIME = datetime.timedelta(minutes=10)
"""The time that the first to come waits for the last: some may have to be given a machine first."""

SETUP_TIME = datetime.timedelta(hours=24)
"""The time that one process may take while the others wait, for what has no bound of its own."""

SINGLE_PROCESS = DistContext(SINGLE_RANK, SINGLE_RANK)

_stores: dict[tuple[str, int], Store] = {}
"""The connections to the stores where processes meet. They stay open between runs: their keys are another run's."""

_entries = itertools.count(1)
"""Numbers this process's runs of several processes. All count alike: they make the same runs in the same order."""


def init_distributed(
    device_type: str,
    *,
    timeout_s: float,
    sharded: bool,
    replicas: int = 1,
    num_teachers: int = 0,
    device: int | None = None,
) -> DistContext:
    """Joins the processes that were started together, until :func:`destroy_distributed`; then they may join again.

    Args:
        device_type: cpu or cuda, where tensors will lie: on CUDA each process takes the device of its local rank.
        sharded: whether anything is to be sharded, for which a single process needs a mesh too.
        replicas: the number of copies of the student.
        num_teachers: how many of the processes run the teacher.
        device: the number of the CUDA device of a single process.

    Raises:
        ConfigError: so many processes cannot be divided so.
        MissingError: the others did not come, or there is no device for this one.
    """
    here, host = rank_info(), socket.gethostname()
    try:
        _check_division(here.world_size, replicas, num_teachers, device)
    except ConfigError as error:
        raise error if here.rank == 0 else ReportedElsewhere.of(error) from None
    if here.world_size == 1 and not sharded:
        return SINGLE_PROCESS
    if device_type == "cuda":
        number = here.local_rank if device is None else device
        if number >= torch.cuda.device_count():
            raise MissingError(
                f"there is no CUDA device for rank {here.rank} on {host}",
                {"its number on this host": number, "CUDA devices": torch.cuda.device_count()},
                why="Each process needs a device of its own.",
                fix="Start as many processes on a host as it has devices (torchrun --nproc-per-node gpu).",
            )
        torch.cuda.set_device(number)
        torch.cuda.init()  # or the mesh would choose a device again
    timeout = datetime.timedelta(seconds=timeout_s)
    backend = "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"
    try:
        store = _join_store(here)
        dist.init_process_group(backend, timeout=timeout, store=store, rank=here.rank, world_size=here.world_size)
    except (RuntimeError, ValueError) as error:
        raise MissingError(
            "the processes of this run did not find each other",
            {
                "this one": f"rank {here.rank} of {here.world_size} on {host}",
                "reason": " ".join(str(error).split())[:200],
            },
            why="Every one of them is needed for every step.",
            fix="Check that all were started, that every host reaches MASTER_ADDR, and that MASTER_PORT is free there.",
        ) from error
    return _make_groups(here, device_type, timeout, replicas, num_teachers)


def _check_division(world_size: int, replicas: int, num_teachers: int, device: int | None) -> None:
    num_trainers = world_size - num_teachers
    if num_trainers < 1:
        raise ConfigError(
            "no process is left for the student",
            {"processes": world_size, "teacher.ranks": num_teachers},
            why="The teacher's processes come out of those that are started.",
            fix="Start more processes, or set a lower teacher.ranks (null has the teacher beside the student).",
        )
    if num_trainers % replicas:
        raise ConfigError(
            f"{num_trainers} processes cannot hold {replicas} copies of the student",
            {"processes that train": num_trainers, "parallel.replicas": replicas},
            why="Each copy lies on as many processes as every other.",
            fix=f"Set parallel.replicas to a number that divides {num_trainers}, or start other processes.",
        )
    if world_size > 1 and device is not None:
        raise ConfigError(
            f"{world_size} processes cannot share one device",
            {"device": f"cuda:{device}", "processes": world_size},
            why="Each process takes the device of its number on its host.",
            fix="Set device=cuda or device=auto; CUDA_VISIBLE_DEVICES says which devices there are.",
        )


def _join_store(here: RankGroup) -> Store:
    """Returns the store where the processes exchange their addresses, once all have come, which may take longer than
    they wait for each other later.

    It is at a port that rank 0 opens, or at that of the `torchrun` that started them, which keeps what earlier attempts
    have written there. So keys begin with the attempt and with the number of the run. Nodes count attempts apart, so
    the attempt may not be part of a key in a store that rank 0 opens anew for each.

    Raises:
        RuntimeError: some did not come.
    """
    if here.world_size == 1:
        return HashStore()
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    of_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if (address, port) not in _stores:
        opens = here.rank == 0 and not of_torchrun
        _stores[address, port] = TCPStore(address, port, here.world_size, opens, JOIN_TIME, wait_for_workers=False)
    attempt = f"attempt {restart_count()} " if of_torchrun else ""
    store = PrefixStore(f"{attempt}entry {next(_entries)}", _stores[address, port])
    keys = [f"here {rank}" for rank in range(here.world_size)]
    store.set(keys[here.rank], socket.gethostname())
    try:
        store.wait(keys, JOIN_TIME)
    except RuntimeError as error:
        missing = [key.removeprefix("here ") for key in keys if not store.check([key])]
        raise RuntimeError(f"rank {', '.join(missing)} did not come in {JOIN_TIME}") from error
    return store


def restart_count() -> int:
    """Returns how often the `torchrun` of this node has started its processes again because one had failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") or 0)


def _make_groups(
    here: RankGroup, device_type: str, timeout: datetime.timedelta, replicas: int, num_teachers: int
) -> DistContext:
    """Makes all groups, in the same order in every process, as torch needs it."""
    world_size, num_trainers = here.world_size, here.world_size - num_teachers
    everyone = list(range(world_size))

    def cpu_group(ranks: list[int], time: datetime.timedelta) -> Any:
        return dist.new_group(ranks, timeout=time, backend="gloo")

    own = SINGLE_RANK
    for ranks in filter(None, (everyone[:num_trainers], everyone[num_trainers:])):
        copies = replicas if ranks[0] == 0 else 1
        mesh = _mesh(device_type, torch.tensor(ranks).view(copies, -1), here, timeout)
        groups = [cpu_group(ranks, time) for time in (timeout, SETUP_TIME, SETUP_TIME)]
        if here.rank in ranks:
            own = RankGroup(ranks.index(here.rank), len(ranks), here.local_rank, mesh, *groups)
    group, slow_group = cpu_group(everyone, timeout), cpu_group(everyone, SETUP_TIME)
    world = RankGroup(here.rank, world_size, here.local_rank, None, group, slow_group)
    requests, responses = None, None
    if num_teachers:  # the first request may be long in coming, a response may not
        requests, responses = cpu_group(everyone, SETUP_TIME), cpu_group(everyone, timeout)
    return DistContext(world, own, here.rank >= num_trainers, num_teachers, requests, responses)


def _mesh(device_type: str, grid: Tensor, here: RankGroup, timeout: datetime.timedelta) -> DeviceMesh | None:
    """Returns the mesh of some ranks [replicas, ranks of each], whose groups wait no longer than ``timeout``, and None
    in other ranks. A single replica has no dimension of its own."""
    if len(grid) == 1:
        grid = grid[0]
    own_groups = []
    for dimension in range(grid.ndim):
        for ranks in grid.movedim(dimension, -1).reshape(-1, grid.shape[dimension]).tolist():
            group = dist.new_group(ranks, timeout=timeout)
            if here.rank in ranks:
                own_groups.append(group)
    if not own_groups:
        return None
    if grid.ndim == 1:
        return DeviceMesh.from_group(own_groups[0], device_type, mesh_dim_names=("parts",))
    return DeviceMesh.from_group(own_groups, device_type, mesh=grid, mesh_dim_names=("replicas", "parts"))


def destroy_distributed() -> None:
    """Leaves the processes that were joined last; the same processes may then join again."""
    if dist.is_initialized():
        dist.destroy_process_group()


def launcher() -> str:
    """Returns a name of the process that started this one, which no other has at the same time."""
    return f"process {os.getppid()} of {socket.gethostname()}"


def began(out: str, launchers: Sequence[str]) -> bool:
    """Returns whether any of ``launchers`` began the run in ``out``: one node of a restarted run may be new."""
    path = Path(out) / "run.json"
    return path.is_file() and not set(launchers).isdisjoint(read_json(path).get("launchers", ()))

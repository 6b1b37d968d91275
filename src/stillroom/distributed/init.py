"""Meeting: how the processes that were started together find each other, and which of them trains and which teaches."""

import datetime
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


@dataclass(frozen=True)
class RankInfo:
    """What the starter of the processes says of this one."""

    rank: int
    world_size: int
    local_rank: int


def rank_info() -> RankInfo:
    """This process among those that were started together; alone where nobody says otherwise.

    Raises:
        ConfigError: what the environment says is not a number.
        MissingError: it does not say where they meet.
    """
    if os.environ.get("WORLD_SIZE", "") in ("", "0", "1"):
        return RankInfo(0, 1, 0)
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
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise MissingError(
            f"the environment does not say where the processes meet: {' and '.join(missing)} not set",
            {"RANK": values["RANK"], "WORLD_SIZE": values["WORLD_SIZE"]},
            why="They find each other through a port of the first one's host.",
            fix="Start the run with `torchrun`, which sets them; or set them to the first host's address and a free "
            "port.",
        )
    return RankInfo(values["RANK"], values["WORLD_SIZE"], values["LOCAL_RANK"])


@dataclass(frozen=True)
class DistContext:
    """All that were started together: first those that train the student, then those that run the teacher, if it has
    processes of its own."""

    world: RankGroup
    group: RankGroup
    """Those of this process's kind."""
    is_teacher: bool = False
    """Whether this process runs the teacher."""
    num_teachers: int = 0
    requests: dist.ProcessGroup | None = None
    """That carries questions to the teacher's processes."""
    responses: dist.ProcessGroup | None = None
    """That carries their answers."""

    @property
    def num_trainers(self) -> int:
        return self.world.world_size - self.num_teachers


MEETING_TIME = datetime.timedelta(minutes=10)
"""How long the first to come waits for the last: some may have to be given a machine first."""

SETTING_UP_TIME = datetime.timedelta(hours=24)
"""How long one process may take while the others wait, for what has no bound of its own."""

SINGLE_PROCESS = DistContext(SINGLE_RANK, SINGLE_RANK)


def init_distributed(
    device_type: str,
    *,
    timeout_s: float,
    sharded: bool,
    replicas: int = 1,
    num_teachers: int = 0,
    device: int | None = None,
) -> DistContext:
    """Joins the processes that were started together.

    Args:
        device_type: cpu or cuda, where tensors will lie: on CUDA each process takes the device of its local rank.
        sharded: whether anything is to be sharded, for which one process, too, needs a mesh.
        replicas: of the student.
        num_teachers: how many of the processes run the teacher.
        device: the number of the CUDA device of a process alone.

    Raises:
        ConfigError: so many processes cannot be divided so.
        MissingError: the others did not come, or there is no device for this one.
    """
    here = rank_info()
    try:
        _check_division(here.world_size, replicas, num_teachers)
        _check_device(here.world_size, device)
    except ConfigError as error:
        raise error if here.rank == 0 else ReportedElsewhere.of(error) from None
    if here.world_size == 1 and not sharded:
        return SINGLE_PROCESS
    if device_type == "cuda":
        _take_device(here, here.local_rank if device is None else device)
    timeout = datetime.timedelta(seconds=timeout_s)
    backend = "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"
    try:
        store = _meeting_place(here)
        _wait_for_all(here, store)
        dist.init_process_group(backend, timeout=timeout, store=store, rank=here.rank, world_size=here.world_size)
    except (RuntimeError, ValueError) as error:
        raise MissingError(
            "the processes of this run did not find each other",
            {
                "this one": f"rank {here.rank} of {here.world_size} on {socket.gethostname()}",
                "reason": " ".join(str(error).split())[:200],
            },
            why="Every one of them is needed for every step.",
            fix="Check that all were started, that MASTER_ADDR can be reached from every host, and that MASTER_PORT is "
            "free there.",
        ) from error
    return _divide(here, device_type, timeout, replicas, num_teachers)


def _check_division(world_size: int, replicas: int, num_teachers: int) -> None:
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


def _check_device(world_size: int, device: int | None) -> None:
    if world_size > 1 and device is not None:
        raise ConfigError(
            f"{world_size} processes cannot share one device",
            {"device": f"cuda:{device}", "processes": world_size},
            why="Each process takes the device of its number on its host.",
            fix="Set device=cuda or device=auto; CUDA_VISIBLE_DEVICES says which devices there are.",
        )


def _meeting_place(here: RankInfo) -> Store:
    """Where the processes tell each other their addresses: a port that the first opens, or that of the `torchrun` that
    has started them, which keeps what earlier attempts have told there.

    Nodes count attempts apart, so the number may not tell what the first process opens anew for each.
    """
    if here.world_size == 1:
        return HashStore()
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    of_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    opens = here.rank == 0 and not of_torchrun
    store = TCPStore(address, port, here.world_size, opens, MEETING_TIME, wait_for_workers=False)
    return PrefixStore(f"attempt {restart_count()}", store) if of_torchrun else store


def _wait_for_all(here: RankInfo, store: Store) -> None:
    """Returns when every process has come, which may take longer than they wait for each other later.

    Raises:
        RuntimeError: some did not.
    """
    keys = [f"here {rank}" for rank in range(here.world_size)]
    store.set(keys[here.rank], socket.gethostname())
    try:
        store.wait(keys, MEETING_TIME)
    except RuntimeError as error:
        missing = [key.removeprefix("here ") for key in keys if not store.check([key])]
        raise RuntimeError(f"rank {', '.join(missing)} did not come in {MEETING_TIME}") from error


def restart_count() -> int:
    """How often the `torchrun` of this node has started its processes again because one had failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") or 0)


def _take_device(here: RankInfo, number: int) -> None:
    if number >= torch.cuda.device_count():
        raise MissingError(
            f"there is no CUDA device for rank {here.rank} on {socket.gethostname()}",
            {"its number on this host": number, "CUDA devices": torch.cuda.device_count()},
            why="Each process needs a device of its own.",
            fix="Start as many processes on a host as it has devices (torchrun --nproc-per-node gpu).",
        )
    torch.cuda.set_device(number)
    torch.cuda.init()  # or the mesh would choose a device again


def _divide(
    here: RankInfo, device_type: str, timeout: datetime.timedelta, replicas: int, num_teachers: int
) -> DistContext:
    """Makes all groups, in the same order in every process."""
    world_size, num_trainers = here.world_size, here.world_size - num_teachers
    kinds = [range(num_trainers), range(num_trainers, world_size)] if num_teachers else [range(world_size)]
    found = {}
    for number, ranks in enumerate(kinds):
        copies = replicas if number == 0 else 1
        mesh = _mesh(device_type, torch.tensor(list(ranks)).view(copies, -1), here, timeout)
        group, slow_group, checkpoint_group = (
            _group(ranks, time) for time in (timeout, SETTING_UP_TIME, SETTING_UP_TIME)
        )
        for mine, rank in enumerate(ranks):
            found[rank] = RankGroup(mine, len(ranks), here.local_rank, mesh, group, slow_group, checkpoint_group)
    group, slow_group = _group(range(world_size), timeout), _group(range(world_size), SETTING_UP_TIME)
    world = RankGroup(here.rank, world_size, here.local_rank, None, group, slow_group)
    requests, responses = None, None
    if num_teachers:  # the first question may be long in coming, an answer not
        requests, responses = _group(range(world_size), SETTING_UP_TIME), _group(range(world_size), timeout)
    return DistContext(world, found[here.rank], here.rank >= num_trainers, num_teachers, requests, responses)


def _mesh(device_type: str, grid: Tensor, here: RankInfo, timeout: datetime.timedelta) -> DeviceMesh | None:
    """The mesh of some ranks [replicas, processes of each], whose groups wait no longer than ``timeout``; None in
    others. A single replica has no dimension of its own."""
    if len(grid) == 1:
        grid = grid[0]
    mine = []
    for dimension in range(grid.ndim):
        for ranks in grid.movedim(dimension, -1).reshape(-1, grid.shape[dimension]).tolist():
            group = dist.new_group(ranks, timeout=timeout)
            if here.rank in ranks:
                mine.append(group)
    if not mine:
        return None
    if grid.ndim == 1:
        return DeviceMesh.from_group(mine[0], device_type, mesh_dim_names=("parts",))
    return DeviceMesh.from_group(mine, device_type, mesh=grid, mesh_dim_names=("replicas", "parts"))


def _group(ranks: range, timeout: datetime.timedelta) -> Any:
    """A group for what lies on the CPU; all processes make it, also those that are not in it."""
    return dist.new_group(list(ranks), timeout=timeout, backend="gloo")


def destroy_distributed() -> None:
    """Leaves the processes that have met."""
    if dist.is_initialized():
        dist.destroy_process_group()


def launcher() -> str:
    """What has started this process, as no other is called at the same time."""
    return f"process {os.getppid()} of {socket.gethostname()}"


def began(out: str, launchers: Sequence[str]) -> bool:
    """Whether the run that lies there was begun by any of what has started these processes: one node may be new."""
    path = Path(out) / "run.json"
    return path.is_file() and not set(launchers).isdisjoint(read_json(path).get("launchers", ()))

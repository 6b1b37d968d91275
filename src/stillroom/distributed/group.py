"""The processes that train together, as one of them sees them: who they are, what they add up and what they agree on.

`torchrun` (and what starts processes as it does) tells each its rank, their number and where to meet. One process
alone is a special case, in which nothing is sent.
"""

import dataclasses
import hashlib
import json
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from stillroom.errors import MismatchError, ReportedElsewhere, StillroomError

T = TypeVar("T")


@dataclass(frozen=True)
class RankGroup:
    """Those that work on one thing together, of which this is number ``rank`` of ``size``, from 0."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    """Its number on its node."""
    mesh: DeviceMesh | None = None
    """On which parameters are sharded: [processes], or [replicas, processes of each]. None where there is one."""
    group: dist.ProcessGroup | None = None
    """That carries small things on the CPU."""
    slow_group: dist.ProcessGroup | None = None
    """The same for what may take one of them hours while the others wait: reading data, cutting a student."""
    checkpoint_group: dist.ProcessGroup | None = None
    """That of the threads that write checkpoints, who must not be mistaken for those that train."""

    @property
    def is_rank0(self) -> bool:
        """Whether this one writes files and talks."""
        return self.rank == 0

    def all_reduce_(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in the place of ``tensor``."""
        if self.world_size > 1:
            on_cpu = tensor.cpu()
            dist.all_reduce(on_cpu, group=self.group)
            tensor.copy_(on_cpu)
        return tensor

    def any_rank(self, flag: bool) -> bool:
        """Whether it is so in any process."""
        return flag if self.world_size == 1 else bool(self.all_reduce_(torch.tensor(float(flag))).item())

    def all_gather(self, value: T) -> list[T]:
        """What each process gave, in the order of their ranks."""
        if self.world_size == 1:
            return [value]
        found: list[Any] = [None] * self.world_size
        dist.all_gather_object(found, value, group=self.slow_group)
        return found

    def barrier(self) -> None:
        """Until all have come here."""
        if self.world_size > 1:
            dist.barrier(group=self.slow_group)

    @property
    def for_checkpoints(self) -> "RankGroup":
        """The same, as their threads that write checkpoints see each other."""
        return dataclasses.replace(self, group=self.checkpoint_group, slow_group=self.checkpoint_group)

    def shard(self, things: Sequence[T]) -> Sequence[T]:
        """This process's share of some work that each could do."""
        return things[self.rank :: self.world_size]

    def checkpoint_files(self, folder: Path) -> list[str]:
        """The files of a checkpoint that this process has written; the first has written what is about all."""
        if self.world_size == 1:
            return [path.name for path in folder.iterdir()]
        names = [path.name for path in folder.glob(f"__{self.rank}_*")]
        return [*names, ".metadata"] if self.is_rank0 else names

    def on_every_rank(self, make: Callable[[], T], same: Callable[[T], Mapping[str, object]] = lambda _: {}) -> T:
        """What each process makes, where none fails and all of ``same`` is the same in all.

        Raises:
            StillroomError: in the first process what failed in any, with its rank where it is not all; in the others
                that it is told there.
            MismatchError: they differ.
        """
        made, error = None, None
        try:
            made = make()
        except StillroomError as caught:
            error = caught
        if self.world_size == 1:
            if error is not None:
                raise error
            return made  # pyright: ignore[reportReturnType]
        facts = {} if error is not None else {k: _digest(v) for k, v in same(made).items()}  # pyright: ignore
        told = self.all_gather((error, facts, socket.gethostname()))
        failed = [(rank, e, host) for rank, (e, _, host) in enumerate(told) if e is not None]
        if failed:
            raise self._first_says(_with_ranks(failed, self.world_size))
        for name in facts:
            found = [facts[name] for _, facts, _ in told]
            if len(set(found)) > 1:
                raise self._first_says(_differ(name, found, [host for *_, host in told]))
        return made  # pyright: ignore[reportReturnType]

    def local_rank0_first(self, make: Callable[[], T]) -> T:
        """What each process makes, the first of each node before the others, so that these find its files."""
        if self.world_size == 1:
            return make()
        made, error = None, None
        for turn in (True, False):
            if turn == (self.local_rank == 0):  # the first of its node
                try:
                    made = make()
                except StillroomError as caught:
                    error = caught
            self.barrier()

        def give() -> T:
            if error is not None:
                raise error
            return made  # pyright: ignore[reportReturnType]

        return self.on_every_rank(give)

    def on_rank0(self, make: Callable[[], T]) -> T | None:
        """What the first process makes, while the others wait; None in these."""
        return self.on_every_rank(lambda: make() if self.is_rank0 else None)

    def _first_says(self, error: StillroomError) -> StillroomError:
        return error if self.is_rank0 else ReportedElsewhere.of(error)


def _digest(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
    return text if len(text) <= 60 else f"sha256 {hashlib.sha256(text.encode()).hexdigest()[:12]}"


def _with_ranks(failed: list[tuple[int, StillroomError, str]], world_size: int) -> StillroomError:
    """The error of the first that failed, which names the ranks where not all did."""
    _, error, _ = failed[0]
    if len(failed) < world_size:
        ranks = ", ".join(f"{rank} on {host}" for rank, _, host in failed[:4])
        error.values["in"] = f"{len(failed)} of {world_size} processes: rank {ranks}"
        error.args = (error.what,)
    return error


def _differ(name: str, found: list[str], hosts: list[str]) -> MismatchError:
    other = next(rank for rank, value in enumerate(found) if value != found[0])
    return MismatchError(
        f"the processes of this run have different {name}",
        {f"rank 0 on {hosts[0]}": found[0], f"rank {other} on {hosts[other]}": found[other]},
        why="They would train different things and add up their gradients.",
        fix="Start all with the same recipe, the same packages and the same files.",
    )


SINGLE_RANK = RankGroup()

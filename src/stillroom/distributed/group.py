"""RankGroup: the processes that work together, as one of them sees them. A single process sends nothing."""

import dataclasses
import hashlib
import json
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from stillroom.errors import MismatchError, ReportedElsewhere, StillroomError

T = TypeVar("T")


@dataclass(frozen=True)
class RankGroup:
    """The processes that work on one thing together, of which this is number ``rank`` of ``world_size``, from 0."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    """The number of this process on its node."""
    mesh: DeviceMesh | None = None
    """The mesh on which parameters are sharded: [ranks], or [replicas, ranks of each]. None where there is none."""
    group: dist.ProcessGroup | None = None
    """The group that carries small things on the CPU."""
    slow_group: dist.ProcessGroup | None = None
    """The same for what may take one process hours while the others wait: reading data, pruning a student."""
    checkpoint_group: dist.ProcessGroup | None = None
    """The group of the threads that write checkpoints, whose messages must not mix with those of training."""

    @property
    def is_rank0(self) -> bool:
        """Whether this process writes files and reports."""
        return self.rank == 0

    def all_reduce_(self, tensor: Tensor) -> Tensor:
        """Replaces ``tensor`` by its sum over all processes, and returns it. A tensor on a CUDA device is summed there,
        over one dimension of the mesh after the other, and the host does not wait for it."""
        if self.world_size > 1 and tensor.is_cuda and self.mesh is not None:
            for group in self.mesh.get_all_groups():
                dist.all_reduce(tensor, group=group)
        elif self.world_size > 1:
            on_cpu = tensor.cpu()
            dist.all_reduce(on_cpu, group=self.group)
            tensor.copy_(on_cpu)
        return tensor

    def any_rank(self, flag: bool) -> bool:
        """Returns whether the flag is set in any process."""
        return flag if self.world_size == 1 else bool(self.all_reduce_(torch.tensor(float(flag))).item())

    def all_gather(self, value: T) -> list[T]:
        """Returns what each process gave, in the order of their ranks."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.slow_group)
        return values

    def barrier(self) -> None:
        """Waits until all processes have come here."""
        if self.world_size > 1:
            dist.barrier(group=self.slow_group)

    @property
    def for_checkpoints(self) -> "RankGroup":
        """The same processes, as their threads that write checkpoints see each other."""
        return dataclasses.replace(self, group=self.checkpoint_group, slow_group=self.checkpoint_group)

    def shard(self, things: Sequence[T]) -> Sequence[T]:
        """Returns this process's share of some work that each could do."""
        return things[self.rank :: self.world_size]

    def on_every_rank(self, make: Callable[[], T], same: Callable[[T], Mapping[str, object]] = lambda _: {}) -> T:
        """Returns what ``make`` gives in this process, where it fails in none and ``same`` of it is equal in all.

        Raises:
            StillroomError: ``make`` failed in some process. Rank 0 raises that error, with the ranks where it is not
                all of them; the others raise ReportedElsewhere.
            MismatchError: they differ.
        """
        if self.world_size == 1:
            return make()
        made, error = None, None
        facts: dict[str, str] = {}
        try:
            made = make()
        except StillroomError as caught:
            error = caught
        else:
            for name, value in same(made).items():
                text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
                short = len(text) <= 60
                facts[name] = text if short else f"sha256 {hashlib.sha256(text.encode()).hexdigest()[:12]}"
        answers = self.all_gather((error, facts, socket.gethostname()))
        failed = [(rank, e, host) for rank, (e, _, host) in enumerate(answers) if e is not None]
        if failed:
            first = failed[0][1]
            if len(failed) < self.world_size:
                ranks = ", ".join(f"{rank} on {host}" for rank, _, host in failed[:4])
                first.values["in"] = f"{len(failed)} of {self.world_size} processes: rank {ranks}"
            raise first if self.is_rank0 else ReportedElsewhere.of(first)
        for name in facts:
            values = [facts[name] for _, facts, _ in answers]
            other = next((rank for rank, value in enumerate(values) if value != values[0]), None)
            if other is not None:
                mismatch = MismatchError(
                    f"the processes of this run have different {name}",
                    {f"rank {rank} on {answers[rank][2]}": values[rank] for rank in (0, other)},
                    why="They would train different things and add up their gradients.",
                    fix="Start all with the same recipe, the same packages and the same files.",
                )
                raise mismatch if self.is_rank0 else ReportedElsewhere.of(mismatch)
        return made  # pyright: ignore[reportReturnType]

    def local_rank0_first(self, make: Callable[[], T]) -> T:
        """Returns what each process makes, the first of each node before its others, so that these find its files."""

        def in_turn() -> T:
            if self.local_rank > 0:
                self.barrier()
                return make()
            try:
                made = make()
            except StillroomError:
                self.barrier()
                raise
            self.barrier()
            return made

        return self.on_every_rank(in_turn)

    def on_rank0(self, make: Callable[[], T]) -> T | None:
        """Returns what rank 0 makes while the others wait; None in these."""
        return self.on_every_rank(lambda: make() if self.is_rank0 else None)


SINGLE_RANK = RankGroup()

"""Several ranks in the threads of one process, which gather through a list in the place of `torch.distributed`."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor

from stillroom.distributed.group import RankGroup

T = TypeVar("T")


@dataclass(frozen=True)
class ThreadGroup(RankGroup):
    exchange: list[Any] = field(default_factory=list)
    meet: threading.Barrier = field(default_factory=lambda: threading.Barrier(1))

    def all_gather(self, value: T) -> list[T]:
        self.exchange[self.rank] = value
        self.meet.wait()
        values = list(self.exchange)
        self.meet.wait()
        return values

    def all_reduce_(self, tensor: Tensor) -> Tensor:
        return tensor.copy_(sum(self.all_gather(tensor.clone())))  # pyright: ignore

    def barrier(self) -> None:
        self.meet.wait()


def in_ranks(world_size: int, run: Callable[[RankGroup], object], local_ranks: list[int] | None = None) -> list[Any]:
    """What ``run`` gives in each rank, or the error that it raises there."""
    exchange, meet, results = [None] * world_size, threading.Barrier(world_size, timeout=60), [None] * world_size

    def work(rank: int) -> None:
        local_rank = rank if local_ranks is None else local_ranks[rank]
        group = ThreadGroup(rank, world_size, local_rank, exchange=exchange, meet=meet)
        try:
            results[rank] = run(group)  # pyright: ignore
        except BaseException as error:
            results[rank] = error  # pyright: ignore

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results

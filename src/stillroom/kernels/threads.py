"""Threads: rows of tensors divided among as many threads as torch uses, for kernels that release the GIL."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache

import torch
from torch import Tensor


def over_rows(kernel: Callable[..., None], *tensors: Tensor) -> None:
    """Calls ``kernel`` on NumPy views of the same rows of all tensors; each thread does a part of the rows.

    A tensor that the kernel fills in has contiguous rows; others may be copied.
    """
    arrays = [(x if x.ndim == 1 or x.stride(-1) == 1 else x.contiguous()).detach().numpy() for x in tensors]
    num_rows = len(arrays[0])
    parts = max(1, min(torch.get_num_threads(), num_rows))
    edges = [num_rows * i // parts for i in range(parts + 1)]

    def part(start: int, stop: int) -> None:
        kernel(*(array[start:stop] for array in arrays))

    others = [_pool(os.getpid()).submit(part, *edges[i : i + 2]) for i in range(1, parts)]
    try:
        part(edges[0], edges[1])
    finally:
        wait(others)  # or one could still work on tensors that the caller believes free
    for other in others:
        other.result()  # raises the error of a part


@cache
def _pool(_process: int) -> ThreadPoolExecutor:  # kept: it is cached
    """The pool of a process; a forked one inherits no threads."""
    return ThreadPoolExecutor(64, thread_name_prefix="stillroom-rows")

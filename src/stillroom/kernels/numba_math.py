"""Parts of all kernels on a CPU: exponentials, logarithms and softmax of a row of float32, and threads that share the
rows. Needs numba.

Loops go by index, branches are choices between values, and the largest of a row is found in integers, so that all of it
is compiled to vector instructions. Sums are reassociated within a tile of a row, and added up in float64 over tiles.
Polynomials are those of the Cephes library, good to about one unit in the last place.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache

import numpy as np
import torch
from numba import njit
from torch import Tensor

from stillroom import kernels

OPTIONS = {"cache": True, "nogil": True, "error_model": "numpy"}
INNER = {**OPTIONS, "_nrt": False, "fastmath": False}  # else a caller's
SCALAR = {**INNER, "forceinline": True}
EXACT = {**SCALAR, "fastmath": {"contract"}}
COPY = {**INNER, "fastmath": {"contract"}}
SUMS = {**INNER, "fastmath": {"reassoc", "nsz", "contract"}}
TILE = 4096
"""The number of logits whose summands are added up in float32."""
f32, i32 = np.float32, np.int32
LOWEST_LOGIT = f32(kernels.LOWEST_LOGIT)
LOWEST = f32(-87.33)
"""The exponential of anything below is taken as 0; it would be below the least normal number."""
HIGHEST = f32(40)
"""The most that a logit may be above the reference of the exponentials."""
ROUND = f32(1.5 * 2**23)
"""Added to a small number and subtracted again, it leaves the nearest integer, whose bits are the last of the sum."""
LEAST = f32(1.1754944e-38)
LOG2_E, LN_2_HIGH, LN_2_LOW, SQRT_HALF = f32(1.44269504), f32(0.693359375), f32(-2.12194440e-4), f32(0.70710678)


@njit(**EXACT)
def split(x):
    """Returns ``2^i`` and ``exp(r) − 1`` for ``x = i ln 2 + r`` with an integer i and a small r."""
    z = x * LOG2_E + ROUND
    i = z - ROUND
    scale = i32((i32(f32(z).view(np.int32)) << i32(23)) + i32(0x3F800000)).view(np.float32)
    r = x - i * LN_2_HIGH
    r = r - i * LN_2_LOW
    p = f32(1.9875691500e-4)
    p = p * r + f32(1.3981999507e-3)
    p = p * r + f32(8.3334519073e-3)
    p = p * r + f32(4.1665795894e-2)
    p = p * r + f32(1.6666665459e-1)
    p = p * r + f32(5.0000001201e-1)
    return scale, p * r * r + r


@njit(**EXACT)
def exp(x):
    """The exponential of a number of at most 88."""
    scale, less_one = split(LOWEST if x < LOWEST else x)  # NaN stays NaN
    e = less_one * scale + scale
    return f32(0) if x < LOWEST else e


@njit(**EXACT)
def expm1(x):
    """``exp(x) − 1`` of a number of at most 88."""
    scale, less_one = split(LOWEST if x < LOWEST else x)
    return less_one * scale + (scale - f32(1))


@njit(**EXACT)
def log1p(x):
    """``log(1 + x)`` of a number from −1 to 0; at −1, the logarithm of the least normal number."""
    u = f32(1) + x
    lost = x - (u - f32(1))
    u = u if u > LEAST else LEAST
    bits = f32(u).view(np.int32)
    e = f32(i32(bits >> i32(23)) - i32(126))
    m = i32((bits & i32(0x007FFFFF)) | i32(0x3F000000)).view(np.float32)  # u = m 2^e, ½ ≤ m < 1
    low = m < SQRT_HALF
    e = e - f32(1) if low else e
    m = m + m - f32(1) if low else m - f32(1)
    p = f32(7.0376836292e-2)
    p = p * m + f32(-1.1514610310e-1)
    p = p * m + f32(1.1676998740e-1)
    p = p * m + f32(-1.2420140846e-1)
    p = p * m + f32(1.4249322787e-1)
    p = p * m + f32(-1.6668057665e-1)
    p = p * m + f32(2.0000714765e-1)
    p = p * m + f32(-2.4999993993e-1)
    p = p * m + f32(3.3333331174e-1)
    square = m * m
    y = p * m * square + e * LN_2_LOW - f32(0.5) * square
    return (m + y) + e * LN_2_HIGH + lost / u


@njit(**SCALAR)
def ordered(bits):
    """Integers in the order of the floating-point numbers with these bits; it is its own inverse."""
    return i32(bits ^ i32((bits >> i32(31)) & i32(0x7FFFFFFF)))


@njit(**INNER)
def largest(row):
    bits = row.view(np.int32)
    most = ordered(bits[0])
    for j in range(len(bits)):
        most = max(most, ordered(bits[j]))
    return i32(ordered(most)).view(np.float32)


@njit(**SCALAR)
def finite(logit):
    return LOWEST_LOGIT if logit < LOWEST_LOGIT else logit


@njit(**SCALAR)
def shifted(logit, scale, most):
    return finite(logit) * scale - most


@njit(**SUMS)
def exponentials(row, bits, scale, reference, out):
    """``exp(scale · row − reference)`` of a tile; returns the sum, and the largest ``ordered`` bits."""
    total, top = f32(0), ordered(bits[0])
    for j in range(len(row)):
        e = exp(shifted(row[j], scale, reference))
        out[j] = e
        total += e
        top = max(top, ordered(bits[j]))
    return total, top


@njit(**INNER)
def all_exponentials(row, scale, reference, out):
    """The same for the whole row; returns the largest as a number."""
    bits, total, top = row.view(np.int32), 0.0, ordered(i32(f32(-np.inf).view(np.int32)))
    for start in range(0, len(row), TILE):
        here = slice(start, start + TILE)
        of_tile, top_of_tile = exponentials(row[here], bits[here], scale, reference, out[here])
        total += of_tile
        top = max(top, top_of_tile)
    return total, i32(ordered(i32(top))).view(np.float32)


@njit(**INNER)
def softmax(row, scale, out, whole):
    """The softmax of ``scale · row``, into ``out``; returns reference, log_sum and factor.

    The logarithm of the softmax is ``(scale · row − reference) − log_sum``. Unless ``whole``, ``out`` has yet to be
    multiplied by the factor. The reference is the largest of the first tile, so that the row is read from memory only
    once; where others are much larger, the exponentials are computed again.
    """
    reference = finite(largest(row[:TILE])) * scale
    total, top = all_exponentials(row, scale, reference, out)
    if not shifted(top, scale, reference) < HIGHEST:
        reference = finite(top) * scale
        total, _ = all_exponentials(row, scale, reference, out)
    log_sum = f32(np.log(total))
    factor = f32(np.exp(-np.float64(log_sum)))  # from the rounded sum, so that logs and probabilities agree
    if not whole:
        return reference, log_sum, factor
    for j in range(len(out)):
        out[j] *= factor
    return reference, log_sum, f32(1)


@njit(**SUMS)
def sum_of(row):
    """The sum of a tile."""
    total = f32(0)
    for j in range(len(row)):
        total += row[j]
    return total


def over_rows(kernel: Callable[..., None], *tensors: Tensor) -> None:
    """Calls ``kernel``, which releases the GIL, on NumPy views of the same rows of all tensors, in as many threads as
    torch uses; each does a part of the rows.

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

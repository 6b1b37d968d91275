"""Exponentials, logarithms and softmax of a row of float32, for kernels on a CPU. Needs numba.

Loops go by index, branches are choices between values, and the largest of a row is found in integers: so all of it is
compiled to vector instructions. Sums are reassociated within a stretch of columns, and added up in float64 over
stretches. Polynomials are those of the Cephes library, good to about one unit in the last place.
"""

import numpy as np
from numba import njit

from stillroom.kernels import terms

INNER = {"cache": True, "nogil": True, "error_model": "numpy", "_nrt": False, "fastmath": False}  # else a caller's
SCALAR = {**INNER, "forceinline": True}
EXACT = {**SCALAR, "fastmath": {"contract"}}
COPY = {**INNER, "fastmath": {"contract"}}
SUMS = {**INNER, "fastmath": {"reassoc", "nsz", "contract"}}
STRETCH = 4096
"""Columns whose summands are added up in float32."""

f32, i32 = np.float32, np.int32
LOWEST_LOGIT = f32(terms.LOWEST_LOGIT)
LOWEST = f32(-87.33)
"""The exponential of anything below is taken for 0; it would be below the least normal number."""
LEAST = f32(1.1754944e-38)
LOG2_E, LN_2_HIGH, LN_2_LOW, SQRT_HALF = f32(1.44269504), f32(0.693359375), f32(-2.12194440e-4), f32(0.70710678)


@njit(**SCALAR)
def two_to(i):
    return i32((i + i32(127)) << i32(23)).view(np.float32)


@njit(**EXACT)
def split(x):
    """``x = i ln 2 + r`` with a whole number i and a small r; and ``exp(r) − 1``."""
    i = i32(x * LOG2_E + (f32(0.5) if x > f32(0) else f32(-0.5)))
    r = x - f32(i) * LN_2_HIGH
    r = r - f32(i) * LN_2_LOW
    p = f32(1.9875691500e-4)
    p = p * r + f32(1.3981999507e-3)
    p = p * r + f32(8.3334519073e-3)
    p = p * r + f32(4.1665795894e-2)
    p = p * r + f32(1.6666665459e-1)
    p = p * r + f32(5.0000001201e-1)
    return i, p * r * r + r


@njit(**EXACT)
def exp(x):
    """Of a number of at most 88."""
    inside = LOWEST if x < LOWEST else x  # what is not a number stays so
    i, less_one = split(inside)
    e = (less_one + f32(1)) * two_to(i)
    return f32(0) if x < LOWEST else e


@njit(**EXACT)
def expm1(x):
    """Of a number of at most 88."""
    i, less_one = split(LOWEST if x < LOWEST else x)
    scale = two_to(i)
    return less_one * scale + (scale - f32(1))


@njit(**EXACT)
def log1p(x):
    """Of a number from −1 to 0; at −1 it counts as the least normal number's."""
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
    """Integers in the order of the floating-point numbers that the bits stand for; its own inverse."""
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
def exponentials(row, scale, most, out):
    """``exp(scale · row − most)`` of a stretch; returns the sum."""
    total = f32(0)
    for j in range(len(row)):
        e = exp(shifted(row[j], scale, most))
        out[j] = e
        total += e
    return total


@njit(**INNER)
def softmax(row, scale, out):
    """Of ``scale · row``, into ``out``; its logarithm is ``(scale · row − most) − log_sum`` with what it returns."""
    most, total = finite(largest(row)) * scale, 0.0
    for start in range(0, len(row), STRETCH):
        total += exponentials(row[start : start + STRETCH], scale, most, out[start : start + STRETCH])
    log_sum = f32(np.log(total))
    factor = f32(np.exp(-np.float64(log_sum)))  # of the rounded sum: so that logs and probabilities agree
    for j in range(len(out)):
        out[j] *= factor
    return most, log_sum

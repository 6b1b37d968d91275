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

HIGHEST = f32(40)
"""So much may a logit be above what exponentials are taken from."""

ROUND = f32(1.5 * 2**23)
"""Added to a small number and taken away again, it leaves the nearest whole one, whose bits are the last of the sum."""

LEAST = f32(1.1754944e-38)

LOG2_E, LN_2_HIGH, LN_2_LOW, SQRT_HALF = f32(1.44269504), f32(0.693359375), f32(-2.12194440e-4), f32(0.70710678)


@njit(**EXACT)
def split(x):
    """Of ``x = i ln 2 + r`` with a whole number i and a small r: ``2^i`` and ``exp(r) − 1``."""
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
    """Of a number of at most 88."""
    scale, less_one = split(LOWEST if x < LOWEST else x)  # what is not a number stays so
    e = less_one * scale + scale
    return f32(0) if x < LOWEST else e


@njit(**EXACT)
def expm1(x):
    """Of a number of at most 88."""
    scale, less_one = split(LOWEST if x < LOWEST else x)
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
def exponentials(row, bits, scale, reference, out):
    """``exp(scale · row − reference)`` of a stretch; returns the sum, and the largest ``ordered`` bits."""
    total, top = f32(0), ordered(bits[0])
    for j in range(len(row)):
        e = exp(shifted(row[j], scale, reference))
        out[j] = e
        total += e
        top = max(top, ordered(bits[j]))
    return total, top


@njit(**INNER)
def all_exponentials(row, scale, reference, out):
    """The same of the whole row; the largest as a number."""
    bits, total, top = row.view(np.int32), 0.0, ordered(i32(f32(-np.inf).view(np.int32)))
    for start in range(0, len(row), STRETCH):
        here = slice(start, start + STRETCH)
        of_stretch, top_of_stretch = exponentials(row[here], bits[here], scale, reference, out[here])
        total += of_stretch
        top = max(top, top_of_stretch)
    return total, i32(ordered(i32(top))).view(np.float32)


@njit(**INNER)
def softmax(row, scale, out, whole):
    """Of ``scale · row``, into ``out``; its logarithm is ``(scale · row − reference) − log_sum`` with what it returns.

    Where it is not to be ``whole``, the factor that it returns is yet to be multiplied with. The reference is the
    largest of the first stretch: so the row is read from memory while its exponentials are taken, and not before.
    Where others are much larger, they are taken anew.
    """
    reference = finite(largest(row[:STRETCH])) * scale
    total, top = all_exponentials(row, scale, reference, out)
    if not shifted(top, scale, reference) < HIGHEST:
        reference = finite(top) * scale
        total, _ = all_exponentials(row, scale, reference, out)
    log_sum = f32(np.log(total))
    factor = f32(np.exp(-np.float64(log_sum)))  # of the rounded sum: so that logs and probabilities agree
    if not whole:
        return reference, log_sum, factor
    for j in range(len(out)):
        out[j] *= factor
    return reference, log_sum, f32(1)

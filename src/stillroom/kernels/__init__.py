"""Kernels: compiled functions that pass over each row of logits once; for CUDA in Triton, for a CPU in numba.

What they compute is defined on tensors, by ``losses`` and ``selection.py``, and they take their place where they can.
They are given names and numbers, and know nothing of losses, signals or settings.
"""

from typing import NamedTuple

LOWEST_LOGIT = -1e30
"""Stands for −inf: its probability is 0 too, but 0 · (−1e30) is 0 where 0 · (−inf) is not a number."""
MEASURES = ("student_entropy", "teacher_entropy", "top1_agreement", "accepted_mass", "teacher_cross_entropy")
"""The measures that every kernel gives, in this order."""


class Term(NamedTuple):
    """A loss with its numbers."""

    name: str
    """Its name in ``LOSSES``."""
    temperature: float = 1.0
    a: float = 0.0
    """beta of Jensen-Shannon, alpha of the skewed and the α-β divergences, mu of adaptive KL, smoothing."""
    b: float = 0.0
    """beta of the α-β divergence."""

"""Kernels: compiled functions that pass over each row of logits once. cuda.py by Triton, all others by numba.

What they do is defined on tensors, by losses/ and selection.py, in whose place they come where they can. They are told
names and numbers, and know no losses, signals or settings.
"""

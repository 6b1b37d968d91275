"""How exact the losses are on a device: the parts `kernels` and `bfloat16` of benchmarks/gpu.py."""

from importlib.util import find_spec
from typing import Any
from unittest import mock

import torch
from formulas import FORMULAS, values
from loss_jobs import ARGUMENTS, NEEDS_NO_TEACHER, Problem, problem
from losses import clear, furthest, step
from torch import Tensor

from stillroom.losses.config import LOSSES
from stillroom.losses.fused_linear import kernel_terms
from stillroom.losses.objective import Objective

VOCABULARY = 151_936
FLOAT32_BAR, BFLOAT16_BAR = 1e-4, 1e-2
"""The largest relative error of a loss or gradient in float32, and of a loss of bfloat16 hidden states."""
CASES = [
    (name, temperature)
    for name in LOSSES
    if name in FORMULAS or name == NEEDS_NO_TEACHER
    for temperature in ((1.0, 2.0) if "temperature" in LOSSES[name].settings.model_fields else (1.0,))
]
"""Every loss that has a formula, and its temperatures."""


def objective(name: str, temperature: float) -> Objective:
    tempered = {} if temperature == 1 else {"temperature": temperature}
    return Objective(name, LOSSES[name].load(), 1.0, {**ARGUMENTS.get(name, {}), **tempered})


def in_float64(p: Problem) -> Problem:
    student, head = (x.detach().double().requires_grad_() for x in p.trained)
    return Problem(student, head, p.teacher.double(), p.teacher_head.double(), p.labels)


def by_formula(p: Problem, name: str, temperature: float) -> Tensor:
    """The mean over positions; a loss at temperature T is T² times that of the divided logits."""
    student, teacher = p.student @ p.head.T / temperature, p.teacher @ p.teacher_head.T / temperature
    return temperature**2 * values(name, teacher, student, p.labels, **ARGUMENTS.get(name, {})).mean()


def relative(found: Tensor, exact: Tensor) -> float:
    return float(abs(found.double() - exact.double()) / abs(exact.double()))


def judged(p: Problem, found: dict[str, Any], bar: float) -> dict[str, Any]:
    """The errors with their bar and the cases that miss it; an error that is not a number misses it too."""
    for case, errors in found.items():
        print(f"  {case:26}{', '.join(f'{k} {v:.1e}' if isinstance(v, float) else v for k, v in errors.items())}")
    missed = [case for case, e in found.items() if not (e["loss_error"] <= bar and e.get("gradient_error", 0.0) <= bar)]
    result = {"positions": len(p.student), "vocabulary": len(p.head), "bar": bar, "of": found}
    return result | ({"error": f"beyond {bar:g}: {'; '.join(missed)}"} if missed else {})


def kernels(device: str, small: bool) -> dict[str, Any]:
    if not find_spec("triton"):
        return {"skipped": "triton is not installed"}
    if device == "cpu":
        interpret()
    p = problem(3, 50, hidden=8, teacher_hidden=12, device=device) if small else problem(64, VOCABULARY, device=device)
    exact, found = in_float64(p), {}
    for name, temperature in CASES:
        one = objective(name, temperature)
        terms = kernel_terms([one], (), p.dense(), dtype=torch.float32, device=p.student.device)
        right = step(lambda name=name, temperature=temperature: by_formula(exact, name, temperature))
        loss = step(lambda one=one: p.losses([one], p.dense()).total)
        found[f"{name}, T={temperature:g}"] = {
            "by": "tensors" if terms is None else "Triton",
            "loss_error": relative(loss, right),
            "gradient_error": furthest(p, exact),
        }
        clear(p)
        clear(exact)
    return judged(p, found, FLOAT32_BAR)


def interpret() -> None:
    """Puts the interpreted Triton kernel in the place of numba's, which `linear_losses` uses on a CPU."""
    from stillroom.kernels import numba_fused, triton_fused

    def fused(student, teacher, labels, terms, weights, *, gradient, **_):
        return triton_fused.fused(student, teacher, labels, terms, weights, gradient=gradient)

    mock.patch.object(numba_fused, "fused", fused).start()
    mock.patch.object(numba_fused, "KINDS", triton_fused.KINDS).start()


@torch.no_grad()
def bfloat16(device: str, small: bool) -> dict[str, Any]:
    p, found = problem(16 if small else 256, 500 if small else VOCABULARY, device=device), {}
    half = Problem(*(x.bfloat16() for x in (*p.trained, p.teacher, p.teacher_head)), p.labels)
    exact = in_float64(half)
    for name, temperature in CASES:
        of_float32, ours = (x.losses([objective(name, temperature)], x.dense()).total for x in (p, half))
        found[f"{name}, T={temperature:g}"] = {
            "against_float32": relative(ours, of_float32),
            "loss_error": relative(ours, by_formula(exact, name, temperature)),
        }
    return judged(p, found, BFLOAT16_BAR)

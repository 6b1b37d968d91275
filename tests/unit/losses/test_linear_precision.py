"""The fused head and divergence: narrow types in, float32 sums, against float64 of the same numbers."""

import pytest
import torch
from reference import (
    DIVERGENCES,
    Problem,
    every_case_not_saturated,
    naive_total,
    objective,
    problem,
    relative_error,
)

from stillroom import lm_head as head_module
from stillroom.lm_head import LMHead
from stillroom.losses.fused_linear import linear_losses
from stillroom.signals import Dense


def wide_gradients(p: Problem, objectives: list, vocab_size: int | None = None, **transformation: float):
    """The naive float64 total and gradients of what the narrow numbers say."""
    hidden, weight, bias = leaves = [x.detach().double().requires_grad_() for x in p.leaves]
    head = LMHead(weight, bias, **transformation)
    total = naive_total(hidden, head, objectives, p.labels, p.weights, p.signal, vocab_size)
    return total, torch.autograd.grad(total, leaves)


def near_teacher(dtype: torch.dtype, columns: int = 2000, n: int = 12, apart: float = 0.05) -> Problem:
    """A student that has nearly become its teacher: the divergence is small, and rounding shows."""
    p = problem(n=n, columns=columns, width=16, dtype=dtype)
    g = torch.Generator().manual_seed(1)
    noise = torch.randn(p.weight.shape, generator=g, dtype=torch.float64) * apart
    teacher = LMHead((p.weight.detach().double() + noise).to(dtype), p.bias.detach())
    p.signal = Dense(p.hidden.detach(), teacher)
    return p


@every_case_not_saturated
def test_float32_gradient_is_within_1e_5(name, arguments):
    p = problem(n=12, columns=2000, width=16, dtype=torch.float32)
    o = [objective(name, **arguments)]
    total, wanted = wide_gradients(p, o, softcap=20.0)
    found = linear_losses(p.hidden, p.head(softcap=20.0), o, p.labels, p.weights, p.signal)
    assert found.total.dtype == found.nats.dtype == torch.float32
    assert relative_error(found.total.detach(), total.detach()) <= 1e-5
    for a, b in zip(p.gradients(found.total), wanted, strict=True):
        assert a.dtype == torch.float32
        assert relative_error(a, b) <= 1e-5


@every_case_not_saturated
@pytest.mark.parametrize("near", [True, False])
def test_bfloat16_gradient_is_within_1_percent_and_no_divergence_is_negative(name, arguments, near):
    """A softmax in bfloat16 gives negative divergences and gradients 4 to 23 % off."""
    p = near_teacher(torch.bfloat16) if near else problem(n=12, columns=2000, width=16, dtype=torch.bfloat16)
    o = [objective(name, **arguments)]
    total, wanted = wide_gradients(p, o)
    found = linear_losses(p.hidden, p.head(), o, p.labels, p.weights, p.signal, chunk_bytes=100_000)
    assert found.total.dtype == found.nats.dtype == torch.float32
    assert (found.nats >= 0).all()
    assert relative_error(found.total.detach(), total.detach()) <= 1e-4
    for a, b in zip(p.gradients(found.total), wanted, strict=True):
        assert a.dtype == torch.bfloat16
        assert relative_error(a, b) <= 1e-2


@pytest.mark.parametrize("name", ["forward_kl", "cross_entropy"])
def test_sums_over_many_positions_are_held_in_float32(name):
    """The head's gradient adds up all positions; sums in bfloat16 stop growing after a few hundred."""
    p, o = problem(n=600, columns=7, width=3, dtype=torch.bfloat16), [objective(name)]
    _, wanted = wide_gradients(p, o)
    found = linear_losses(p.hidden, p.head(), o, p.labels, p.weights, p.signal, chunk_bytes=7 * 4 * 2)
    for a, b in zip(p.gradients(found.total), wanted, strict=True):
        assert relative_error(a, b) <= 1e-2


@pytest.mark.parametrize("tile_rows", [1, 5, 13, 100])
def test_tiles_of_a_narrow_weight_change_nothing(tile_rows, monkeypatch):
    p, o = problem(dtype=torch.bfloat16, teacher_columns=16), [objective("reverse_kl"), objective("cross_entropy")]
    found = linear_losses(p.hidden, p.head(), o, p.labels, p.weights, p.signal, vocab_size=12)
    wanted = [found.nats, *p.gradients(found.total)]
    monkeypatch.setattr(head_module, "TILE_ROWS", tile_rows)
    tiled = linear_losses(p.hidden, p.head(), o, p.labels, p.weights, p.signal, vocab_size=12)
    for a, b in zip([tiled.nats, *p.gradients(tiled.total)], wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2 if a.dtype == torch.bfloat16 else 1e-5, atol=1e-6)


@pytest.mark.parametrize("teacher_dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_teacher_and_student_may_differ_in_type(dtype, teacher_dtype):
    p, o = problem(dtype=dtype), [objective("forward_kl"), objective("reverse_kl", temperature=2.0)]
    p.signal = problem(dtype=teacher_dtype, seed=1).signal
    total, wanted = wide_gradients(p, o)
    found = linear_losses(p.hidden, p.head(), o, p.labels, p.weights, p.signal)
    assert relative_error(found.total.detach(), total.detach()) <= 1e-5
    for a, b, x in zip(p.gradients(found.total), wanted, p.leaves, strict=True):
        assert a.dtype == x.dtype
        assert relative_error(a, b) <= (1e-2 if dtype == torch.bfloat16 else 1e-5)


@every_case_not_saturated
def test_autocast_multiplies_in_bfloat16_and_keeps_the_gradients_of_float32_weights(name, arguments):
    p, o = problem(n=12, columns=300, width=16, dtype=torch.float32), [objective(name, **arguments)]
    with torch.autocast("cpu", torch.bfloat16):
        found = linear_losses(p.hidden, p.head(softcap=20.0), o, p.labels, p.weights, p.signal)
    gradients = p.gradients(found.total)
    assert found.nats.dtype == torch.float32
    assert [g.dtype for g in gradients] == [torch.float32] * 3

    p.hidden, p.weight = (x.detach().bfloat16().requires_grad_() for x in (p.hidden, p.weight))
    total, wanted = wide_gradients(p, o, softcap=20.0)
    assert relative_error(found.total.detach(), total.detach()) <= 1e-4
    for a, b in zip(gradients, wanted, strict=True):
        assert relative_error(a, b) <= 1e-2
    assert (gradients[1] != gradients[1].bfloat16().float()).any()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_autocast_of_a_student_equal_to_its_teacher(name):
    """Both have come through autocast: the hidden states are bfloat16, the heads' weights float32."""
    p = problem(dtype=torch.float32)
    hidden = p.hidden.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        signal = Dense(hidden.detach(), LMHead(p.weight.detach().bfloat16(), p.bias.detach()))
        found = linear_losses(hidden, p.head(), [objective(name)], p.labels, p.weights, signal)
    assert (found.nats == 0).all()
    assert all((g == 0).all() for g in torch.autograd.grad(found.total, (hidden, p.weight, p.bias)))

"""What holds for every distance between hidden states. The formulas are in distances.py."""

import pytest
import torch
from distances import (
    LENGTHS,
    NAMES,
    documents_of,
    every_distance,
    naive,
    random_states,
    values,
    values_and_gradients,
)
from torch.autograd import gradcheck

from stillroom.losses.config import DISTANCES

KLS = ("channel_kl", "attention_relation")


def near(name: str, teacher, by: float, dtype: torch.dtype = torch.float64):
    noise = random_states(name, [len(teacher[0])], teacher[0].shape[1], seed=9)
    return [(t.double() + by * x).to(dtype) for t, x in zip(teacher, noise, strict=True)]


def test_the_table_has_every_distance():
    assert set(NAMES) == set(DISTANCES)


@every_distance
def test_equals_the_naive_formula_and_its_gradient(name):
    student, teacher = (random_states(name, seed=seed) for seed in (0, 1))
    for x in student:
        x.requires_grad_()
    wanted = naive(name, student, teacher)
    counts = torch.linspace(0.5, 2.0, len(wanted), dtype=torch.float64)
    wanted_gradients = torch.autograd.grad((wanted * counts).sum(), student)
    found, gradients = values_and_gradients(name, student, teacher)
    torch.testing.assert_close(found, wanted.detach(), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(gradients, wanted_gradients, rtol=1e-11, atol=1e-12)


@every_distance
def test_gradcheck(name):
    lengths = (4, 1) if name == "attention_relation" else (4, 9, 1)
    student, teacher = (random_states(name, lengths, seed=seed) for seed in (2, 3))
    for x in student:
        x.requires_grad_()
    assert gradcheck(lambda *x: values(name, x, teacher, lengths), student)


@every_distance
@pytest.mark.parametrize("apart", [1e-4, 1e-2, 1.0])
def test_float32_does_not_drown_a_small_distance_in_rounding(name, apart):
    """1 − cos and 1 − CKA as they are written would lose it below 1e-7; a KL is exact to a rounding of 1."""
    teacher = random_states(name, width=64, dtype=torch.float32)
    student = near(name, teacher, apart, torch.float32)
    found = values(name, student, teacher)
    assert found.dtype == torch.float32
    torch.testing.assert_close(
        found.double(), naive(name, student, teacher), rtol=3e-3, atol=2e-7 if name in KLS else 1e-13
    )


@every_distance
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_exactly_0_with_a_gradient_of_exactly_0_where_equal(name, dtype):
    """Also of states with a channel far larger than all others."""
    states = random_states(name, dtype=dtype)
    for x in states:
        x[:, 2] *= 1e3
    found, gradients = values_and_gradients(name, states, states)
    assert torch.equal(found, torch.zeros_like(found))
    for gradient in gradients:
        assert torch.equal(gradient, torch.zeros_like(gradient))


@every_distance
def test_a_document_knows_nothing_of_the_others(name):
    """So a batch may be split between any two of them."""
    student, teacher = (random_states(name, seed=seed) for seed in (4, 5))
    whole, gradients = values_and_gradients(name, student, teacher)
    counts = torch.linspace(0.5, 2.0, len(whole), dtype=torch.float64)
    edges = [0, *torch.tensor(LENGTHS).cumsum(0).tolist()]
    for first, end in ((0, 1), (1, 3), (2, 3), (2, 6), (5, 6)):
        some = slice(edges[first], edges[end])
        ours = [x[some].detach().requires_grad_() for x in student]
        found = values(name, ours, [x[some] for x in teacher], LENGTHS[first:end])
        torch.testing.assert_close(found, whole[some], rtol=1e-12, atol=1e-14)
        own = torch.autograd.grad((found * counts[some]).sum(), ours)
        torch.testing.assert_close(own, tuple(g[some] for g in gradients), rtol=1e-12, atol=1e-14)


@every_distance
def test_another_document_changes_nothing(name):
    student, teacher = (random_states(name, seed=seed) for seed in (4, 5))
    before = values(name, student, teacher)
    others = documents_of(LENGTHS) == 2
    changed = [torch.where(others.unsqueeze(1), 100 * x.abs(), x) for x in student]
    after = values(name, changed, teacher)
    assert torch.equal(after[~others], before[~others])
    assert not torch.equal(after[others], before[others])


@every_distance
def test_no_positions(name):
    empty = random_states(name, ())
    found, gradients = values_and_gradients(name, empty, empty, ())
    assert found.shape == (0,)
    assert all(gradient.shape == (0, 6) for gradient in gradients)


@every_distance
@pytest.mark.parametrize("case", ["opposite", "massive channel", "massive channel in the student", "zeros in both"])
def test_finite_at_extremes(name, case):
    student, teacher = (random_states(name, dtype=torch.float32, seed=seed) for seed in (6, 7))
    for s, t in zip(student, teacher, strict=True):
        if case == "opposite":
            t[:] = 1e4 * t.sign()
            s[:] = -t.roll(1, 0)
            s[:, 0] *= -1
        elif case == "zeros in both":
            s[::2], t[::3] = 0, 0
        else:
            s[:, 1] = 1e6
            if case == "massive channel":
                t[:, 1] = 1e6 + s[:, 0]
    found, gradients = values_and_gradients(name, student, teacher)
    assert found.isfinite().all()
    assert (found >= 0).all()
    assert found.sum() > 0 or case == "massive channel"
    assert all(gradient.isfinite().all() for gradient in gradients)


@every_distance
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("row", [5, 6, 9, 14])
def test_a_state_that_is_not_a_number_shows_where_it_counts_and_nowhere_else(name, bad, row):
    """Rows 6 to 14 are one document, and row 5 is one by itself."""
    student, teacher = (random_states(name, seed=seed) for seed in (6, 7))
    before = values(name, student, teacher)
    hit = torch.arange(len(before)) == row
    if name == "linear_cka" and row > 5:
        hit[6:15] = True
    if name == "attention_relation" and row > 5:
        hit[row:15] = True
    for side in (student, teacher):
        for x in side:
            kept = x[row, 3].item()
            x[row, 3] = bad
            found = values(name, student, teacher)
            x[row, 3] = kept
            assert not found[hit].isfinite().any()
            assert torch.equal(found[~hit], before[~hit])


@every_distance
def test_a_shift_by_one_position_shows(name):
    teacher = random_states(name, (8, 9))
    student = near(name, teacher, 0.1)
    right = values(name, student, teacher, (8, 9)).mean()
    shifted = values(name, student, [x.roll(1, 0) for x in teacher], (8, 9)).mean()
    assert shifted > 4 * right


@every_distance
def test_bfloat16_is_computed_in_float32_and_gets_its_gradient_in_bfloat16(name):
    student, teacher = (random_states(name, dtype=torch.bfloat16, seed=seed) for seed in (8, 9))
    wanted, wanted_gradients = values_and_gradients(name, [x.float() for x in student], teacher)
    found, gradients = values_and_gradients(name, student, teacher)
    assert found.dtype == torch.float32
    assert torch.equal(found, wanted)
    for gradient, wanted_gradient in zip(gradients, wanted_gradients, strict=True):
        assert gradient.dtype == torch.bfloat16
        assert torch.equal(gradient, wanted_gradient.bfloat16())


@every_distance
def test_autocast_changes_nothing(name):
    student, teacher = (random_states(name, dtype=torch.float32, seed=seed) for seed in (8, 9))
    wanted, wanted_gradients = values_and_gradients(name, student, teacher)
    with torch.autocast("cpu", torch.bfloat16):
        found, gradients = values_and_gradients(name, student, teacher)
    assert torch.equal(found, wanted)
    assert all(map(torch.equal, gradients, wanted_gradients))


@every_distance
def test_the_teacher_gets_no_gradient(name):
    student, teacher = (random_states(name, seed=seed) for seed in (8, 9))
    for x in (*student, *teacher):
        x.requires_grad_()
    values(name, student, teacher).sum().backward()
    assert all(x.grad is None for x in teacher)
    assert all(x.grad is not None for x in student)

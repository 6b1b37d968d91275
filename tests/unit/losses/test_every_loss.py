"""What holds for every loss as a function of logits. The table is in reference.py."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import (
    BOUNDED,
    DIVERGENCES,
    LOSSES,
    TEMPERED,
    every_case,
    every_case_not_saturated,
    logit_pairs,
    naive_nats,
    properties,
    relative_error,
    softmax,
    temperatures,
    value_and_gradient,
)

from stillroom.losses import config
from stillroom.losses.block import LogitBlock

every_divergence = pytest.mark.parametrize("name", DIVERGENCES)
one_token = torch.zeros(1, dtype=torch.long)


def random_logits(r: int = 5, v: int = 9, seed: int = 0, spread: float = 3.0):
    g = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, r, v, generator=g, dtype=torch.float64) * spread
    return student, teacher, torch.randint(0, v, (r,), generator=g)


def at(name: str, temperature: float) -> dict[str, float]:
    return {"temperature": temperature} if name in TEMPERED else {}


def test_the_table_has_every_loss():
    assert set(LOSSES) == set(config.LOSSES)


@every_case
def test_equals_the_naive_formula_and_its_gradient(name, arguments):
    student, teacher, labels = random_logits()
    student.requires_grad_()
    wanted = naive_nats(name, student, teacher, labels, **arguments)
    (wanted_gradient,) = torch.autograd.grad(wanted.sum(), student)
    nats, gradient = value_and_gradient(name, student.detach(), teacher, labels, **arguments)
    torch.testing.assert_close(nats, wanted.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", BOUNDED)
def test_float32_is_near_also_where_a_gradient_vanishes(name):
    """Then it is a difference of nearly equal numbers: exact to a share of these, not of itself."""
    student, teacher, labels = (x.float() if x.is_floating_point() else x for x in random_logits(4, 5000))
    wide = student.double().requires_grad_()
    wanted = naive_nats(name, wide, teacher, labels, temperature=0.25)
    (wanted_gradient,) = torch.autograd.grad(wanted.sum(), wide)
    nats, gradient = value_and_gradient(name, student, teacher, labels, temperature=0.25)
    assert relative_error(nats, wanted.detach()) <= 1e-5
    assert (gradient - wanted_gradient).abs().max() <= 1e-6


@every_case_not_saturated
def test_float32_stays_near_float64_over_many_columns(name, arguments):
    student, teacher, labels = (x.float() if x.is_floating_point() else x for x in random_logits(4, 5000))
    wide = student.double().requires_grad_()
    wanted = naive_nats(name, wide, teacher, labels, **arguments)
    (wanted_gradient,) = torch.autograd.grad(wanted.sum(), wide)
    nats, gradient = value_and_gradient(name, student, teacher, labels, **arguments)
    assert nats.dtype == gradient.dtype == torch.float32
    assert relative_error(nats, wanted.detach()) <= 1e-5
    assert relative_error(gradient, wanted_gradient) <= 1e-5


@pytest.mark.parametrize("name", TEMPERED)
@pytest.mark.parametrize("temperature", [0.5, 2.0, 10.0])
def test_temperature_squared_is_on_the_loss_and_on_its_gradient(name, temperature):
    """T² L(x / T) has the gradient T ∇L(x / T)."""
    student, teacher, labels = random_logits()
    nats, gradient = value_and_gradient(name, student, teacher, labels, temperature=temperature)
    cool = value_and_gradient(name, student / temperature, teacher / temperature, labels)
    torch.testing.assert_close(nats, cool[0] * temperature**2, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, cool[1] * temperature, rtol=1e-11, atol=1e-12)


@every_case
def test_gradient_belongs_to_the_caller(name, arguments):
    """It may be changed without changing what the block gives to the next loss."""
    block = LogitBlock(*random_logits())
    _, gradient = config.LOSSES[name].load()(block, **arguments)
    wanted = gradient.clone()
    gradient.fill_(float("nan"))
    for other, row in LOSSES.items():
        others = config.LOSSES[other].load()(block, **row.settings[0])[1]
        assert others.isfinite().all()
        others.fill_(float("nan"))
    torch.testing.assert_close(config.LOSSES[name].load()(block, **arguments)[1], wanted, rtol=0, atol=0)


@every_case
def test_gradient_of_each_row_sums_to_zero(name, arguments):
    """Adding a number to all logits changes nothing."""
    _, gradient = value_and_gradient(name, *random_logits(), **arguments)
    torch.testing.assert_close(gradient.sum(-1), torch.zeros(5, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", LOSSES)
@properties
@given(pair=logit_pairs, temperature=temperatures, token=st.integers(0, 1))
def test_never_negative(name, dtype, pair, temperature, token):
    student, teacher = (torch.tensor([x], dtype=dtype) for x in pair)
    nats, gradient = value_and_gradient(name, student, teacher, one_token + token, **at(name, temperature))
    assert nats.item() >= 0
    assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@every_divergence
@properties
@given(pair=logit_pairs, temperature=temperatures)
def test_student_equal_to_its_teacher_has_loss_zero_and_gradient_zero(name, dtype, pair, temperature):
    logits = torch.tensor([pair[0]], dtype=dtype)
    nats, gradient = value_and_gradient(name, logits, logits, one_token, **at(name, temperature))
    assert nats.item() == 0
    assert gradient.abs().max().item() == 0


@every_divergence
@properties
@given(pair=logit_pairs, temperature=temperatures)
def test_zero_only_where_equal(name, pair, temperature):
    student, teacher = (torch.tensor([x], dtype=torch.float64) for x in pair)
    nats, gradient = value_and_gradient(name, student, teacher, one_token, **at(name, temperature))
    apart = (softmax(student[0], temperature) - softmax(teacher[0], temperature)).abs().max().item()
    if apart > 1e-6:
        assert nats.item() > 0
        if softmax(student[0], temperature).min() > 0:  # a student that is certain beyond float64 has no gradient left
            assert gradient.abs().max().item() > 0


@every_divergence
@properties
@given(pair=logit_pairs, shift=st.floats(-100, 100), temperature=temperatures)
def test_adding_a_number_to_all_logits_changes_nothing(name, pair, shift, temperature):
    student, teacher = (torch.tensor([x], dtype=torch.float64) for x in pair)
    plain = value_and_gradient(name, student, teacher, one_token, **at(name, temperature))
    shifted = value_and_gradient(name, student + shift, teacher, one_token, **at(name, temperature))
    tried = 1 if name == "total_variation" else 2  # whose gradient has corners
    for found, wanted in list(zip(shifted, plain, strict=True))[:tried]:
        torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@every_case
def test_finite_at_extreme_logits(name, arguments, dtype):
    """Confidently right, confidently wrong, all alike, and columns that cannot be."""
    big, off = 1e4, float("-inf")
    rows = [
        [big, -big, 0.0, 0.0],
        [-big, big, 0.0, 0.0],
        [big] * 4,
        [-big] * 4,
        [off, big, -big, off],
        [0.0, off, off, off],
    ]
    student = torch.tensor([s for s in rows for _ in rows], dtype=dtype)
    teacher = torch.tensor([t for _ in rows for t in rows], dtype=dtype)
    for token in range(4):
        labels = torch.full((len(student),), token)
        nats, gradient = value_and_gradient(name, student, teacher, labels, **arguments)
        assert nats.isfinite().all()
        assert gradient.isfinite().all()
        assert (nats >= 0).all()


@every_case
def test_columns_that_neither_holds_possible_are_as_if_absent(name, arguments):
    student, teacher, labels = random_logits(r=5, v=7)
    wanted = value_and_gradient(name, student, teacher, labels, **arguments)
    off = torch.full((5, 2), float("-inf"), dtype=torch.float64)
    wide = (torch.cat([x, off], dim=1) for x in (student, teacher))
    nats, gradient = value_and_gradient(name, *wide, labels, **arguments)
    torch.testing.assert_close(nats, wanted[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient[:, :7], wanted[1], rtol=1e-12, atol=1e-12)
    assert (gradient[:, 7:] == 0).all()


@every_divergence
def test_does_not_read_the_next_tokens(name):
    student, teacher, labels = random_logits()
    plain = value_and_gradient(name, student, teacher, labels)
    other = value_and_gradient(name, student, teacher, (labels + 1) % 9)
    assert all(torch.equal(a, b) for a, b in zip(plain, other, strict=True))

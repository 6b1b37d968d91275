"""Forward and reverse KL: which is which, closed forms, and bounds."""

import math

import pytest
import torch
from hypothesis import given
from reference import logit_pairs, naive_nats, properties, softmax, temperatures, value_and_gradient

one_token = torch.zeros(1, dtype=torch.long)


def logits_of(*probabilities: float) -> torch.Tensor:
    return torch.tensor([probabilities], dtype=torch.float64).log()


@pytest.mark.parametrize(
    ("name", "nats"),
    [
        ("forward_kl", 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)),
        ("reverse_kl", 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)),
    ],
)
def test_forward_and_reverse_are_not_swapped(name, nats):
    """Forward weighs by the teacher (0.3681 nats here), reverse by the student (0.5108)."""
    found, _ = value_and_gradient(name, logits_of(0.5, 0.5), logits_of(0.9, 0.1), one_token)
    assert found.item() == pytest.approx(nats, rel=1e-12)


def test_a_student_that_leaves_out_a_token_of_the_teacher_is_punished_by_forward_only():
    """Forward covers the teacher's tokens; reverse lets the student settle on one of them."""
    student, teacher = logits_of(1 - 1e-9, 1e-9), logits_of(0.5, 0.5)
    forward, _ = value_and_gradient("forward_kl", student, teacher, one_token)
    reverse, _ = value_and_gradient("reverse_kl", student, teacher, one_token)
    assert forward.item() > 9
    assert reverse.item() == pytest.approx(math.log(2), rel=1e-6)


def test_a_token_that_the_teacher_holds_impossible_costs_forward_nothing():
    student, teacher = logits_of(0.5, 0.25, 0.25), logits_of(0.5, 0.5, 0.0)
    nats, gradient = value_and_gradient("forward_kl", student, teacher, one_token)
    assert nats.item() == pytest.approx(0.5 * math.log(2), rel=1e-12)
    torch.testing.assert_close(gradient, torch.tensor([[0.0, -0.25, 0.25]], dtype=torch.float64))


def test_a_token_that_the_student_holds_impossible_costs_reverse_nothing():
    student, teacher = logits_of(0.5, 0.5, 0.0), logits_of(0.5, 0.25, 0.25)
    nats, gradient = value_and_gradient("reverse_kl", student, teacher, one_token)
    half = 0.5 * math.log(2)
    assert nats.item() == pytest.approx(half, rel=1e-12)
    wanted = torch.tensor([[0.5 * -half, 0.5 * half, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(gradient, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_confidently_wrong_costs_the_distance_of_the_logits(name, dtype, temperature):
    student = torch.tensor([[1e4, -1e4, 0.0]], dtype=dtype)
    teacher = torch.tensor([[-1e4, 1e4, 0.0]], dtype=dtype)
    nats, gradient = value_and_gradient(name, student, teacher, one_token, temperature=temperature)
    assert nats.item() == pytest.approx(2e4 * temperature, rel=1e-6)
    forward = torch.tensor([[temperature, -temperature, 0.0]], dtype=dtype)
    torch.testing.assert_close(gradient, forward if name == "forward_kl" else torch.zeros_like(forward))


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl"])
@properties
@given(pair=logit_pairs, temperature=temperatures)
def test_pinskers_bound(name, pair, temperature):
    """KL ≥ 2 · (total variation)²."""
    student, teacher = (torch.tensor([x], dtype=torch.float64) for x in pair)
    nats, _ = value_and_gradient(name, student, teacher, one_token, temperature=temperature)
    variation = 0.5 * (softmax(student[0], temperature) - softmax(teacher[0], temperature)).abs().sum().item()
    assert nats.item() >= temperature**2 * (2 * variation**2 - 1e-12)


@properties
@given(pair=logit_pairs, temperature=temperatures)
def test_each_is_the_other_with_the_roles_exchanged(pair, temperature):
    student, teacher = (torch.tensor([x], dtype=torch.float64) for x in pair)
    forward, _ = value_and_gradient("forward_kl", student, teacher, one_token, temperature=temperature)
    reverse, _ = value_and_gradient("reverse_kl", teacher, student, one_token, temperature=temperature)
    torch.testing.assert_close(forward, reverse, rtol=1e-9, atol=temperature**2 * 1e-12)


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("apart", [1e-5, 1e-3, 1e-1])
def test_float32_does_not_drown_a_small_divergence_in_rounding(name, apart):
    """Over 30,000 columns the naive float32 sum is off by 1e-6 and often negative."""
    g = torch.Generator().manual_seed(0)
    teacher = torch.randn(8, 30_000, generator=g) * 3
    student = teacher + apart * torch.randn(8, 30_000, generator=g)
    tokens = torch.zeros(8, dtype=torch.long)
    nats, _ = value_and_gradient(name, student, teacher, tokens)
    torch.testing.assert_close(nats.double(), naive_nats(name, student, teacher, tokens), rtol=1e-3, atol=5e-8)


def test_high_temperature_tends_to_the_squared_distance_of_centered_logits():
    """T² KL → |a − b|² / 2v where a and b are the logits less their means (Hinton et al. 2015)."""
    student, teacher = torch.tensor([[[1.0, -2.0, 4.0]], [[0.5, 0.0, -3.0]]], dtype=torch.float64)
    centered = (student - student.mean()) - (teacher - teacher.mean())
    for name in ("forward_kl", "reverse_kl"):
        nats, gradient = value_and_gradient(name, student, teacher, one_token, temperature=1e4)
        assert nats.item() == pytest.approx(centered.square().sum().item() / 6, rel=1e-3)
        torch.testing.assert_close(gradient, centered / 3, rtol=1e-2, atol=1e-3)

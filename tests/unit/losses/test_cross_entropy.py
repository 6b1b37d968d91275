"""Cross-entropy with the next tokens: closed forms."""

import math

import pytest
import torch
from reference import value_and_gradient
from torch.nn import functional

from stillroom.losses.block import LogitBlock
from stillroom.losses.logits import cross_entropy


def test_even_odds_cost_the_log_of_their_number():
    nats, gradient = cross_entropy(LogitBlock(torch.zeros(2, 8), None, torch.tensor([0, 7])))
    assert nats.tolist() == pytest.approx([math.log(8)] * 2)
    wanted = torch.full((2, 8), 1 / 8)
    wanted[0, 0] = wanted[1, 7] = 1 / 8 - 1
    torch.testing.assert_close(gradient, wanted)


def test_is_that_of_torch():
    logits = torch.randn(6, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    labels = torch.tensor([0, 10, 3, 3, 7, 1])
    wanted = functional.cross_entropy(logits, labels, reduction="none")
    (wanted_gradient,) = torch.autograd.grad(wanted.sum(), logits)
    nats, gradient = value_and_gradient("cross_entropy", logits.detach(), logits.detach(), labels)
    torch.testing.assert_close(nats, wanted.detach(), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_certain_of_the_right_token_costs_nothing_and_of_a_wrong_one_the_distance(dtype):
    logits = torch.tensor([[1e4, -1e4], [1e4, -1e4]], dtype=dtype)
    nats, gradient = cross_entropy(LogitBlock(logits, None, torch.tensor([0, 1])))
    assert nats.tolist() == [0, 2e4]
    assert gradient.tolist() == [[0, 0], [1, -1]]


def test_reads_the_tokens_of_its_own_positions():
    """A shift by one token would give other values."""
    logits = torch.tensor([[0.8, 0.1, 0.1], [0.2, 0.7, 0.1], [0.3, 0.1, 0.6]], dtype=torch.float64).log()
    nats, _ = cross_entropy(LogitBlock(logits, None, torch.tensor([0, 1, 2])))
    assert nats.exp().reciprocal().tolist() == pytest.approx([0.8, 0.7, 0.6], rel=1e-12)


@pytest.mark.parametrize("token", [-1, -100, 3])
def test_a_token_outside_the_columns_is_refused(token):
    """The old habit of marking positions by −100 would otherwise count the last columns."""
    with pytest.raises(RuntimeError, match="out of bounds"):
        cross_entropy(LogitBlock(torch.zeros(1, 3), None, torch.tensor([token])))

"""Block: the log-probabilities that losses share."""

import gc
import weakref

import pytest
import torch

from stillroom.losses.block import LogitBlock

tokens = torch.zeros(2, dtype=torch.long)


def logits() -> torch.Tensor:
    return torch.tensor([[1.0, 2.0, 4.0], [0.0, -1.0, 3.0]], dtype=torch.float64)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_gives_probabilities_at_a_temperature(temperature):
    block = LogitBlock(logits(), -logits(), tokens)
    for who, sign in (("student", 1), ("teacher", -1)):
        exponentials = (sign * logits() / temperature).exp()
        wanted = exponentials / exponentials.sum(-1, keepdim=True)
        torch.testing.assert_close(block.log_probs(who, temperature).exp(), wanted)
        torch.testing.assert_close(block.probs(who, temperature), wanted)


def test_computes_each_once():
    block = LogitBlock(logits(), -logits(), tokens)
    assert block.log_probs("student", 2.0) is block.log_probs("student", 2.0)
    assert block.probs("teacher") is block.probs("teacher", 1.0)
    assert block.log_probs("student", 2.0) is not block.log_probs("student", 1.0)


def test_an_impossible_token_has_probability_zero_and_a_finite_log():
    block = LogitBlock(logits().index_fill_(1, torch.tensor([1]), float("-inf")), None, tokens)
    assert (block.probs("student")[:, 1] == 0).all()
    assert block.log_probs("student").isfinite().all()
    torch.testing.assert_close(block.probs("student").sum(-1), torch.ones(2, dtype=torch.float64))


def test_a_low_finite_logit_is_taken_as_it_is():
    block = LogitBlock(torch.tensor([[0.0, -1e20]]), None, tokens[:1])
    assert block.log_probs("student")[0, 1].item() == pytest.approx(-1e20)


def test_not_a_number_is_not_hidden():
    block = LogitBlock(logits().index_fill_(1, torch.tensor([1]), float("nan")), None, tokens)
    assert block.log_probs("student").isnan().all()


def test_gives_its_memory_back_at_once():
    """Without waiting for the garbage collector, which does not know how large a tensor is."""
    gc.collect()
    gc.disable()
    try:
        block = LogitBlock(logits(), -logits(), tokens)
        held = [weakref.ref(block.log_probs("student")), weakref.ref(block.probs("teacher", 2.0))]
        del block
        assert [ref() for ref in held] == [None, None]
    finally:
        gc.enable()

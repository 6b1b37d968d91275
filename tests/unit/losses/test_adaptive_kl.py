"""The head of the adaptive KL: the likeliest tokens, as few as hold a mass."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stillroom.losses.divergences import head_of


def by_sorting(t: torch.Tensor, mass: float) -> torch.Tensor:
    order = t.argsort(dim=-1, descending=True, stable=True)
    ranked = t.gather(-1, order)
    before = ranked.cumsum(-1) - ranked
    return torch.zeros_like(t, dtype=torch.bool).scatter(-1, order, before < mass)


@settings(deadline=None, max_examples=100, derandomize=True, database=None)
@given(v=st.sampled_from([1, 2, 7, 100, 3000]), mass=st.sampled_from([0.05, 0.5, 0.9, 0.999]),
       spread=st.sampled_from([0.1, 2.0, 6.0, 30.0]), seed=st.integers(0, 1000))  # fmt: skip
def test_is_what_sorting_gives(v, mass, spread, seed):
    logits = torch.randn(5, v, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * spread
    t = logits.softmax(-1)
    assert torch.equal(head_of(t, mass), by_sorting(t, mass))


@pytest.mark.parametrize("mass", [0.25, 0.55, 0.85])
def test_of_equals_the_first_and_as_few_as_are_needed(mass):
    head = head_of(torch.full((2, 10), 0.1, dtype=torch.float64), mass)
    number = round(10 * mass + 0.5)
    assert head.tolist() == [[True] * number + [False] * (10 - number)] * 2


def test_a_token_that_holds_the_mass_alone_is_the_head():
    t = torch.tensor([[0.0, 0.7, 0.2, 0.1], [0.0, 1.0, 0.0, 0.0]])
    assert head_of(t, 0.5).tolist() == [[False, True, False, False]] * 2

"""Head: from a hidden state to logits."""

import math

import pytest
import torch

from stillroom import lm_head as head_module
from stillroom.lm_head import LMHead, accumulator, add_product, logits_into


def normal(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def naive(hidden: torch.Tensor, head: LMHead) -> list[list[float]]:
    """One number after another."""
    rows = []
    for h in hidden.double().tolist():
        row = []
        for column, w in enumerate(head.weight.double().tolist()):
            x = sum(a * b for a, b in zip(h, w, strict=True))
            x = head.scale * (x + (0.0 if head.bias is None else head.bias[column].item()))
            row.append(x if head.softcap is None else head.softcap * math.tanh(x / head.softcap))
        rows.append(row)
    return rows


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("scale", [1.0, 0.125])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_logits_are_the_naive_ones(bias, scale, softcap):
    hidden = normal(4, 3)
    head = LMHead(normal(7, 3, seed=1), normal(7, seed=2) if bias else None, scale, softcap)
    wanted = torch.tensor(naive(hidden, head), dtype=torch.float64)
    torch.testing.assert_close(head.logits(hidden), wanted, rtol=1e-13, atol=1e-13)
    assert torch.equal(head.logits(hidden, 5), head.logits(hidden)[:, :5])


def test_softcap_bounds_what_scale_and_bias_have_made():
    head = LMHead(torch.tensor([[100.0], [0.0]]), torch.tensor([0.0, -100.0]), scale=10.0, softcap=30.0)
    assert head.logits(torch.tensor([[1.0]])).tolist() == [[30.0, -30.0]]


def test_an_impossible_column_stays_impossible():
    head = LMHead(normal(3, 2), torch.tensor([0.0, -math.inf, 0.0], dtype=torch.float64), scale=0.5)
    assert (head.logits(normal(4, 2)) == -math.inf).tolist() == [[False, True, False]] * 4


def test_num_columns():
    assert LMHead(normal(7, 3)).vocab_size == 7


@pytest.mark.parametrize(
    ("dtype", "wanted"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
)
def test_sums_are_held_in_a_wide_type(dtype, wanted):
    assert accumulator(dtype) == wanted
    assert LMHead(normal(7, 3, dtype=dtype)).logits(normal(4, 3, dtype=dtype)).dtype == wanted


@pytest.mark.parametrize("tile_rows", [1, 4, 7, 8192])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_narrow_operands_are_multiplied_exactly(tile_rows, weight_dtype, monkeypatch):
    """In bfloat16 the sum of 600 products would be off by up to 1 %."""
    monkeypatch.setattr(head_module, "TILE_ROWS", tile_rows)
    hidden, head = normal(4, 600, dtype=torch.bfloat16), LMHead(normal(7, 600, dtype=weight_dtype, seed=1))
    wanted = hidden.double() @ head.weight.double().T
    torch.testing.assert_close(head.logits(hidden).double(), wanted, rtol=1e-5, atol=1e-4)


def test_has_no_gradient_and_leaves_its_inputs_as_they_were():
    hidden, weight, bias = (x.requires_grad_() for x in (normal(4, 3), normal(7, 3, seed=1), normal(7, seed=2)))
    before = [x.detach().clone() for x in (hidden, weight, bias)]
    assert not LMHead(weight, bias, 2.0, 3.0).logits(hidden).requires_grad
    assert all(torch.equal(x, was) for x, was in zip((hidden, weight, bias), before, strict=True))


def test_writes_into_a_part_of_a_buffer_only():
    buffer = torch.full((6, 5), -7.0, dtype=torch.float64)
    head = LMHead(normal(8, 3, seed=1), normal(8, seed=2))
    logits_into(buffer[1:4], normal(3, 3), head)
    assert torch.equal(buffer[1:4], head.logits(normal(3, 3), 5))
    assert (buffer[[0, 4, 5]] == -7).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_columns_that_the_head_does_not_have_are_refused(dtype):
    """And not filled with whatever was in memory."""
    with pytest.raises((ValueError, RuntimeError), match="columns"):
        LMHead(normal(7, 3, dtype=dtype)).logits(normal(4, 3, dtype=dtype), 9)


@pytest.mark.parametrize("tile_rows", [1, 4, 7, 8192])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adds_a_product_to_what_is_there(tile_rows, dtype, monkeypatch):
    monkeypatch.setattr(head_module, "TILE_ROWS", tile_rows)
    total, left, right = normal(4, 3).float(), normal(7, 4, seed=1).float().T, normal(7, 3, dtype=dtype, seed=2)
    wanted = total.double() + left.double() @ right.double()
    add_product(total, left, right)
    torch.testing.assert_close(total.double(), wanted, rtol=1e-5, atol=1e-5)

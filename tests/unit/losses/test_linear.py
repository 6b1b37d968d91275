"""The fused head and divergence: its values, in every chunking, and what it refuses."""

from dataclasses import replace
from itertools import cycle

import pytest
import torch
from jaxtyping import TypeCheckError
from reference import (
    CASES,
    DIVERGENCES,
    LOSSES,
    SEVERAL,
    every_case,
    naive_logits,
    naive_nats,
    naive_total,
    objective,
    problem,
)
from torch.utils._python_dispatch import TorchDispatchMode

from stillroom.lm_head import LMHead
from stillroom.losses import fused_linear
from stillroom.losses.fused_linear import linear_losses
from stillroom.losses.logits import top1_agreement
from stillroom.signals import Dense

REFUSALS = (ValueError, RuntimeError, TypeCheckError)
"""What a wrong shape may raise: TypeCheckError where shapes are checked at the call."""
TRANSFORMATIONS = [{}, {"scale": 0.25}, {"softcap": 2.0}, {"scale": 3.0, "softcap": 5.0}]


@pytest.mark.parametrize(
    ("name", "arguments", "transformation"), [(*case, t) for case, t in zip(CASES, cycle(TRANSFORMATIONS))], ids=str
)
def test_equals_the_naive_formula(name, arguments, transformation):
    p, head = problem(teacher_columns=16), problem().head(**transformation)
    o = objective(name, 0.7, **arguments)
    found = linear_losses(p.hidden, head, [o], p.labels, p.weights, p.signal, vocab_size=10)
    student, teacher = naive_logits(p.hidden, head, 10), naive_logits(p.signal.hidden, p.signal.head, 10)
    wanted = naive_nats(name, student, teacher, p.labels, **arguments)
    torch.testing.assert_close(found.nats, wanted.detach().unsqueeze(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.total, 0.7 * (p.weights * wanted).sum(), rtol=1e-12, atol=1e-12)


def test_a_head_without_bias_and_a_loss_without_teacher():
    p = problem()
    found = linear_losses(p.hidden, LMHead(p.weight), [objective("cross_entropy")], p.labels, p.weights)
    wanted = naive_total(p.hidden, LMHead(p.weight), [objective("cross_entropy")], p.labels, p.weights, p.signal)
    torch.testing.assert_close(found.total, wanted, rtol=1e-12, atol=1e-12)


def test_several_objectives_add_up_with_their_weights():
    p = problem()
    found = linear_losses(p.hidden, p.head(), SEVERAL, p.labels, p.weights, p.signal)
    alone = [
        linear_losses(p.hidden, p.head(), [replace(o, weight=1.0)], p.labels, p.weights, p.signal) for o in SEVERAL
    ]
    assert torch.equal(found.nats, torch.cat([a.nats for a in alone]))
    wanted = 0.9 * alone[0].total - 0.3 * alone[1].total + 0.1 * alone[2].total
    torch.testing.assert_close(found.total, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("chunk_bytes", [1, 300, 1000, 2**30])
@pytest.mark.parametrize("block_bytes", [1, 250, 2**30])
@pytest.mark.parametrize("transformation", [{}, {"scale": 3.0, "softcap": 5.0}], ids=str)
def test_chunked_is_unchunked(chunk_bytes, block_bytes, transformation, monkeypatch):
    p = problem(n=23, teacher_columns=16)

    def run(chunk_bytes: int, block_bytes: int):
        monkeypatch.setattr(fused_linear, "BLOCK_BYTES", block_bytes)
        found = linear_losses(
            p.hidden, p.head(**transformation), SEVERAL, p.labels, p.weights, p.signal,
            vocab_size=10, measures=[top1_agreement], chunk_bytes=chunk_bytes,
        )  # fmt: skip
        return [*found, *p.gradients(found.total)]

    for found, wanted in zip(run(chunk_bytes, block_bytes), run(2**30, 2**30), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


class Largest(TorchDispatchMode):
    """Sees every tensor that an operation makes, views aside, and remembers the size of the largest."""

    def __init__(self) -> None:
        super().__init__()
        self.num_elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, torch.Tensor) and not func.is_view:
                self.num_elements = max(self.num_elements, x.numel())
        return result


def test_no_tensor_of_all_tokens_and_columns_is_ever_made(monkeypatch):
    n, v = 64, 50
    monkeypatch.setattr(fused_linear, "BLOCK_BYTES", 4 * v * 8)
    p = problem(n=n, columns=v, width=4)
    with Largest() as largest:
        found = linear_losses(
            p.hidden, p.head(softcap=5.0), SEVERAL, p.labels, p.weights, p.signal,
            measures=[top1_agreement], chunk_bytes=2 * 8 * v * 8,
        )  # fmt: skip
        found.total.backward()
    assert largest.num_elements == 2 * 8 * v  # the logits of student and teacher at 8 positions


@pytest.mark.parametrize("frozen", [True, False])
def test_a_gradient_that_nobody_asked_for_takes_no_memory(frozen):
    """That of the head's weight is the largest of all: 50 × 16 here, where everything else is smaller."""
    p = problem(n=4, columns=50, width=16)
    p.weight.requires_grad_(not frozen)
    with Largest() as largest, torch.set_grad_enabled(frozen):
        linear_losses(p.hidden, p.head(), SEVERAL, p.labels, p.weights, p.signal)
    assert 0 < largest.num_elements < p.weight.numel()


@pytest.mark.parametrize(
    ("name", "arguments"), [case for case in CASES if case[0] in (*DIVERGENCES, "cross_entropy")][:-1], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_student_equal_to_its_teacher_has_loss_zero_and_gradient_zero(name, arguments, dtype):
    if name not in DIVERGENCES:
        p = problem(dtype=dtype)
        certain = LMHead((p.weight.detach() * 0).requires_grad_(), torch.tensor([1e4] + [-1e4] * 12, dtype=dtype))
        found = linear_losses(p.hidden, certain, [objective(name, **arguments)], p.labels * 0, p.weights)
        leaves = (p.hidden, certain.weight)
    else:
        p = problem(dtype=dtype)
        head = p.head(scale=0.5, softcap=30.0)
        signal = Dense(p.hidden.detach(), LMHead(p.weight.detach(), p.bias.detach(), head.scale, head.softcap))
        found = linear_losses(p.hidden, head, [objective(name, **arguments)], p.labels, p.weights, signal)
        leaves = p.leaves
    assert (found.nats == 0).all()
    assert found.total.item() == 0
    assert all((g == 0).all() for g in torch.autograd.grad(found.total, leaves))


def test_padding_of_the_vocabulary_has_no_say():
    """Two heads for 10 tokens, padded to 13 and 16 columns that training has left at any value."""
    p = problem(teacher_columns=16)
    with torch.no_grad():
        for bias in (p.bias, p.signal.head.bias):
            bias[10:] = 1e4
    short = LMHead(p.weight[:10].detach().requires_grad_(), p.bias[:10].detach().requires_grad_())
    short_teacher = Dense(
        p.signal.hidden, LMHead(p.signal.head.weight[:10], p.signal.head.bias[:10], p.signal.head.scale)
    )
    wanted = linear_losses(p.hidden, short, SEVERAL, p.labels, p.weights, short_teacher)
    found = linear_losses(p.hidden, p.head(), SEVERAL, p.labels, p.weights, p.signal, vocab_size=10)
    torch.testing.assert_close(found.nats, wanted.nats, rtol=1e-12, atol=1e-12)
    hidden, weight, bias = p.gradients(found.total)
    wanted_hidden, wanted_weight, wanted_bias = torch.autograd.grad(wanted.total, (p.hidden, short.weight, short.bias))
    torch.testing.assert_close(hidden, wanted_hidden, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(weight[:10], wanted_weight, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(bias[:10], wanted_bias, rtol=1e-12, atol=1e-12)
    assert (weight[10:] == 0).all()
    assert (bias[10:] == 0).all()

    uncut = linear_losses(p.hidden, p.head(), SEVERAL, p.labels, p.weights, p.signal)
    assert (uncut.nats - found.nats).abs().max() > 1


@pytest.mark.parametrize("name", LOSSES)
def test_a_shift_by_one_token_is_another_loss(name):
    """Of the next tokens for a loss that reads them, else of the signal."""
    p, o = problem(), [objective(name)]
    right = linear_losses(p.hidden, p.head(), o, p.labels, p.weights, p.signal)
    if name != "cross_entropy":
        signal = Dense(p.signal.hidden.roll(1, dims=0), p.signal.head)
        shifted = linear_losses(p.hidden, p.head(), o, p.labels, p.weights, signal)
    else:
        shifted = linear_losses(p.hidden, p.head(), o, p.labels.roll(1), p.weights, p.signal)
    assert (right.nats - shifted.nats).abs().median() > 0.05


@every_case
def test_columns_that_neither_holds_possible_are_as_if_absent(name, arguments):
    p, o = problem(teacher_columns=13), [objective(name, **arguments)]
    with torch.no_grad():
        for bias in (p.bias, p.signal.head.bias):
            bias[10:] = float("-inf")
    found = linear_losses(p.hidden, p.head(), o, p.labels, p.weights, p.signal)
    wanted = linear_losses(p.hidden, p.head(), o, p.labels, p.weights, p.signal, vocab_size=10)
    torch.testing.assert_close(found.nats, wanted.nats, rtol=1e-12, atol=1e-12)
    for a, b in zip(p.gradients(found.total), p.gradients(wanted.total), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@every_case
@pytest.mark.parametrize(
    ("dtype", "whose"), [(torch.float64, "student"), (torch.bfloat16, "teacher"), (torch.float32, "both")]
)
def test_finite_where_a_bias_is_minus_infinity_and_logits_are_huge(name, arguments, dtype, whose):
    p = problem(dtype=dtype)
    with torch.no_grad():
        p.weight.mul_(1e4)
        p.signal.head.weight.mul_(1e4)
        if whose != "teacher":
            p.bias[:4] = float("-inf")
        if whose != "student":
            p.signal.head.bias[2:6] = float("-inf")
    found = linear_losses(p.hidden, p.head(), [objective(name, **arguments)], p.labels, p.weights, p.signal)
    assert found.nats.isfinite().all()
    assert (found.nats >= 0).all()
    assert all(g.isfinite().all() for g in p.gradients(found.total))


def test_no_positions_is_a_loss_of_zero():
    p = problem(n=0)
    found = linear_losses(p.hidden, p.head(), SEVERAL, p.labels, p.weights, p.signal, measures=[top1_agreement])
    assert found.total.item() == 0
    assert found.nats.shape == (3, 0)
    assert found.measures.shape == (1, 0)
    hidden, weight, bias = p.gradients(found.total)
    assert hidden.shape == (0, 6)
    assert (weight == 0).all()
    assert (bias == 0).all()


def test_leaves_its_inputs_as_they_were():
    p = problem()
    inputs = [
        p.hidden,
        p.weight,
        p.bias,
        p.labels,
        p.weights,
        p.signal.hidden,
        p.signal.head.weight,
        p.signal.head.bias,
    ]
    before = [x.detach().clone() for x in inputs]
    linear_losses(p.hidden, p.head(softcap=3.0), SEVERAL, p.labels, p.weights, p.signal).total.backward()
    assert all(torch.equal(x, was) for x, was in zip(inputs, before, strict=True))


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_values_are_the_same(guard):
    p = problem()
    arguments = (p.hidden, p.head(softcap=3.0), SEVERAL, p.labels, p.weights, p.signal)
    wanted = linear_losses(*arguments)
    with guard():
        found = linear_losses(*arguments)
    assert wanted.total.requires_grad
    assert not wanted.nats.requires_grad
    assert not found.total.requires_grad
    assert torch.equal(found.total, wanted.total)
    assert torch.equal(found.nats, wanted.nats)


def test_a_stray_not_a_number_reaches_the_total():
    """It must not be clamped to a loss of zero: the loop stops on it."""
    p = problem()
    with torch.no_grad():
        p.hidden[4, 2] = float("nan")
    for name in LOSSES:
        found = linear_losses(p.hidden, p.head(), [objective(name)], p.labels, p.weights, p.signal)
        assert found.total.isnan()
        assert found.nats.isnan().squeeze(0).tolist() == [i == 4 for i in range(11)]


@pytest.mark.parametrize("teacher_dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("vocab_size", [None, 14])
def test_more_columns_than_a_head_has_are_refused(teacher_dtype, vocab_size):
    """And not filled with whatever was in memory."""
    p, narrow = problem(), problem(columns=8, dtype=teacher_dtype)
    signal = Dense(narrow.signal.hidden, narrow.signal.head) if vocab_size is None else p.signal
    with pytest.raises((ValueError, RuntimeError), match="columns"):
        linear_losses(p.hidden, p.head(), [objective("forward_kl")], p.labels, p.weights, signal, vocab_size=vocab_size)


@pytest.mark.parametrize("rows", [1, 10, 12, 22])
def test_a_signal_of_other_positions_is_refused(rows):
    """A signal of the whole batch where only the kept positions are asked for would be read one token off."""
    p, other = problem(), problem(n=rows)
    with pytest.raises((ValueError, RuntimeError), match="positions"):
        linear_losses(p.hidden, p.head(), [objective("forward_kl")], p.labels, p.weights, other.signal)


@pytest.mark.parametrize("rows", [1, 10, 12])
def test_next_tokens_of_other_positions_are_refused(rows):
    p = problem()
    tokens = torch.zeros(rows, dtype=torch.long)
    with pytest.raises(REFUSALS):
        linear_losses(p.hidden, p.head(), [objective("cross_entropy")], tokens, p.weights)


@pytest.mark.parametrize("rows", [1, 10, 12])
def test_weights_of_other_positions_are_refused(rows):
    p = problem()
    with pytest.raises(REFUSALS):
        linear_losses(p.hidden, p.head(), [objective("cross_entropy")], p.labels, torch.ones(rows))

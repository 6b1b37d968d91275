"""The fused head and divergence: its gradients, which it forms in its forward pass."""

from itertools import cycle

import pytest
import torch
from reference import SEVERAL, SMOOTH, Problem, every_case, naive_total, objective, problem
from torch.autograd import gradcheck

from stillroom.lm_head import LMHead
from stillroom.losses.fused_linear import linear_losses
from stillroom.losses.objective import Objective

TRANSFORMATIONS = [{}, {"scale": 0.25}, {"softcap": 2.0}, {"scale": 3.0, "softcap": 5.0}]


def total_of(p: Problem, objectives: list[Objective], **transformation: float):
    """``linear_losses`` as a function of what it is differentiable in; only 5 of the 7 and 9 columns are compared."""

    def total(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        head = LMHead(weight, bias, **transformation)
        tokens = p.labels
        return linear_losses(hidden, head, objectives, tokens, p.weights, p.signal, vocab_size=5, chunk_bytes=200).total

    return total


def small() -> Problem:
    return problem(n=4, columns=7, width=3, teacher_columns=9)


@pytest.mark.parametrize(
    ("name", "arguments", "transformation"), [(*case, t) for case, t in zip(SMOOTH, cycle(TRANSFORMATIONS))], ids=str
)
def test_gradcheck(name, arguments, transformation):
    """The losses and what the head does to the logits take turns, for neither knows of the other."""
    p = small()
    assert gradcheck(total_of(p, [objective(name, 0.7, **arguments)], **transformation), p.leaves)


@pytest.mark.parametrize("transformation", TRANSFORMATIONS, ids=str)
def test_gradcheck_of_several_objectives(transformation):
    p = small()
    assert gradcheck(total_of(p, SEVERAL, **transformation), p.leaves)


def test_gradcheck_without_bias():
    p = small()
    assert gradcheck(total_of(p, SEVERAL), (p.hidden, p.weight))


@pytest.mark.parametrize("follow", [lambda x: -3 * x, lambda x: x**2 / 7, lambda x: torch.exp(-x)])
def test_gradcheck_of_what_follows(follow):
    """The gradient that comes from above is not 1."""
    p = small()
    total = total_of(p, SEVERAL)
    assert gradcheck(lambda *leaves: follow(total(*leaves)), p.leaves)


@every_case
def test_equals_the_gradient_of_the_naive_formula(name, arguments):
    p = problem(n=9, columns=40, width=8, teacher_columns=44)
    inputs = (
        p.hidden,
        p.head(scale=0.7, softcap=6.0),
        [objective(name, **arguments)],
        p.labels,
        p.weights,
        p.signal,
    )
    wanted = p.gradients(naive_total(*inputs, vocab_size=37))
    for a, b in zip(p.gradients(linear_losses(*inputs, vocab_size=37).total), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("position", [0, 3])
def test_a_position_of_weight_zero_has_gradient_exactly_zero(position):
    p = small()
    p.weights[position] = 0
    hidden, _, _ = p.gradients(total_of(p, SEVERAL)(*p.leaves))
    assert (hidden[position] == 0).all()
    assert (hidden[1] != 0).all()


def test_rows_of_the_head_beyond_the_shared_columns_have_gradient_exactly_zero():
    p = small()
    _, weight, bias = p.gradients(total_of(p, SEVERAL, softcap=4.0)(*p.leaves))
    assert (weight[5:] == 0).all()
    assert (bias[5:] == 0).all()
    assert (weight[:5] != 0).all()
    assert (bias[:5] != 0).all()


def test_only_what_is_trained_has_a_gradient():
    """A frozen head still passes the gradient on; a frozen backbone still trains the head."""
    p = small()
    total = total_of(p, SEVERAL)
    hidden, weight, bias = p.gradients(total(*p.leaves))
    for trained, wanted in ((0, hidden), (1, weight), (2, bias)):
        leaves = [x.detach().clone().requires_grad_(i == trained) for i, x in enumerate(p.leaves)]
        total(*leaves).backward()
        assert torch.equal(leaves[trained].grad, wanted)
        assert all(x.grad is None for i, x in enumerate(leaves) if i != trained)


def test_nothing_flows_to_the_teacher_or_to_the_weights_of_positions():
    p = small()
    p.weights.requires_grad_()
    p.signal.hidden.requires_grad_()
    p.signal.head.weight.requires_grad_()
    total_of(p, SEVERAL)(*p.leaves).backward()
    assert p.weights.grad is None
    assert p.signal.hidden.grad is None
    assert p.signal.head.weight.grad is None


def test_a_kept_graph_can_be_walked_twice():
    p = small()
    total = total_of(p, SEVERAL)(*p.leaves)
    total.backward(retain_graph=True)
    once = [x.grad.clone() for x in p.leaves]
    total.backward()
    for x, g in zip(p.leaves, once, strict=True):
        torch.testing.assert_close(x.grad, 2 * g, rtol=0, atol=0)


def test_gradient_reaches_what_lies_before_a_view():
    """Hidden states come out of the backbone as a view of some of the positions."""
    p = problem(n=12, columns=7, width=3)
    whole = p.hidden.detach().view(3, 4, 3).clone().requires_grad_()
    picked = torch.tensor([1, 5, 6, 11])
    arguments = ([objective("cross_entropy")], p.labels[picked], p.weights[picked])
    linear_losses(whole.flatten(0, 1)[picked], p.head(), *arguments).total.backward()
    wanted = torch.zeros(12, 3, dtype=torch.float64)
    leaf = p.hidden.detach()[picked].requires_grad_()
    linear_losses(leaf, p.head(), *arguments).total.backward()
    wanted[picked] = leaf.grad
    assert torch.equal(whole.grad.view(12, 3), wanted)


def test_a_gradient_of_the_gradient_is_refused():
    """It is not formed, and a part of it missing would be a wrong one."""
    p = small()
    total = total_of(p, SEVERAL)(*p.leaves)
    (gradient,) = torch.autograd.grad(total**2, p.hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()

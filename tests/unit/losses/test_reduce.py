"""Reduce: the same step, however its batch is split."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import Problem, objective, problem, properties

from stillroom.batch import Batch
from stillroom.losses.fused_linear import linear_losses
from stillroom.losses.objective import position_weights, widest_float
from stillroom.signals import Dense

OBJECTIVES = [
    objective("forward_kl", 0.9, temperature=2.0),
    objective("cross_entropy", 0.1),
    objective("reverse_kl", 0.3),
]


def batch_of(loss_mask: torch.Tensor, labels: torch.Tensor) -> Batch:
    zeros = torch.zeros(loss_mask.shape, dtype=torch.long)
    return Batch(zeros, labels, loss_mask, zeros, zeros)


def part(p: Problem, loss_mask: torch.Tensor, rows: slice, num_kept_of_step: int) -> torch.Tensor:
    """The loss of some of the batch's rows, which are 4 positions long."""
    batch = batch_of(loss_mask[rows], p.labels.view(-1, 4)[rows])
    flat = slice(rows.start * 4, rows.stop * 4)
    signal = Dense(p.signal.hidden[flat], p.signal.head).at(batch.kept)
    return linear_losses(
        p.hidden[flat][batch.kept], p.head(), OBJECTIVES, batch.labels.flatten()[batch.kept],
        position_weights(batch, num_kept_of_step), signal,
    ).total  # fmt: skip


def unequal_keep(rows: int) -> torch.Tensor:
    """As uneven as training data: a full row, an empty one, and ones between."""
    loss_mask = torch.rand(rows, 4, generator=torch.Generator().manual_seed(3)) < 0.5
    loss_mask[0], loss_mask[1] = True, False
    return loss_mask


def test_a_position_counts_one_over_the_kept_of_the_step():
    batch = batch_of(torch.tensor([[True, False, True], [False, True, False]]), torch.zeros(2, 3, dtype=torch.long))
    weights = position_weights(batch, 12)
    assert weights.tolist() == [1 / 12] * 3
    assert position_weights(batch, batch.num_kept).sum().item() == pytest.approx(1, rel=1e-15)


def test_is_exact_where_float32_is_not():
    """One over a large odd count: float32 weights would be off by 1e-8, and add up to it."""
    batch = batch_of(torch.ones(1, 2, dtype=torch.bool), torch.zeros(1, 2, dtype=torch.long))
    assert position_weights(batch, 65_537).tolist() == [1 / 65_537] * 2


@properties
@given(cuts=st.sets(st.integers(1, 7), max_size=7))
def test_parts_of_a_step_add_up_to_the_whole(cuts):
    p, loss_mask = problem(n=32), unequal_keep(8)
    whole = part(p, loss_mask, slice(0, 8), int(loss_mask.sum()))
    wanted = p.gradients(whole)
    edges = [0, *sorted(cuts), 8]
    parts = [part(p, loss_mask, slice(a, b), int(loss_mask.sum())) for a, b in pairwise(edges)]
    torch.testing.assert_close(sum(parts), whole, rtol=1e-12, atol=1e-12)
    found = [sum(g) for g in zip(*(p.gradients(x) for x in parts), strict=True)]
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_is_not_the_mean_of_the_parts_means():
    """A row with one kept position weighs a fourth of a row with four."""
    p, loss_mask = problem(n=8), torch.tensor([[True] * 4, [True, False, False, False]])
    first, second = part(p, loss_mask, slice(0, 1), 4), part(p, loss_mask, slice(1, 2), 1)
    whole = part(p, loss_mask, slice(0, 2), 5)
    torch.testing.assert_close(whole, (4 * first + second) / 5, rtol=1e-12, atol=0)
    assert abs(whole - (first + second) / 2) > 0.01


def test_a_part_with_nothing_kept_adds_nothing():
    p = problem(n=8)
    empty = part(p, torch.zeros(2, 4, dtype=torch.bool), slice(0, 2), 5)
    assert empty.item() == 0
    assert all((g == 0).all() for g in p.gradients(empty))


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "cross_entropy"])
def test_positions_that_are_not_kept_have_exactly_no_part(name):
    """Neither they nor anything that student, teacher or data say about them, even where it is not a number."""
    loss_mask = torch.tensor([[True, False, True, True], [False, False, True, False]])
    p = problem(n=8)
    hidden = p.hidden.detach().view(2, 4, -1).clone()
    labels, teacher = p.labels.view(2, 4), p.signal.hidden

    def total(hidden: torch.Tensor, labels: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        batch = batch_of(loss_mask, labels)
        return linear_losses(
            hidden.flatten(0, 1)[batch.kept], p.head(), [objective(name)], batch.labels.flatten()[batch.kept],
            position_weights(batch, batch.num_kept), Dense(teacher, p.signal.head).at(batch.kept),
        ).total  # fmt: skip

    clean = hidden.clone().requires_grad_()
    plain = total(clean, labels, teacher)
    plain.backward()
    assert (clean.grad[~loss_mask] == 0).all()
    assert (clean.grad[loss_mask] != 0).all()

    hidden[~loss_mask] = float("nan")
    spoilt = hidden.requires_grad_()
    other = total(spoilt, labels.masked_fill(~loss_mask, 0), teacher.masked_fill(~loss_mask.view(-1, 1), float("nan")))
    other.backward()
    assert torch.equal(other, plain)
    assert torch.equal(spoilt.grad, clean.grad)


def test_sums_are_wide_but_where_the_device_has_no_such_type():
    assert widest_float(torch.device("cpu")) == torch.float64
    assert widest_float(torch.device("cuda")) == torch.float64
    assert widest_float(torch.device("mps")) == torch.float32

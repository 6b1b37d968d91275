"""Rows: every document once, no row too long, and the same plan every time."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillroom.data.dataloader import OPEN_ROWS, epoch_order, plan_rows


@given(st.lists(st.integers(2, 17), max_size=200), st.booleans(), st.integers(0, 5))
def test_every_document_once_and_no_row_too_long(lengths: list[int], pack: bool, seed: int) -> None:
    order = epoch_order(len(lengths), True, seed, 0)
    rows = plan_rows(np.array(lengths, dtype=np.int64), 16, pack, order)
    listed = [rows[row].tolist() for row in range(len(rows))]
    assert sorted(document for row in listed for document in row) == list(range(len(lengths)))
    positions = [sum(lengths[document] - 1 for document in row) for row in listed]
    assert positions == rows.num_positions.tolist()
    assert all(0 < count <= 16 for count in positions)
    assert pack or all(len(row) == 1 for row in listed)
    again = plan_rows(np.array(lengths, dtype=np.int64), 16, pack, order)
    assert np.array_equal(rows.documents, again.documents)
    assert np.array_equal(rows.offsets, again.offsets)


def test_best_fit_takes_the_fullest_row_with_room() -> None:
    lengths = np.array([6, 8, 4, 3, 2]) + 1
    rows = plan_rows(lengths, 10, True, np.arange(5))
    assert [rows[row].tolist() for row in range(len(rows))] == [[0, 2], [1, 4], [3]]


def test_without_packing_the_order_stays() -> None:
    rows = plan_rows(np.array([3, 4, 5]), 10, False, np.array([2, 0, 1]))
    assert [rows[row].tolist() for row in range(3)] == [[2], [0], [1]]


def test_the_fullest_row_is_closed_when_too_many_are_open() -> None:
    lengths = np.array([9, *[8] * OPEN_ROWS, 1]) + 1
    rows = plan_rows(lengths, 10, True, np.arange(len(lengths)))
    assert rows[0].tolist() == [0], "row 0 had room for the last document, but was closed"
    assert rows[1].tolist() == [1, OPEN_ROWS + 1]


def test_packing_fills_rows() -> None:
    lengths = np.random.default_rng(0).integers(10, 500, 5000)
    rows = plan_rows(lengths, 1024, True, np.arange(5000))
    assert rows.num_positions.mean() > 0.97 * 1024


@pytest.mark.parametrize("length", [1, 12])
def test_a_document_that_cannot_lie_in_a_row(length: int) -> None:
    with pytest.raises(ValueError, match="a row holds 1 to 10"):
        plan_rows(np.array([5, length]), 10, True, np.arange(2))


def test_order_follows_from_seed_and_epoch() -> None:
    assert epoch_order(5, False, 3, 7).tolist() == [0, 1, 2, 3, 4]
    orders = [epoch_order(50, True, seed, epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0), (10, 1), (1, 1))]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({tuple(order) for order in orders}) == 5
    assert epoch_order(50, True, 1, 0).tolist() == orders[2].tolist()
    assert epoch_order(8, True, 0, 0).tolist() == [0, 1, 3, 6, 5, 2, 7, 4]

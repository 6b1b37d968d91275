import threading

import pytest
import torch

from stillroom.kernels.numba_math import over_rows


def test_what_goes_wrong_in_a_part_of_the_rows_is_heard():
    """Its rows would else be zeros, and nobody would know."""

    def fail(rows, *_):
        if len(rows) and rows[0, 0] == 1:
            raise RuntimeError("the last part")

    values = torch.arange(2.0).unsqueeze(1)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(RuntimeError, match="the last part"):
            over_rows(fail, values, torch.zeros(2, 1))
    finally:
        torch.set_num_threads(before)


def test_when_a_part_fails_none_is_still_at_work():
    """They would write into tensors that the caller believes free."""
    release, done = threading.Event(), []

    def work(rows, *_):
        if rows[0, 0] == 1:
            release.set()
            raise RuntimeError("the second part")
        if rows[0, 0] > 1:
            release.wait(10)
            done.append(int(rows[0, 0]))

    values, before = torch.arange(4.0).unsqueeze(1), torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        with pytest.raises(RuntimeError, match="the second part"):
            over_rows(work, values)
    finally:
        torch.set_num_threads(before)
    assert sorted(done) == [2, 3]


def test_a_tensor_with_a_gradient_is_read_too():
    seen = []
    over_rows(lambda rows: seen.append(rows.sum()), torch.ones(3, 2, requires_grad=True))
    assert sum(seen) == 6

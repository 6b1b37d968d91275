"""Batch: which positions count, and where they go."""

from dataclasses import FrozenInstanceError, fields, replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from stillroom.batch import Batch


def batch(loss_mask: torch.Tensor | None = None) -> Batch:
    """Two documents in the first row, one and padding in the second."""
    return Batch(
        tokens=torch.tensor([[5, 6, 7, 8], [9, 4, 0, 0]]),
        labels=torch.tensor([[6, 0, 8, 3], [4, 2, 0, 0]]),
        loss_mask=torch.tensor([[True, False, True, True], [False, True, False, False]])
        if loss_mask is None
        else loss_mask,
        positions=torch.tensor([[0, 1, 0, 1], [0, 1, 0, 0]]),
        documents=torch.tensor([[0, 0, 1, 1], [2, 2, -1, -1]]),
    )


def test_kept_is_where_positions_count_in_the_flattened_batch():
    b = batch()
    assert b.kept.tolist() == [0, 2, 3, 5]
    assert b.kept.dtype == torch.int64
    assert b.num_kept == 4
    assert b.tokens.flatten()[b.kept].tolist() == [5, 7, 8, 4]
    assert b.labels.flatten()[b.kept].tolist() == [6, 8, 3, 2]


@pytest.mark.parametrize(("kept", "value"), [([], False), (list(range(8)), True)])
def test_all_or_none_may_count(kept, value):
    b = batch(torch.full((2, 4), value))
    assert b.kept.tolist() == kept
    assert b.num_kept == len(kept)


def test_a_single_kept_position_is_still_a_list():
    assert batch(torch.tensor([[False, True, False, False], [False] * 4])).kept.shape == (1,)


def test_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        batch().loss_mask = torch.ones(2, 4, dtype=torch.bool)  # pyright: ignore[reportAttributeAccessIssue]


def test_moves_whole():
    b = replace(batch(), weights=torch.rand(batch().tokens.shape))
    moved = b.to("cpu")
    assert all(torch.equal(getattr(moved, f.name), getattr(b, f.name)) for f in fields(b))
    assert moved.kept.tolist() == [0, 2, 3, 5]
    assert {getattr(b.to("meta"), f.name).device.type for f in fields(b)} == {"meta"}
    assert batch().to("cpu").weights is None


class Operations(TorchDispatchMode):
    """The names of the operations that are run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_kept_is_found_before_the_batch_moves():
    """A device would have to be waited for: what it holds is not known here. The `meta` device holds nothing at all."""
    moved = batch().to("meta")
    with Operations() as operations:
        assert moved.kept.shape == (4,)
        assert moved.num_kept == 4
    assert moved.kept.device.type == "meta"
    assert "nonzero" not in operations.names

import pytest
import torch

from stillroom.threads import over_rows


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

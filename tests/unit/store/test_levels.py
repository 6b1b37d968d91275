import subprocess
import sys

import numpy as np

from stillroom.store.quantize import LogProbCodes


def three_positions() -> LogProbCodes:
    return LogProbCodes(
        counts=np.array([2, 0, 1], np.int32),
        ids=np.array([5, 3, 7], np.int32),
        levels=np.array([1, 4, 0], np.int32),
        sample_counts=np.array([0, 2, 1], np.int32),
        sample_ids=np.array([9, 8, 6], np.int32),
        sample_repeats=np.array([1, 3, 2], np.int32),
        side=np.array([[10], [11], [12]], np.int32),
    )


def values(levels: LogProbCodes) -> list:
    return [getattr(levels, name).tolist() for name in LogProbCodes.__dataclass_fields__]


def test_a_slice_holds_the_entries_and_draws_of_its_positions():
    assert values(three_positions().slice(1, 3)) == [[0, 1], [7], [0], [2, 1], [9, 8, 6], [1, 3, 2], [[11], [12]]]


def test_an_empty_slice_keeps_the_side_columns():
    empty = three_positions().slice(2, 2)
    assert len(empty) == 0
    assert empty.side.shape == (0, 1)


def test_slices_put_together_again_are_the_whole():
    whole = three_positions()
    parts = [whole.slice(0, 1), whole.slice(1, 1), whole.slice(1, 3)]
    assert values(LogProbCodes.concatenate(parts)) == values(whole)


def test_importing_levels_imports_no_numba():
    code = "import sys, stillroom.store.quantize, stillroom.store.codec; sys.exit('numba' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)

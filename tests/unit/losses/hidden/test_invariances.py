"""What each distance holds to be equal: 0 for that, and more for everything else."""

from collections.abc import Sequence

import pytest
import torch
from distances import LENGTHS, NAMES, every_distance, random_states, scale_of, values
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

settings_here = settings(deadline=None, max_examples=40, derandomize=True, database=None)
LENGTHS_DRAWN = (3, 1, 2)
WIDTH = 4
whole_numbers = st.lists(st.integers(-2, 2), min_size=3 * 6 * WIDTH, max_size=3 * 6 * WIDTH)
"""Few different ones, so that equal states, zeros and multiples come up, and what is equal is known exactly."""


def drawn(name: str, numbers: Sequence[int]) -> list[Tensor]:
    count = 3 if name == "attention_relation" else 1
    return list(torch.tensor(numbers, dtype=torch.float64).view(3, 6, WIDTH)[:count])


def proportional(x: Tensor, y: Tensor) -> bool:
    """By a factor above 0."""
    return bool(torch.equal(torch.outer(x, y), torch.outer(y, x)) and (x @ y > 0 or not (x.any() or y.any())))


def alike(name: str, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> list[bool]:
    """Of states of whole numbers, for each position."""
    if name == "linear_cka":
        return [told for document in _documents(student, teacher) for told in _alike_by_cka(*document[0])]
    if name == "attention_relation":
        return [told for document in _documents(student, teacher) for told in _alike_by_relation(document)]
    same = {"cosine": proportional, "channel_kl": lambda s, t: len((s - t).unique()) == 1}.get(name, torch.equal)
    return [same(s, t) for s, t in zip(student[0], teacher[0], strict=True)]


def _documents(student: Sequence[Tensor], teacher: Sequence[Tensor]):
    """Of each, the student's and the teacher's part of every tensor."""
    pairs = zip(student, teacher, strict=True)
    return zip(*(zip(*(x.split(LENGTHS_DRAWN) for x in pair), strict=True) for pair in pairs), strict=True)


def _alike_by_cka(s: Tensor, t: Tensor) -> list[bool]:
    grams = [(x @ x.T).flatten() for x in (len(x) * x - x.sum(0) for x in (s, t))]
    return [len(s) < 3 or not all(gram.any() for gram in grams) or proportional(*grams)] * len(s)


def _alike_by_relation(document: Sequence[tuple[Tensor, Tensor]]) -> list[bool]:
    gaps = [a @ a.T - b @ b.T for s, t in document for a, b in zip(s.chunk(2, 1), t.chunk(2, 1), strict=True)]
    return [all(len(gap[i, : i + 1].unique()) == 1 for gap in gaps) for i in range(len(gaps[0]))]


@every_distance
@settings_here
@given(ours=whole_numbers, theirs=whole_numbers, copied=st.lists(st.booleans(), min_size=6, max_size=6))
def test_at_least_0_and_0_for_what_is_alike_alone(name, ours, theirs, copied):
    student, teacher = drawn(name, ours), drawn(name, theirs)
    for s, t in zip(student, teacher, strict=True):
        s[torch.tensor(copied)] = t[torch.tensor(copied)]
    found = values(name, student, teacher, LENGTHS_DRAWN)
    assert (found >= 0).all()
    assert (found < 1e-14).tolist() == alike(name, student, teacher)


def rotation(width: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(width, width, generator=g, dtype=torch.float64)).Q


ROTATION = rotation(6)
FACTORS = torch.linspace(0.1, 10.0, sum(LENGTHS), dtype=torch.float64).unsqueeze(1)


def test_what_a_change_of_the_student_leaves_as_it_is():
    """One factor for all positions, one for each, a constant for each position, for each channel, a rotation, and one
    of each relation head's channels."""
    changes = {
        "factor": lambda x: 3 * x,
        "factor by position": lambda x: FACTORS * x,
        "constant by position": lambda x: x + FACTORS,
        "constant by channel": lambda x: x + scale_of(6),
        "rotation": lambda x: x @ ROTATION,
        "rotation of heads": lambda x: x @ torch.block_diag(rotation(3), rotation(3, 1)),
        "sign": lambda x: -x,
    }
    invariant = {name: set() for name in NAMES}
    for name in NAMES:
        student, teacher = (random_states(name, seed=seed) for seed in (0, 1))
        before = values(name, student, teacher)
        for change, apply in changes.items():
            after = values(name, [apply(x) for x in student], teacher)
            if torch.allclose(after, before, rtol=1e-10, atol=1e-12):
                invariant[name].add(change)
    assert invariant == {
        "mse": set(),
        "normalized_mse": set(),
        "channel_scaled_mse": set(),
        "cosine": {"factor", "factor by position"},
        "channel_kl": {"constant by position"},
        "linear_cka": {"factor", "constant by channel", "rotation", "rotation of heads", "sign"},
        "attention_relation": {"rotation of heads", "sign"},
    }


@pytest.mark.parametrize("name", ["normalized_mse", "cosine", "linear_cka"])
def test_the_unit_of_both_does_not_count(name):
    student, teacher = (random_states(name, seed=seed) for seed in (0, 1))
    found = values(name, [100 * x for x in student], [100 * x for x in teacher])
    torch.testing.assert_close(found, values(name, student, teacher))


@pytest.mark.parametrize("name", ["linear_cka", "attention_relation"])
def test_states_of_any_width_are_compared(name):
    """Channels of zeros are no channels."""
    student, teacher = random_states(name, width=6), random_states(name, width=10, seed=1)
    if name == "linear_cka":
        padded = [torch.nn.functional.pad(x, (0, 4)) for x in student]
    else:  # each of two relation heads gets two, and the scores are divided by the width of a head
        padded = [torch.nn.functional.pad(x.unflatten(1, (2, 3)) * (5 / 3) ** 0.25, (0, 2)).flatten(1) for x in student]
    torch.testing.assert_close(values(name, student, teacher), values(name, padded, teacher))

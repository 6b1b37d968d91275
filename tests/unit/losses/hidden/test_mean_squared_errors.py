"""The mean squared errors and the cosine: small rows, the scale of channels, and errors."""

import pytest
import torch
from distances import BY_POSITION, documents_of, random_states

from stillroom.errors import MismatchError, NonFiniteError
from stillroom.losses.config import DISTANCES
from stillroom.losses.hidden import Pair, channel_scale, channel_scaled_mse, cosine, normalized, normalized_mse

ONE = torch.zeros(1, dtype=torch.long)


def one(student: list[float], teacher: list[float]) -> Pair:
    return Pair(*(torch.tensor([x], dtype=torch.float64) for x in (student, teacher)), ONE)


def test_normalized_mse_of_a_teacher_of_zeros_counts_its_mean_square_as_1e_6():
    assert normalized_mse(one([0.3, 0.4], [0.0, 0.0])).item() == pytest.approx(0.125e6)
    assert normalized_mse(one([0.0, 0.0], [0.0, 0.0])).item() == 0


@pytest.mark.parametrize(
    ("student", "teacher", "distance"),
    [
        ([3.0, 4.0], [4.0, 3.0], 1 - 24 / 25),
        ([1.0, 0.0], [0.0, 7.0], 1.0),
        ([1.0, 2.0], [-3.0, -6.0], 2.0),
        ([0.0, 0.0], [5.0, 6.0], 0.5),
        ([5.0, 6.0], [0.0, 0.0], 0.5),
        ([0.0, 0.0], [0.0, 0.0], 0.0),
    ],
)
def test_cosine_in_closed_form(student, teacher, distance):
    assert cosine(one(student, teacher)).item() == pytest.approx(distance, abs=1e-15)


@pytest.mark.parametrize("name", BY_POSITION)
def test_widths_that_differ_are_an_error(name):
    pair = Pair(torch.zeros(3, 4), torch.zeros(3, 6), torch.zeros(3, dtype=torch.long), torch.ones(4))
    with pytest.raises(MismatchError) as error:
        DISTANCES[name].load()(pair)
    assert str(error.value) == (
        "the states of student and teacher have different widths\n"
        "  student: 4 channels     teacher: 6 channels\n"
        "  This distance compares them channel by channel.\n"
        "  Use a projector, or linear_cka, which compares states of any widths."
    )


def test_channel_scaled_mse_needs_a_scale():
    states = torch.zeros(3, 4)
    with pytest.raises(MismatchError, match="the states have no scale for their channels"):
        channel_scaled_mse(Pair(states, states, torch.zeros(3, dtype=torch.long)))


def test_the_scale_is_the_rms_of_each_channel_and_at_least_a_tenth_of_the_median():
    """A massive channel does not move the floor, and neither do channels that are always 0."""
    squares = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0003, 400.0, 400.0, 400.0, 4e14])
    scale = channel_scale(squares, 100)
    torch.testing.assert_close(scale, torch.tensor([0.2, 0.2, 0.2, 0.2, 0.2, 2.0, 2.0, 2.0, 2e6]))
    assert torch.equal(channel_scale(torch.zeros(3), 5), torch.ones(3))


def test_a_massive_channel_counts_no_more_than_another():
    """The same relative error in each channel is the same distance with and without it."""
    teacher = random_states("mse")[0]
    massive = torch.tensor([1.0, 1.0, 1e4, 1.0, 1.0, 1.0], dtype=torch.float64)

    def distance(teacher):
        scale = channel_scale(teacher.square().sum(0), len(teacher))
        return channel_scaled_mse(Pair(1.1 * teacher, teacher, documents_of((len(teacher),)), scale))

    torch.testing.assert_close(distance(teacher * massive), distance(teacher))


@pytest.mark.parametrize(
    ("squares", "count", "channels"),
    [([1.0, float("nan"), 3.0], 2, "1 of 3"), ([float("inf"), 1.0], 2, "1 of 2"), ([0.0, 0.0], 0, "2 of 2")],
)
def test_a_scale_that_is_not_finite_is_an_error(squares, count, channels):
    with pytest.raises(NonFiniteError, match=f"channels: {channels}     positions: {count}"):
        channel_scale(torch.tensor(squares), count)


def test_normalized_by_rms_and_by_layer_norm():
    x = torch.tensor([[3.0, 5.0, 4.0, 0.0], [0.0, 0.0, 0.0, 0.0], [1e6, 0.0, 0.0, 0.0]], dtype=torch.float64)
    rms = torch.tensor([[12.5], [0.0], [2.5e11]], dtype=torch.float64)
    torch.testing.assert_close(normalized(x, "rms"), x / (rms + 1e-6).sqrt())
    found = normalized(x, "layer_norm")
    wanted = torch.nn.functional.layer_norm(x, (4,), eps=1e-6)
    torch.testing.assert_close(found, wanted)
    assert normalized(x.bfloat16(), "rms").dtype == torch.float32


@pytest.mark.parametrize("by", ["rms", "layer_norm"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_normalized_states_that_are_no_numbers_stay_so(by, bad):
    x = torch.ones(2, 3)
    x[1, 0] = bad
    found = normalized(x, by)
    assert found[0].isfinite().all()
    assert not found[1].isfinite().all()

"""Statistics against closed forms and brute force."""

import itertools
import math

import numpy as np
import pytest

from stillroom import statistics
from stillroom.errors import MismatchError
from stillroom.statistics import Number, difference, mcnemar, mean, paired_bootstrap, standard_error


def scores(right: int, wrong: int) -> list[int]:
    return [1] * right + [0] * wrong


def test_standard_error_of_a_share_is_the_closed_form():
    assert standard_error(scores(30, 70)) == pytest.approx(math.sqrt(0.3 * 0.7 / 99))
    assert standard_error([1.0, 2.0, 4.0]) == pytest.approx(math.sqrt(((4 / 3) ** 2 + (1 / 3) ** 2 + (5 / 3) ** 2) / 6))


def test_wilson_interval_solves_its_equation():
    """Its ends p are where (share − p)² = z² p (1 − p) / n."""
    found = mean(scores(7, 13))
    for end in (found.low, found.high):
        assert end is not None
        assert (0.35 - end) ** 2 == pytest.approx(statistics.Z_95**2 * end * (1 - end) / 20)


def test_interval_of_a_perfect_score_is_not_a_point():
    found = mean(scores(10, 0))
    assert found.high == found.value == 1
    assert found.low == pytest.approx(10 / (10 + statistics.Z_95**2))


def test_interval_of_other_values_is_the_normal_one():
    found = mean([0.5, 1.5, 2.5, 3.5])
    assert (found.low, found.high) == pytest.approx((2 - 1.96 * found.error, 2 + 1.96 * found.error), abs=1e-4)


def test_a_single_item_has_no_error():
    assert mean([0.25]) == Number(value=0.25)


def test_bootstrap_matches_every_resample_counted():
    a, b = [0.0, 1.0, 0.5, 1.0, 0.25], [0.0, 0.0, 0.75, 0.0, 0.0]
    gains = np.subtract(a, b)
    every = [np.mean(drawn) for drawn in itertools.product(gains, repeat=5)]
    value, low, high = paired_bootstrap(a, b, seed=0)
    assert value == pytest.approx(gains.mean())
    assert (low, high) == pytest.approx(np.percentile(every, [2.5, 97.5]), abs=0.051)  # a step of this distribution


def test_bootstrap_of_many_items_is_the_normal_interval():
    generator = np.random.default_rng(3)
    a, b = generator.normal(0.1, 1, 2000), generator.normal(0, 1, 2000)
    value, low, high = paired_bootstrap(a, b, seed=1)
    half = 1.96 * standard_error(a - b)
    assert (low, high) == pytest.approx((value - half, value + half), abs=0.05 * half)


def test_bootstrap_is_paired():
    """Items that are hard for both widen nothing: a constant gain on each is certain."""
    b = np.random.default_rng(0).normal(size=50)
    assert paired_bootstrap(b + 0.25, b, seed=0) == pytest.approx((0.25, 0.25, 0.25))


def test_bootstrap_of_weighted_items_resamples_their_ratio():
    """Two documents of 3 tokens and 1: drawn together they give one of three means."""
    value, low, high = paired_bootstrap([1.0, 5.0], [0.0, 0.0], seed=0, weights=[3, 1])
    assert (value, low, high) == pytest.approx((8 / 4, 1, 5))


def test_bootstrap_does_not_depend_on_its_memory(monkeypatch):
    a, b = np.random.default_rng(0).normal(size=(2, 40))
    whole = paired_bootstrap(a, b, seed=5)
    monkeypatch.setattr(statistics, "RESAMPLE_BYTES", 20 * 40 * 999)
    assert paired_bootstrap(a, b, seed=5) == whole
    assert paired_bootstrap(a, b, seed=6) != whole


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 0), (1, 0), (5, 0), (9, 3), (12, 12)])
def test_mcnemar_with_few_differences_counts_every_coin(only_a, only_b):
    a, b = [*scores(only_a, only_b), 1, 0], [*scores(0, only_a), *scores(only_b, 0), 1, 0]
    n = only_a + only_b
    falls = [math.comb(n, k) / 2**n for k in range(n + 1) if abs(2 * k - n) >= abs(only_a - only_b)]
    assert mcnemar(a, b) == pytest.approx(sum(falls))


def test_mcnemar_with_many_differences_is_the_published_example():
    """121 and 59 discordant pairs give χ² = 61² / 180 = 20.67 with the continuity correction: p = 5.45e-6."""
    a, b = scores(121, 59), scores(0, 121) + scores(59, 0)
    assert mcnemar(a, b) == pytest.approx(5.45e-6, rel=0.01)
    assert mcnemar(b, a) == mcnemar(a, b)


def test_mcnemar_beside_its_exact_form():
    a, b = scores(30, 14), scores(0, 30) + scores(14, 0)
    exact = 2 * sum(math.comb(44, k) for k in range(15)) / 2**44
    assert mcnemar(a, b) == pytest.approx(exact, rel=0.05)


def test_the_winner_is_named():
    a, b = scores(80, 20), scores(40, 60)
    found = difference("task", "distilled", "baseline", a, b, seed=0)
    assert found.sentence.startswith("distilled beats baseline by 40.0 points, 95 % interval 3")
    assert found.sentence.endswith(", 100 questions")
    assert found.value == pytest.approx(0.4)
    assert found.p_value is not None
    swapped = difference("task", "baseline", "distilled", b, a, seed=0)
    assert swapped.sentence.startswith("distilled beats baseline by 40.0 points, 95 % interval 3")
    assert swapped.high < 0


def test_the_lower_wins_where_lower_is_better():
    a = np.random.default_rng(0).normal(1.0, 0.01, 30)
    found = difference(
        "cross-entropy", "small", "large", a + 0.5, a, seed=0, higher_is_better=False, unit="nats", items="documents"
    )
    assert found.sentence == "large beats small by 0.5 nats, 95 % interval 0.5 to 0.5, 30 documents"
    assert found.p_value is None


def test_no_winner_where_the_interval_spans_zero():
    a, b = scores(51, 49), scores(0, 49) + scores(51, 0)
    found = difference("task", "distilled", "baseline", a, b, seed=0)
    assert found.low <= 0 <= found.high
    assert found.sentence.startswith("distilled and baseline do not differ beyond chance: 0.0 points, 95 % interval −")


@pytest.mark.parametrize(("a", "b"), [(scores(4, 0), scores(0, 4)), ([1.5, 1.25], [1.0, 1.0])])
def test_no_winner_by_a_handful_of_items(a, b):
    found = difference("task", "distilled", "baseline", a, b, seed=0)
    assert found.low > 0
    assert "do not differ beyond chance" in found.sentence


def test_a_small_certain_gain_is_not_rounded_to_nothing():
    a = np.full(1000, 0.5) + 0.0004
    found = difference("task", "one", "other", a, np.full(1000, 0.5), seed=0)
    assert found.sentence == "one beats other by 0.04 points, 95 % interval 0.04 to 0.04, 1,000 questions"


def test_scores_of_other_items_are_refused():
    with pytest.raises(MismatchError, match="2 items"):
        paired_bootstrap([1.0, 2.0], [1.0], seed=0)
    with pytest.raises(MismatchError, match="0 items"):
        mcnemar([], [])

"""Charts: where the labels of bars stand."""

import re

import pytest

from stillroom.evaluate.report.charts import bars, looks
from stillroom.evaluate.report.tables import Group
from stillroom.evaluate.results import ModelFacts, Number

BAR = r'<g id="x-bar-\d-\d-(\d)">.*?<path d="M ([\d.]+) ([\d.]+) +L ([\d.]+) [\d.]+ +L [\d.]+ ([\d.]+)'
WHISKER = r'<g id="x-LineCollection_\d+">\s*<path d="M ([\d.]+) [\d.]+ +L'
LABEL = r'<text style="font-size: ([\d.]+)px[^>]*? x="([\d.]+)" y="([\d.]+)"[^>]*>−?[\d.]+</text>'
TALL, DEEP, FLAT = Number(value=0.5, low=0.1, high=0.9), Number(value=-0.2, low=-0.5, high=0.1), Number(value=0.3)


def drawn(*numbers: Number, num_groups: int = 1) -> tuple[list, list[float], list]:
    """Of the first group: bars as (left, foot, right, end), the places of intervals, and labels as (size, x, y)."""
    names = [f"model {i}" for i in range(len(numbers))]
    models = [
        ModelFacts(name=name, role="other", model=name, fingerprint="", tokenizer=None, num_parameters=1, size_bytes=1)
        for name in names
    ]
    groups = [Group("task", "acc", dict(zip(names, numbers, strict=True)))] * num_groups
    svg = bars(groups, looks(models), "x", "Scores")
    shapes = [tuple(map(float, found[1:])) for found in re.findall(BAR, svg, re.DOTALL)]
    labels = [tuple(map(float, found)) for found in re.findall(LABEL, svg)][-len(shapes) :]
    return shapes[: len(numbers)], list(map(float, re.findall(WHISKER, svg))), labels[: len(numbers)]


@pytest.mark.parametrize(("numbers", "num_groups"), [((TALL, DEEP), 1), ((TALL, DEEP, TALL, TALL, DEEP, DEEP), 4)])
def test_a_label_stands_at_the_end_of_its_bar_beside_the_interval(numbers, num_groups):
    shapes, whiskers, labels = drawn(*numbers, num_groups=num_groups)
    for number, (left, _, right, end), at, (size, x, y) in zip(numbers, shapes, whiskers, labels, strict=False):
        assert left < at < x < right
        assert x - 0.3 * 2 * size > at, "the interval goes through the label"
        if number.value > 0:
            assert end - 4 < y < end, "letters stand on the bar"
        else:
            assert end < y < end + 4 + size


def test_without_an_interval_a_label_stands_in_the_middle():
    ((left, _, right, _),), whiskers, ((_, x, _),) = drawn(FLAT)
    assert whiskers == []
    assert x == pytest.approx((left + right) / 2)

"""Metrics against naive formulas in float64, from scores made up."""

import numpy as np
import pytest

from stillroom.evaluate.metrics import Units, measure


def calibration_error(confidence: np.ndarray, correct: np.ndarray) -> float:
    """The metric of a text whose tokens have these confidences."""
    n = len(confidence)
    scores = {"cross_entropy": np.ones(n), "entropy": np.ones(n), "confidence": confidence, "correct": correct}
    units = Units(np.arange(n) % 2, 2, "documents")
    return measure(scores, units, 0, num_bytes=None).numbers["calibration_error"].value


@pytest.mark.parametrize("seed", range(3))
def test_calibration_error_equals_the_naive_formula(seed: int):
    """Σ over 15 bins of (share of the tokens) · |mean confidence − share of right tokens| (arXiv 1706.04599)."""
    generator = np.random.default_rng(seed)
    confidence = generator.random(400).astype(np.float32)
    correct = (generator.random(400) < 0.5 + 0.4 * np.sin(47 * confidence)).astype(np.float32)
    wanted, x = 0.0, confidence.astype(np.float64)
    for i in range(15):
        inside = (x >= i / 15) & (x < (i + 1) / 15)
        if inside.any():
            wanted += inside.mean() * abs(x[inside].mean() - correct[inside].astype(np.float64).mean())
    assert calibration_error(confidence, correct) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize(
    ("confidence", "correct", "wanted"),
    [
        ([0.61, 0.65], [1, 0], 0.13),  # one bin, 0.6 to 0.667: |(0.61 − 1) + 0.65| / 2
        ([0.65, 0.69], [1, 0], 0.52),  # two bins, parted at 0.667: (0.35 + 0.69) / 2
        ([1.0, 0.95, 0.0], [1, 0, 0], 0.95 / 3),  # a confidence of 1 is in the last bin
    ],
)
def test_calibration_error_of_a_few_tokens(confidence: list[float], correct: list[float], wanted: float):
    assert calibration_error(np.array(confidence), np.array(correct)) == pytest.approx(wanted, rel=1e-12)

"""The metrics against values worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from engine.scoring import bootstrap_interval, exact


@pytest.mark.parametrize(
    ("answer", "expected", "score"),
    [
        ("red", "red", 1), (" Red. ", "red", 1), ("two  red\ncircles", "Two red circles.", 1),
        ("red", "blue", 0), ("", "red", 0), ("", "", 1), ("a red circle", "red", 0),
        ("1.5", "15", 0), ("3", "3.", 1), ("ja", "nein", 0),
    ],
)  # fmt: skip
def test_exact(answer, expected, score):
    assert exact(answer, expected) == score and isinstance(exact(answer, expected), float)


def test_interval_is_that_of_the_mean():
    scores = np.random.default_rng(1).random(400) < 0.7
    low, high = bootstrap_interval(scores.tolist())
    half = 1.96 * scores.std() / 20
    assert low == pytest.approx(scores.mean() - half, abs=0.01)
    assert high == pytest.approx(scores.mean() + half, abs=0.01)
    assert (low, high) == bootstrap_interval(scores.tolist())  # repeatable
    assert bootstrap_interval([1.0] * 9) == (1.0, 1.0) and bootstrap_interval([0]) == (0, 0)

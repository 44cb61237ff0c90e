"""Pure metrics: what an answer is worth, and how sure we are of an average."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def exact(answer: str, expected: str) -> float:
    """1 when both say the same, whatever the case, outer spaces and a final full stop."""
    return float(_plain(answer) == _plain(expected))


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).rstrip(".")


def bootstrap_interval(
    scores: Sequence[float], n_resamples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """95 % percentile interval of the mean (Efron 1979)."""
    values = np.asarray(scores, dtype=np.float64)
    picks = np.random.default_rng(seed).integers(len(values), size=(n_resamples, len(values)))
    low, high = np.percentile(values[picks].mean(1), (2.5, 97.5))
    return float(low), float(high)

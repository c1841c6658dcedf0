"""The area under the ROC curve: against its definition, with weights and divided answers, and its interval."""

from __future__ import annotations

import numpy as np
import pytest

from engine.methods.discrimination import weighted_auc


@pytest.mark.parametrize("seed", range(5))
def test_area_is_its_definition(seed: int) -> None:
    """Over every pair of images, each with its weight and its share of either answer; equal scores count half."""
    draw = np.random.default_rng(seed)
    scores, human, weights = draw.integers(0, 8, 40) / 8, draw.integers(0, 4, 40) / 3, draw.uniform(0.5, 4, 40)
    yes, no = weights * human, weights * (1 - human)
    above = (scores[:, None] > scores) + 0.5 * (scores[:, None] == scores)
    expected = (yes[:, None] * no * above).sum() / (yes[:, None] * no).sum()
    found = weighted_auc(scores, human, weights)
    assert found.value == pytest.approx(expected, abs=1e-12)
    assert 0 <= found.low < found.value < found.high <= 1


def test_area_is_unknown_with_one_side() -> None:
    """Where all people say the label there is nothing to order."""
    assert weighted_auc(np.arange(4.0), np.ones(4), np.ones(4)) is None
    assert weighted_auc(np.arange(4.0), np.zeros(4), np.ones(4)) is None


def test_interval_covers_the_area() -> None:
    """Scores of two normal distributions one standard deviation apart, whose area is 0.7602: of 100 draws 90 cover."""
    draw = np.random.default_rng(5)

    def one() -> bool:
        human = (draw.random(120) < 0.7).astype(float)
        found = weighted_auc(draw.normal(size=120) + human, human, np.ones(120), resamples=200)
        return found.low <= 0.7602 <= found.high

    assert sum(one() for _ in range(100)) >= 90

"""Krippendorff's alpha: published examples, the definition by pairs, chance, and intervals."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from numpy.typing import NDArray

from engine.methods.agreement import MISSING, krippendorff_alpha


def _table(*raters: str) -> NDArray[np.int64]:
    """Answers as texts, a character an item and a dot for a missing one, as [items, raters]."""
    return np.array([[MISSING if one == "." else ord(one) for one in answers] for answers in raters]).T


# Of "Computing Krippendorff's Alpha-Reliability" (2011): binary, nominal, and nominal with four observers and gaps.
PUBLISHED = {
    0.095: _table("0100000010", "1110010000"),
    0.692: _table("aabbdcccedda", "babbbcccEddd".lower()),
    0.743: _table("123321412...", "1233224125.3", ".33323422" + "51.", "123324412" + "51."),
}


@pytest.mark.parametrize("alpha", PUBLISHED)
def test_published_examples(alpha: float) -> None:
    """To the three decimals that are printed there."""
    assert krippendorff_alpha(PUBLISHED[alpha]).alpha == pytest.approx(alpha, abs=5e-4)


def _by_pairs(answers: NDArray[np.int64]) -> float:
    """Observed over expected disagreement, from every ordered pair of answers; no shortcut."""
    items = [[one for one in row if one != MISSING] for row in answers.tolist()]
    items = [item for item in items if len(item) > 1]
    values = [one for item in items for one in item]
    observed = sum(sum(a != b for a, b in itertools.permutations(item, 2)) / (len(item) - 1) for item in items)
    expected = sum(a != b for a, b in itertools.permutations(values, 2)) / (len(values) - 1)
    return 1 - observed / expected


@pytest.mark.parametrize("seed", range(8))
def test_alpha_is_its_definition(seed: int) -> None:
    """Random answers of two to five raters, some missing: equal to the sum over pairs of answers."""
    draw = np.random.default_rng(seed)
    shown = draw.integers(-1, 4, size=(40, 1))
    answers = np.where(draw.random((40, 2 + seed % 4)) < 0.3, draw.integers(-1, 4, size=(40, 2 + seed % 4)), shown)
    answers[draw.random(answers.shape) < 0.2] = MISSING
    found = krippendorff_alpha(answers)
    assert found.alpha == pytest.approx(_by_pairs(answers), abs=1e-12)
    assert found.low is not None and found.high is not None and found.low < found.alpha < found.high


def test_alpha_of_chance_and_of_agreement() -> None:
    """Independent answers are near 0, whatever their shares are; equal ones are at 1, without a width."""
    draw = np.random.default_rng(0)
    chance = krippendorff_alpha((draw.random((2000, 3)) < 0.9).astype(int))
    assert chance.alpha == pytest.approx(0, abs=0.05)
    agreed = krippendorff_alpha(np.repeat(draw.integers(0, 3, size=(50, 1)), 3, axis=1))
    assert (agreed.alpha, agreed.low, agreed.high) == (1, 1, 1)


def test_interval_covers_the_alpha_of_the_process() -> None:
    """Raters of known error: of 100 reviews the 95 % interval has the alpha of a very large one in 90 or more."""

    def review(draw: np.random.Generator, number: int) -> NDArray[np.int64]:
        shown = draw.integers(0, 5, size=(number, 1))
        return np.where(draw.random((number, 3)) < 0.2, draw.integers(0, 5, size=(number, 3)), shown)

    draw = np.random.default_rng(3)
    truth = krippendorff_alpha(review(draw, 100_000), resamples=1).alpha
    found = [krippendorff_alpha(review(draw, 80), resamples=200) for _ in range(100)]
    assert sum(one.low <= truth <= one.high for one in found) >= 90


@pytest.mark.parametrize(
    "answers",
    [np.full((3, 2), MISSING), _table("12.", "..3"), np.zeros((0, 2), int)],
    ids=["none", "one each", "empty"],
)
def test_alpha_is_unknown_without_two_answers_to_an_item(answers: NDArray[np.int64]) -> None:
    """One rater agrees with nobody."""
    found = krippendorff_alpha(answers)
    assert (found.alpha, found.low, found.high, found.num_items) == (None, None, None, 0)


def test_alpha_is_unknown_where_all_answers_are_one() -> None:
    """Chance would agree as well: 0 / 0."""
    found = krippendorff_alpha(np.zeros((5, 3), int))
    assert found.alpha is None and (found.num_items, found.num_answers) == (5, 15)

"""Preference records, and selection by Bradley-Terry: what is drawn has exactly the probabilities that are claimed."""

from __future__ import annotations

import itertools

import pytest
import torch

from engine.methods.curation.loop import curate
from engine.methods.curation.preferences import Pairs, Preference
from engine.methods.curation.selection import (
    curation_weights,
    draw_preferences,
    preference_probability,
    select,
    selection_probabilities,
)


def chi_square(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    expected = probabilities * counts.sum()
    return float(((counts - expected).square() / expected).sum())


def test_selected_frequencies_are_those_of_bradley_terry():
    """200,000 choices among 5 candidates: below the 99.9 % quantile of chi-square with 4 degrees of freedom.

    Taking the best candidate, or noise of another law, is seen here at once.
    """
    rewards = torch.tensor([0.0, 1.0, -2.0, 0.5, 2.0], dtype=torch.float64)
    drawn = select(rewards.expand(200_000, 5), torch.Generator().manual_seed(0))
    assert chi_square(torch.bincount(drawn, minlength=5).double(), selection_probabilities(rewards)) < 18.47


def test_preferences_have_the_probability_of_the_difference():
    """At margins of -2 to 2 the share of first choices is sigmoid(margin), within 4 standard deviations."""
    first = torch.tensor([-2.0, -0.5, 0.0, 1.0, 2.0], dtype=torch.float64)
    second = torch.zeros_like(first)
    labels = draw_preferences(first.expand(50_000, 5), second.expand(50_000, 5), torch.Generator().manual_seed(1))
    probability = preference_probability(first, second)
    assert torch.equal(probability, torch.sigmoid(first))
    error = (probability * (1 - probability) / 50_000).sqrt()
    assert bool(((labels.mean(0) - probability).abs() < 4 * error).all())


def test_extreme_rewards_are_selected_without_overflow():
    rewards = torch.tensor([[1e4, 0.0, -1e4], [-1e4, -2e4, 0.0]])
    assert select(rewards, torch.Generator().manual_seed(0)).tolist() == [0, 2]


@pytest.mark.parametrize("num_candidates", [1, 2, 3])
def test_curation_weights_equal_the_enumeration_of_all_choices(num_candidates):
    """The integral against a slow reference: every tuple of candidates, with its probability."""
    generator = torch.Generator().manual_seed(2)
    mass = torch.rand(4, generator=generator, dtype=torch.float64)
    mass, rewards = mass / mass.sum(), 3 * torch.randn(4, generator=generator, dtype=torch.float64)
    expected = torch.zeros(4, dtype=torch.float64)
    for candidates in itertools.product(range(4), repeat=num_candidates):
        index = torch.tensor(candidates)
        expected.index_add_(0, index, mass[index].prod() * selection_probabilities(rewards[index]))
    torch.testing.assert_close(mass * curation_weights(mass, rewards, num_candidates), expected, rtol=0, atol=1e-14)


def test_curation_weights_tend_to_the_tilt():
    """Many candidates give e^r / E[e^r]; no number of them gives a weight above itself, and the mass stays 1."""
    mass = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    rewards = torch.tensor([0.0, 1.0, 2.0, 6.0], dtype=torch.float64)
    limit = curation_weights(mass, rewards, None)
    errors = []
    for num_candidates in (4, 16, 256, 4096):
        weights = curation_weights(mass, rewards, num_candidates)
        assert float((mass * weights).sum()) == pytest.approx(1, abs=1e-12)
        assert float(weights.max()) <= num_candidates
        errors.append(float((weights - limit).abs().max()))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.02 * float(limit.max())
    with pytest.raises(ValueError, match="num_candidates: 0"):
        curation_weights(mass, rewards, 0)


def test_curated_samples_follow_the_exact_law():
    """`curate` on samples of a finite support against `curation_weights`: 100,000 choices, chi-square at 99.9 %."""
    generator = torch.Generator().manual_seed(3)
    mass = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    rewards = torch.tensor([0.0, 1.0, -1.0, 2.0], dtype=torch.float64)
    points = torch.multinomial(mass, 400_000, replacement=True, generator=generator)
    selected, positions = curate(points[:, None].double(), rewards[points], 4, generator)
    assert torch.equal(points[positions].double(), selected[:, 0])
    assert torch.equal(positions // 4, torch.arange(100_000))
    counts = torch.bincount(selected[:, 0].long(), minlength=4).double()
    assert chi_square(counts, mass * curation_weights(mass, rewards, 4)) < 16.27


@pytest.mark.parametrize(
    ("change", "message"),
    [({"second": "a"}, "second: 'a'"), ({"choice": 2}, "choice: 2"), ({"time": float("nan")}, "time: nan")],
)
def test_records_that_say_nothing_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Preference(**{"first": "a", "second": "b", "choice": 0, "rater": "r", "time": 0.0} | change)


def test_shapes_that_disagree_are_refused():
    with pytest.raises(ValueError, match=r"\[3, 2\], \[3, 2\], \[3, 1\]"):
        Pairs(torch.zeros(3, 2), torch.zeros(3, 2), torch.zeros(3, 1))
    with pytest.raises(ValueError, match="no multiple of 4"):
        curate(torch.zeros(6, 1), torch.zeros(6), 4, torch.Generator())

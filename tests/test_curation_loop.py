"""The loop on mixtures and finite supports: exact laws, the papers' bounds, what is measured."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from curation_mixtures.raters import MODEL, Raters
from curation_mixtures.rounds import Choosers, measure_round, next_generator

from engine.methods.curation.attacks import largest_difference_flips
from engine.methods.curation.bounds import (
    gain_bounds,
    mixed_weights,
    real_data_divergence_bound,
    sample_correlation,
    sample_covariance,
    updated_probabilities,
)
from engine.methods.curation.generators import GaussianMixture, circle_mixture, monomials
from engine.methods.curation.loop import LoopOptions, curate
from engine.methods.curation.measures import class_balance, class_shares
from engine.methods.curation.reward_models import FitOptions, fit_reward
from engine.methods.curation.selection import curation_weights
from engine.methods.kernel_distance import unbiased_mmd


def log_density(mixture: GaussianMixture, samples: torch.Tensor) -> torch.Tensor:
    return mixture.log_joint(samples).logsumexp(-1)


def supports(count: int, points: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random distributions and two rewards."""
    generator = torch.Generator().manual_seed(seed)
    mass = torch.rand(count, points, generator=generator, dtype=torch.float64)
    own, other = 2 * torch.randn(2, count, points, generator=generator, dtype=torch.float64)
    return mass / mass.sum(-1, keepdim=True), own, other


@pytest.mark.parametrize("num_candidates", [2, 4, None])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_gain_lies_within_its_bounds(num_candidates, share):
    """2,000 random supports; without adversaries the reward rises, by the variance bound of Ferbach et al. at least."""
    mass, own, other = supports(2000, 6)
    result = gain_bounds(mass, own, other, share=share, num_candidates=num_candidates)
    slack = 1e-9 * own.exp().amax(-1)
    assert bool((result.gain >= result.lower - slack).all()) and bool((result.gain <= result.upper + slack).all())
    if not share:
        assert bool((result.gain >= result.by_sign - slack).all()) and float(result.gain.min()) > 0


def test_the_bounds_hold_in_every_round_of_a_loop_on_a_mixture():
    """Three rounds in which a learned, attacked reward makes half of the choices: bounds, and what is really selected.

    The support of a round is 300 samples of its mixture; 80,000 choices by `curate` change the mean of e^r as computed.
    """
    current, generator = circle_mixture(8).expanded(1), torch.Generator().manual_seed(0)
    raters = Raters(current.means[0, 0], 0.25)
    for _ in range(3):
        records = raters.records(current, 300, generator)
        honest = fit_reward(MODEL, records, FitOptions()).parameters
        attacked = records.flipped(largest_difference_flips(MODEL, honest, records, 0.3))
        learned = fit_reward(MODEL, attacked, FitOptions()).parameters
        points = current.sample(300, generator)
        own, other = raters.rewards(points), MODEL(learned, monomials(points))
        mass = torch.full((1, 300), 1 / 300, dtype=torch.float64)
        exact = gain_bounds(mass, own, other, share=0.5, num_candidates=4)
        assert float(exact.lower) <= float(exact.gain) <= float(exact.upper)
        drawn = torch.randint(300, (160_000,), generator=generator)
        weights = []
        for rewards in (own, other):
            candidates = drawn[torch.randperm(160_000, generator=generator)]
            _, positions = curate(points[:, candidates], rewards[:, candidates], 4, generator)
            weights.append(own[0, candidates[positions[0]]].exp())
        change = torch.cat(weights).mean() - own.exp().mean()
        assert abs(float(change - exact.gain)) < 4 * float(torch.cat(weights).std()) / math.sqrt(80_000)
        choosers = [
            Choosers(0.5, raters.rewards),
            Choosers(0.5, lambda samples, learned=learned: MODEL(learned, monomials(samples))),
        ]
        current = next_generator(current, choosers, LoopOptions(num_training=300), generator)
    assert float(exact.covariance) < 0 < float(exact.variance)


def test_in_the_limit_the_gain_is_the_covariance_over_the_mean():
    mass, own, other = supports(500, 6)
    result = gain_bounds(mass, own, other, share=1.0, num_candidates=None)
    torch.testing.assert_close(result.gain, result.covariance / (mass * other.exp()).sum(-1))


def test_rewards_of_one_order_obey_the_bound_by_sign():
    """Where r~ rises with r, the covariance bound holds at any K; where it falls with r, the reward falls."""
    mass, own, _ = supports(1000, 6)
    for num_candidates in (2, 4, 16):
        alike = gain_bounds(mass, own, 0.5 * own - 1, share=0.4, num_candidates=num_candidates)
        assert bool((alike.gain >= alike.by_sign - 1e-9 * own.exp().amax(-1)).all())
        reverse = gain_bounds(mass, own, -own, share=1.0, num_candidates=num_candidates)
        assert float(reverse.covariance.max()) < 0 and float(reverse.gain.max()) < 0


def test_a_covariance_above_zero_does_not_protect_at_few_candidates():
    """A counterexample to the condition `Cov >= 0` at K = 2: the covariance is positive, and users lose a third.

    The general bounds hold there, and with many candidates the sign is right again.
    """
    mass = torch.tensor([0.5260, 0.4588, 0.0152], dtype=torch.float64)
    own = torch.tensor([-5.3409, -0.1017, -0.3079], dtype=torch.float64)
    other = torch.tensor([-3.3682, -6.5102, 2.3488], dtype=torch.float64)
    few = gain_bounds(mass, own, other, share=1.0, num_candidates=2)
    assert float(few.covariance) > 0 and float(few.gain) < -0.3 * float((mass * own.exp()).sum())
    assert float(few.lower) <= float(few.gain) < float(few.by_sign)
    assert float(gain_bounds(mass, own, other, share=1.0, num_candidates=None).gain) > 0


def test_the_reward_of_the_classes_rises_to_its_maximum():
    """The papers' reward 10 - class index over ten rounds: monotone to 10 without real data, bounded with them."""
    real = torch.full((10,), 0.1, dtype=torch.float64)
    rewards = 10 - torch.arange(10, dtype=torch.float64)
    for weight in (math.inf, 1.0, 0.2):
        mass, path = real, [5.5]
        for _ in range(10):
            mass = updated_probabilities(mass, curation_weights(mass, rewards, 4), real, weight)
            path.append(float((mass * rewards).sum()))
            assert float(mass.sum()) == pytest.approx(1)
            drift = float(torch.special.xlogy(mass, mass / real).sum())
            assert drift <= real_data_divergence_bound(4, weight)
        assert path == sorted(path)
    assert path[-1] < 6.1 and math.isinf(real_data_divergence_bound(4, 1.0))
    ratio = 1.0
    for _ in range(200):
        ratio = (1 + 0.2 * 4 * ratio) / 1.2
    assert real_data_divergence_bound(4, 0.2) == pytest.approx(math.log(ratio))


def test_choosers_of_whom_some_are_adversarial_mix_their_choices():
    mass, own, other = supports(1, 5)
    mixed = mixed_weights(mass, own, other, share=0.25, num_candidates=4)
    parts = curation_weights(mass, own, 4), curation_weights(mass, other, 4)
    torch.testing.assert_close(mixed, 0.75 * parts[0] + 0.25 * parts[1])


def test_a_mixture_samples_its_own_density():
    """Mean and covariance of 200,000 samples, and the integral of the density over a grid."""
    mixture = circle_mixture(3, radius=1.0, deviation=0.4)
    mixture = GaussianMixture(torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), mixture.means, mixture.covariances)
    samples = mixture.sample(200_000, torch.Generator().manual_seed(0))
    mean = mixture.weights @ mixture.means
    torch.testing.assert_close(samples.mean(0), mean, rtol=0, atol=0.01)
    spread = mixture.means - mean
    covariance = 0.16 * torch.eye(2, dtype=torch.float64) + spread.T @ (mixture.weights[:, None] * spread)
    torch.testing.assert_close(torch.cov(samples.T), covariance, rtol=0, atol=0.01)
    axis = torch.linspace(-5, 5, 201, dtype=torch.float64)
    total = log_density(mixture, torch.cartesian_prod(axis, axis)).exp().sum() * 0.05**2
    assert float(total) == pytest.approx(1, abs=1e-6)


def test_refitting_to_its_own_samples_changes_a_mixture_little():
    """From a wrong start EM finds the mixture again; every step raises the likelihood."""
    truth, generator = circle_mixture(3), torch.Generator().manual_seed(0)
    samples = truth.sample(20_000, generator)
    mixture = GaussianMixture(truth.weights, 1.3 * truth.means, 2 * truth.covariances, em_steps=1)
    likelihoods = [float(log_density(mixture, samples).mean())]
    for _ in range(20):
        mixture = mixture.refit(samples)
        likelihoods.append(float(log_density(mixture, samples).mean()))
    # The floor of the covariances costs less than this.
    assert all(after > before - 1e-5 for before, after in itertools.pairwise(likelihoods))
    torch.testing.assert_close(mixture.means, truth.means, rtol=0, atol=0.02)
    torch.testing.assert_close(mixture.covariances, truth.covariances, rtol=0, atol=0.01)


def test_a_loop_of_many_candidates_tends_to_the_tilted_mixture():
    """`p e^r / E[e^r]` of a mixture and a linear reward is a mixture again: means move by covariance times slope."""
    circle = circle_mixture(5, radius=1.0)
    widths = torch.linspace(0.5, 1.5, 5, dtype=torch.float64)[:, None, None]
    mixture = GaussianMixture(circle.weights, circle.means, widths * circle.covariances)
    slope = torch.tensor([1.0, 0.3], dtype=torch.float64)
    shift = mixture.covariances @ slope
    weights = torch.softmax(mixture.weights.log() + (mixture.means + shift / 2) @ slope, -1)
    tilted = GaussianMixture(weights, mixture.means + shift, mixture.covariances)
    points = torch.randn(20, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ratio = log_density(tilted, points) - log_density(mixture, points) - points @ slope
    torch.testing.assert_close(ratio, ratio[:1].expand(20))
    many, random = LoopOptions(num_training=4000, num_candidates=64), torch.Generator().manual_seed(1)
    refitted = next_generator(mixture, [Choosers(1.0, lambda samples: samples @ slope)], many, random)
    torch.testing.assert_close(refitted.weights, tilted.weights, rtol=0, atol=0.03)


def test_real_data_and_choosers_are_mixed_by_their_shares():
    """lambda = 3: a quarter of the training samples are real ones, the rest the choosers'; known by their place."""
    current, real = circle_mixture(2, radius=1.0, deviation=0.1), circle_mixture(1, radius=50.0, deviation=0.1)

    class Recorder:
        """A generator that keeps what it is refitted on."""

        samples = torch.zeros(0)

        def sample(self, count, generator):
            return current.sample(count, generator)

        def refit(self, samples):
            self.samples = samples
            return self

    choosers = [Choosers(0.5, lambda x: 1e3 * x[..., 0]), Choosers(0.5, lambda x: -1e3 * x[..., 0])]
    options = LoopOptions(num_training=400, num_candidates=16, curated_weight=3.0)
    samples = next_generator(Recorder(), choosers, options, torch.Generator().manual_seed(0), real).samples[:, 0]
    counts = [int(((low < samples) & (samples < high)).sum()) for low, high in ((-2, 0), (0, 2), (40, 60))]
    assert counts == [150, 150, 100]
    with pytest.raises(ValueError, match="no source of real samples"):
        next_generator(Recorder(), choosers, options, torch.Generator())
    with pytest.raises(ValueError, match=r"add up to 0\.5"):
        next_generator(Recorder(), choosers[:1], options, torch.Generator(), real)
    with pytest.raises(ValueError, match="num_candidates 0"):
        LoopOptions(num_candidates=0)


def test_measures_of_a_round():
    """Shares and balance of samples that are known; distance and covariance, run by run."""
    assert class_shares(torch.tensor([0, 0, 1, 0]), 4).tolist() == [0.75, 0.25, 0, 0]
    assert float(class_balance(torch.full((4,), 0.25))) == pytest.approx(1)
    assert float(class_balance(torch.tensor([1.0, 0, 0, 0]))) == 0
    generator = torch.Generator().manual_seed(0)
    features, real = torch.randn(2, 40, 6, generator=generator), 1 + torch.randn(2, 30, 6, generator=generator)
    true, curating = torch.randn(2, 2, 40, generator=generator)
    measures = measure_round(features, true, curating, torch.zeros(2, 40, dtype=torch.long), 3, real)
    assert measures.occupancy.tolist() == [[1, 0, 0]] * 2 and measures.balance.tolist() == [0, 0]
    for run in range(2):
        distance = unbiased_mmd(features[run], real[run])
        assert float(measures.real_distance[run]) == pytest.approx(float(distance), rel=1e-4)
        covariance = np.cov(true[run].exp().numpy(), curating[run].exp().numpy(), ddof=0)[0, 1]
        assert float(measures.covariance[run]) == pytest.approx(covariance, rel=1e-4)


def test_correlation_ignores_shifts_of_the_rewards():
    """Rewards of 1e3, whose exponentials overflow, and a constant reward."""
    own, other = torch.randn(2, 100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = sample_covariance(own, other) / (sample_covariance(own, own) * sample_covariance(other, other)).sqrt()
    torch.testing.assert_close(sample_correlation(own + 1e3, other - 1e3), expected)
    assert float(sample_correlation(own, torch.ones_like(own))) == 0

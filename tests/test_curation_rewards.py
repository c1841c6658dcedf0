"""Reward models: a known reward is recovered, and the loss teaches more than the mean label."""

from __future__ import annotations

import pytest
import torch

from engine.methods.curation.preferences import Pairs
from engine.methods.curation.reward_models import (
    FitOptions,
    LinearReward,
    NetworkReward,
    fit_reward,
    held_out_accuracy,
    margins,
    preference_losses,
    training_loss,
)
from engine.methods.curation.selection import draw_preferences
from engine.methods.intervals import wilson_interval


def records(runs: tuple[int, ...], count: int, truth, num_features: int = 3, seed: int = 0) -> Pairs:
    """Pairs of normal features, labelled by a reward."""
    generator = torch.Generator().manual_seed(seed)
    first, second = torch.randn(2, *runs, count, num_features, generator=generator, dtype=torch.float64)
    return Pairs(first, second, draw_preferences(truth(first), truth(second), generator))


def test_a_known_linear_reward_is_recovered():
    """20 runs of 20,000 records: mean and spread of the estimates are those that Fisher's information predicts."""
    weights = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    pairs = records((20,), 20_000, lambda x: x @ weights)
    fit = fit_reward(LinearReward(3), pairs, FitOptions(l2=1e-9))
    assert fit.converged and bool((fit.gradient_norm <= 1e-8).all())
    probability = torch.sigmoid(margins(LinearReward(3), weights, pairs))
    differences = pairs.first - pairs.second
    curvature = (probability * (1 - probability))[..., None] * differences
    error = torch.linalg.inv((differences.mT @ curvature).mean(0)).diagonal().sqrt()
    scores = (fit.parameters - weights) / error
    assert bool((scores.abs() < 4).all()) and 0.7 < float(scores.std()) < 1.3


def test_a_network_recovers_a_reward_that_no_linear_model_can():
    """`r = -|x|^2`, even in x: a linear reward is at chance on held-out pairs, the network is near the best."""

    def truth(features: torch.Tensor) -> torch.Tensor:
        return -features.square().sum(-1)

    pairs, held_out = records((), 2000, truth, 2), records((), 2000, truth, 2, seed=1)
    model, options = NetworkReward(2, 16), FitOptions(l2=1e-4, tolerance=1e-4, max_steps=300)
    fit = fit_reward(model, pairs, options, generator=torch.Generator().manual_seed(0))
    assert fit.converged
    accuracy = held_out_accuracy(model, fit.parameters, held_out)
    best = float(((truth(held_out.first) > truth(held_out.second)) == held_out.labels.bool()).double().mean())
    linear = fit_reward(LinearReward(2), pairs, options)
    assert accuracy.high > best and accuracy.value > best - 0.02
    chance = held_out_accuracy(LinearReward(2), linear.parameters, held_out)
    assert chance.low < 0.5 < chance.high


def test_the_loss_is_that_of_each_record():
    """Labels [N, 1] beside margins [N] would broadcast to [N, N] and teach the mean label alone: refused."""
    margin, labels = torch.tensor([2.0, -1.0]), torch.tensor([1.0, 0.0])
    expected = torch.nn.functional.binary_cross_entropy_with_logits(margin, labels, reduction="none")
    torch.testing.assert_close(preference_losses(margin, labels), expected)
    with pytest.raises(ValueError, match="shapes must be equal"):
        preference_losses(margin, labels[:, None])


def test_runs_are_independent():
    """A run's fit does not depend on those beside it; a record of weight 0 is as good as absent."""
    weights = torch.tensor([3.0, 0.0, -1.0], dtype=torch.float64)
    pairs, model, options = records((4,), 200, lambda x: x @ weights), LinearReward(3), FitOptions(tolerance=1e-10)
    together = fit_reward(model, pairs, options).parameters
    kept = torch.ones(200, dtype=torch.float64)
    kept[150:] = 0
    for run in range(4):
        alone = Pairs(pairs.first[run], pairs.second[run], pairs.labels[run])
        torch.testing.assert_close(fit_reward(model, alone, options).parameters, together[run])
        weighted = fit_reward(model, alone, options, weights=kept).parameters
        fewer = fit_reward(model, alone.take(torch.arange(150)), FitOptions(l2=options.l2 * 200 / 150)).parameters
        torch.testing.assert_close(weighted, fewer, rtol=1e-6, atol=1e-8)


def test_training_converges_where_plain_newton_steps_diverge():
    """Separable pairs with differences of 1e3 and a start far off: the step halving keeps the loss falling."""
    pairs = records((), 50, lambda x: 1e6 * x[..., 0])
    far = Pairs(1e3 * pairs.first, 1e3 * pairs.second, pairs.labels)
    fit = fit_reward(LinearReward(3), far, FitOptions(), start=torch.tensor([-5.0, 5.0, 5.0], dtype=torch.float64))
    assert fit.converged
    loss = training_loss(LinearReward(3), fit.parameters, far, 1e-2)
    torch.testing.assert_close(loss, fit.loss)
    assert float(loss) < 0.05


def test_accuracy_counts_agreement_and_ties():
    """Of four margins one is right, one wrong, and two ties are half right: Wilson's interval of 2 of 4."""
    first = torch.tensor([[1.0, 0, 0], [1.0, 0, 0], [0, 1.0, 0], [0, 1.0, 0]], dtype=torch.float64)
    pairs = Pairs(first, torch.zeros_like(first), torch.tensor([1.0, 0, 1, 0], dtype=torch.float64))
    weights = torch.tensor([1.0, 0, 0], dtype=torch.float64)
    accuracy, half = held_out_accuracy(LinearReward(3), weights, pairs), wilson_interval(2, 4)
    assert (accuracy.value, accuracy.low, accuracy.high, accuracy.num_pairs) == (0.5, half.low, half.high, 4)
    right = held_out_accuracy(LinearReward(3), weights, pairs.take(torch.tensor([0, 2])))
    assert right.value == 0.75 and right.low < 0.5 < 0.9 < right.high
    with pytest.raises(ValueError, match="no record is held out"):
        held_out_accuracy(LinearReward(3), torch.zeros(3, dtype=torch.float64), pairs.take(torch.arange(0)))


def test_options_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="l2 0"):
        FitOptions(l2=0)
    pairs = records((2,), 10, lambda x: x[..., 0])
    with pytest.raises(ValueError, match="one run"):
        fit_reward(NetworkReward(3, 2), pairs, FitOptions())
    single = Pairs(pairs.first[0], pairs.second[0], pairs.labels[0])
    with pytest.raises(ValueError, match="generator"):
        fit_reward(NetworkReward(3, 2), single, FitOptions())

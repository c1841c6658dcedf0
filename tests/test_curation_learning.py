"""Learned rewards: honest held-out accuracy, calibrated margins, degenerate records, and suspects that are found."""

from __future__ import annotations

import pytest
import torch

from engine.methods.curation.defences import RemovalOptions
from engine.methods.curation.learning import (
    PENALTIES,
    Groups,
    LearnedReward,
    LearnOptions,
    agreement_with_trusted,
    covariance_with_trusted,
    find_suspects,
    learn_reward,
    split_pairs,
    standardise,
    unordered_pairs,
)
from engine.methods.curation.monitor import trusted_agreement
from engine.methods.curation.preferences import Pairs
from engine.methods.curation.reward_models import LinearReward, fit_reward, held_out_accuracy
from engine.methods.curation.selection import draw_preferences

SHIFT = torch.tensor([100.0, -5.0, 0.0, 3.0], dtype=torch.float64)
SPREAD = torch.tensor([0.01, 2.0, 30.0, 1.0], dtype=torch.float64)
TRUTH = torch.tensor([1.0, -1.5, 0.5, 0.0], dtype=torch.float64)


def records(count: int, seed: int = 0, strength: float = 1.0) -> tuple[Pairs, torch.Tensor]:
    """Records whose features have very different scales, and the number of each pair."""
    generator = torch.Generator().manual_seed(seed)
    first, second = torch.randn(2, count, 4, generator=generator, dtype=torch.float64)
    labels = draw_preferences(strength * first @ TRUTH, strength * second @ TRUTH, generator)
    return Pairs(first * SPREAD + SHIFT, second * SPREAD + SHIFT, labels), torch.arange(count)


def accuracy_on(learned: LearnedReward, pairs: Pairs) -> float:
    """Share of the choices of other records that a reward predicts."""
    return held_out_accuracy(learned.model, learned.parameters, learned.standardisation.pairs(pairs)).value


@pytest.mark.parametrize("model", ["linear", "network"])
def test_a_known_reward_is_recovered_from_raw_features(model):
    """Features of scales 0.01 to 30: without standardisation the penalty would erase the first of them."""
    pairs, numbers = records(600)
    learned = learn_reward(pairs, numbers, LearnOptions(model=model, max_steps=100))
    fresh, _ = records(2000, seed=1)
    truth = ((fresh.first - fresh.second) / SPREAD) @ TRUTH
    assert float(torch.corrcoef(torch.stack([learned.margins(fresh), truth]))[0, 1]) > 0.95
    assert torch.allclose(learned(fresh.first) - learned(fresh.second), learned.margins(fresh))
    accuracy = learned.accuracy
    assert accuracy is not None and accuracy.num_pairs == 120 and learned.num_used == 480
    # The interval covers the accuracy on fresh records.
    assert 0.5 < accuracy.low <= accuracy_on(learned, fresh) <= accuracy.high


def test_the_penalty_follows_the_evidence():
    """Choices by coin: the strongest penalty, and hardly a reward. Clear ones: a weak penalty."""
    clear, numbers = records(300, strength=3.0)
    coin = torch.rand(300, generator=torch.Generator().manual_seed(3)) < 0.5
    noise = learn_reward(clear.with_labels(coin.double()), numbers, LearnOptions())
    assert noise.l2 >= PENALTIES[-2] and float(noise.margins(clear).abs().mean()) < 0.1
    taught = learn_reward(clear, numbers, LearnOptions())
    assert taught.l2 <= PENALTIES[1] and float(taught.margins(clear).abs().mean()) > 2
    assert learn_reward(clear, numbers, LearnOptions(l2=7.0)).l2 == 7.0


def test_records_of_a_pair_stay_on_one_side():
    """Ten records of each pair, in both orders. Split by record, held-out ones would be known from training."""
    first, second = ["a", "b", "c", "d", "e"] * 10, ["b", "c", "d", "e", "a"] * 10
    swapped = [index % 3 == 0 for index in range(50)]
    left = [two if swap else one for one, two, swap in zip(first, second, swapped, strict=True)]
    right = [one if swap else two for one, two, swap in zip(first, second, swapped, strict=True)]
    numbers = unordered_pairs(left, right)
    assert torch.equal(numbers, unordered_pairs(first, second)) and numbers.unique().tolist() == [0, 1, 2, 3, 4]
    split = split_pairs(numbers, 0.2, torch.Generator().manual_seed(0))
    assert len(split.held_out) == 10 and len(numbers[split.held_out].unique()) == 1
    assert sorted([*split.training.tolist(), *split.held_out.tolist()]) == list(range(50))
    assert not set(numbers[split.training].tolist()) & set(numbers[split.held_out].tolist())


def test_the_accuracy_of_noise_is_that_of_chance():
    """More features than records and labels by coin: training is separable, the held-out accuracy knows better."""
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 150, 400, generator=generator, dtype=torch.float64)
    pairs = Pairs(first, second, (torch.rand(150, generator=generator) < 0.5).double())
    learned = learn_reward(pairs, torch.arange(150), LearnOptions(l2=1e-4))
    training = pairs.take(learned.split.training)
    assert accuracy_on(learned, training) == 1
    assert learned.accuracy is not None and learned.accuracy.low < 0.5 < learned.accuracy.high


def test_records_of_one_pair_do_not_narrow_the_interval():
    """Ten raters of each pair: the accuracy of all records, with the interval of the pairs."""
    pairs, numbers = records(100)
    often = torch.arange(100).repeat_interleave(10)
    once, many = (learn_reward(pairs.take(index), numbers[index], LearnOptions(l2=1.0)).accuracy for index in (
        torch.arange(100), often
    ))  # fmt: skip
    assert once is not None and many is not None and (once.num_pairs, many.num_pairs) == (20, 200)
    assert many.high - many.low > 0.9 * (once.high - once.low)


def test_degenerate_records_give_a_finite_reward():
    """All choices alike, constant features, contradicting records, and too few to hold one out."""
    pairs, numbers = records(60)
    same = learn_reward(pairs.with_labels(torch.ones(60)), numbers, LearnOptions())
    assert same.converged and bool(same.parameters.isfinite().all())
    constant = torch.full((60, 4), 0.1)
    flat = learn_reward(Pairs(constant, constant.clone(), pairs.labels), numbers, LearnOptions())
    assert not flat(constant).any() and flat.accuracy is not None and flat.accuracy.value == 0.5
    part = Pairs(*(values.repeat(2, *[1] * (values.ndim - 1)) for values in (pairs.first, pairs.second, pairs.labels)))
    contradicting = part.with_labels(torch.cat([pairs.labels, 1 - pairs.labels]))
    torn = learn_reward(contradicting, numbers.repeat(2), LearnOptions())
    assert float(torn.margins(pairs).abs().max()) < 1e-6
    alone = learn_reward(pairs.take(torch.tensor([0])), torch.tensor([0]), LearnOptions())
    assert alone.accuracy is None and alone.num_used == 1
    assert (float(alone.margins(pairs)[0]) > 0) == bool(pairs.labels[0])
    both = learn_reward(pairs.take(torch.tensor([0, 1])), torch.tensor([0, 1]), LearnOptions())
    assert both.accuracy is not None and both.accuracy.num_pairs == 1
    with pytest.raises(ValueError, match="there is no record"):
        learn_reward(pairs.take(torch.arange(0)), torch.arange(0), LearnOptions())


def test_a_record_of_weight_zero_is_as_good_as_absent():
    """And the split does not change with the weights, so that accuracies before and after a defence compare."""
    pairs, numbers = records(200)
    weights = torch.ones(200)
    weights[::3] = 0
    learned = learn_reward(pairs, numbers, LearnOptions(l2=1e-9), weights=weights)
    every = learn_reward(pairs, numbers, LearnOptions(l2=1e-9))
    assert torch.equal(learned.split.training, every.split.training)
    kept = learned.split.training[weights[learned.split.training] > 0]
    fewer = learn_reward(
        pairs.take(kept), torch.arange(len(kept)), LearnOptions(l2=1e-9, held_out=0.0),
        standardisation=learned.standardisation,
    )  # fmt: skip
    torch.testing.assert_close(learned.parameters, fewer.parameters, rtol=1e-4, atol=1e-6)
    assert learned.num_used == fewer.num_used == len(kept) and fewer.accuracy is None


def test_features_that_cannot_be_standardised_are_refused():
    with pytest.raises(ValueError, match="not finite"):
        standardise(torch.tensor([[1.0], [float("nan")]]))
    with pytest.raises(ValueError, match="at least one row"):
        standardise(torch.zeros(0, 3))
    with pytest.raises(ValueError, match="model 'forest'"):
        LearnOptions(model="forest")


@pytest.mark.parametrize("model", ["linear", "network"])
def test_tampered_records_are_suspects(model):
    """A fifth of the choices of largest margin are exchanged: most are found, and the reward is near the clean one.

    The penalty is chosen by the tampered records themselves: so strong that the reward is hardly one, and a search
    for suspects with that penalty would find none.
    """
    pairs, numbers = records(400, strength=2.0)
    margin = ((pairs.first - pairs.second) / SPREAD) @ TRUTH
    tampered = margin.abs() > margin.abs().quantile(0.8)
    attacked = pairs.flipped(tampered)
    trusted, _ = records(80, seed=2, strength=2.0)
    options, removal = LearnOptions(model=model, max_steps=100), RemovalOptions(num_stages=5)
    learned = learn_reward(attacked, numbers, options)
    suspects = find_suspects(learned, attacked, trusted, options, removal)
    training = torch.zeros(400, dtype=torch.bool).index_fill(0, learned.split.training, True)
    removed = suspects.weights == 0
    assert not removed[~training].any() and not suspects.effects[~training].any()
    assert float(removed[tampered & training].double().mean()) > 0.8
    assert float(removed[~tampered & training].double().mean()) < 0.15
    assert float(suspects.effects[tampered & training].mean()) < 0 < float(suspects.effects[~tampered].mean())
    again = learn_reward(attacked, numbers, options, weights=suspects.weights)
    fresh, _ = records(1000, seed=5, strength=2.0)
    clean = accuracy_on(learn_reward(pairs, numbers, options), fresh)
    assert accuracy_on(learned, fresh) < clean - 0.05 < accuracy_on(again, fresh)


def test_a_minority_keeps_its_records_when_groups_are_given():
    """A quarter of the raters has the opposite taste: removed by influence, kept group by group."""
    pairs, numbers = records(400, strength=2.0)
    minority = torch.arange(400) % 4 == 0
    mixed = pairs.flipped(minority)
    judged, _ = records(80, seed=2, strength=2.0)
    few = torch.arange(80) % 4 == 0
    trusted = judged.flipped(few)
    options, removal = LearnOptions(l2=1e-2), RemovalOptions()
    learned = learn_reward(mixed, numbers, options)
    majority = judged.take((~few).nonzero()[:, 0])
    alone = find_suspects(learned, mixed, majority, options, removal)
    grouped = find_suspects(learned, mixed, trusted, options, removal, Groups(minority.long(), few.long()))
    training = torch.zeros(400, dtype=torch.bool).index_fill(0, learned.split.training, True)
    assert float((alone.weights == 0)[minority & training].double().mean()) > 0.7
    assert float((grouped.weights == 0)[minority & training].double().mean()) < 0.15
    with pytest.raises(ValueError, match="no trusted one"):
        find_suspects(learned, mixed, majority, options, removal, Groups(minority.long(), torch.zeros(60).long()))


def test_the_agreement_is_that_of_all_features():
    """In the span of few trusted records it equals the fit in all features; of a network it has a value too."""
    pairs, numbers = records(300)
    trusted, _ = records(3, seed=2)
    options = LearnOptions(l2=1e-2)
    learned = learn_reward(pairs, numbers, options)
    scale = learned.standardisation
    result = agreement_with_trusted(learned, trusted, pairs.first, options)
    whole = trusted_agreement(
        LinearReward(4), scale.pairs(trusted), learned.parameters, scale(pairs.first), options.fit_options(1e-2),
        torch.Generator().manual_seed(0),
    )  # fmt: skip
    for name in ("correlation", "low", "high"):
        torch.testing.assert_close(getattr(result, name), getattr(whole, name), rtol=1e-6, atol=1e-8)
    # The covariance has the sign of the correlation, and no constant of a reward changes it.
    covariance = covariance_with_trusted(learned, trusted, pairs.first, options)
    fitted = fit_reward(LinearReward(4), scale.pairs(trusted), options.fit_options(1e-2)).parameters
    own, other = (scale(pairs.first) @ fitted).exp(), (learned(pairs.first) + 7).exp()
    both = torch.stack([own / own.mean(), other / other.mean()])
    assert covariance == pytest.approx(float(torch.cov(both, correction=0)[0, 1]), rel=1e-2)
    more, _ = records(200, seed=3)
    network = LearnOptions(model="network", l2=1e-2)
    assert agreement_with_trusted(learn_reward(pairs, numbers, network), more, pairs.first, network).low > 0.5
    reverse = learn_reward(pairs.flipped(torch.ones(300, dtype=torch.bool)), numbers, network)
    assert agreement_with_trusted(reverse, more, pairs.first, network).high < 0

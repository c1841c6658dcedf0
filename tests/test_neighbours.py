"""The vote of nearest neighbours: against a plain loop, whatever the order of the images, and chosen without itself."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from engine.methods import neighbours
from engine.methods.finiteness import usable_logits
from engine.methods.neighbours import DEFAULT_K, DEFAULT_TAU, Vote, fit_vote, unit_features, vote_logits

NUM_CLASSES = 4


def images(number: int, dim: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Features and classes of images in overlapping clusters, in no order."""
    generator = torch.Generator().manual_seed(seed)
    classes = torch.randint(NUM_CLASSES, (number,), generator=generator)
    centres = 1.2 * torch.randn(NUM_CLASSES, dim, generator=torch.Generator().manual_seed(99))
    return unit_features(centres[classes] + torch.randn(number, dim, generator=generator)), classes


def voted(query: list[float], features: Tensor, classes: Tensor, vote: Vote) -> list[float]:
    """Probabilities by the definition, one image after another."""
    similarities = [sum(a * b for a, b in zip(query, one, strict=True)) for one in features.tolist()]
    last = sorted(similarities, reverse=True)[: vote.k][-1]
    votes = [0.1 / NUM_CLASSES] * NUM_CLASSES
    for similarity, index in zip(similarities, classes.tolist(), strict=True):
        if similarity >= last:
            votes[index] += math.exp((similarity - 1) / vote.tau)
    return [one / sum(votes) for one in votes]


@pytest.mark.parametrize("vote", [Vote(), Vote(k=1), Vote(k=7, tau=0.3), Vote(k=1000, tau=1.0)])
def test_probabilities_are_those_of_a_plain_loop(vote: Vote) -> None:
    """More neighbours than images too; no probability is 0."""
    features, classes = images(60)
    queries, _ = images(9, seed=1)
    p = torch.softmax(vote_logits(queries, features, classes, NUM_CLASSES, vote), 1)
    expected = torch.tensor([voted(query, features, classes, vote) for query in queries.tolist()])
    assert torch.allclose(p, expected, atol=1e-5) and (p > 0).all()


def test_the_defaults_are_those_of_the_literature() -> None:
    assert (Vote().k, Vote().tau) == (20, 0.07) == (DEFAULT_K, DEFAULT_TAU)


def test_images_like_none_that_are_labelled_have_nearly_equal_probabilities() -> None:
    """An absolute weight: neighbours that are far away say little, even if all of them are of one class."""
    features = unit_features(torch.tensor([[1.0, 0.01 * place] for place in range(30)]))
    classes = torch.zeros(30, dtype=torch.long)
    near, far = unit_features(torch.tensor([[1.0, 0.1], [-1.0, 0.1]]))
    p = torch.softmax(vote_logits(torch.stack([near, far]), features, classes, NUM_CLASSES, Vote()), 1)
    assert p[0, 0] > 0.99 and torch.allclose(p[1], torch.tensor(1 / NUM_CLASSES), atol=1e-6)


def test_no_order_of_the_images_matters() -> None:
    """To the bit: copies in different classes, where which of them are the k nearest is left open, all vote."""
    features, classes = images(50)
    features = torch.cat([features, features[:20], features[:20]])
    classes = torch.cat([classes, (classes[:20] + 1) % NUM_CLASSES, (classes[:20] + 2) % NUM_CLASSES])
    queries = torch.cat([features[:20], images(5, seed=2)[0]])
    # The k-th nearest is one of three copies.
    vote = Vote(k=2, tau=0.1)
    similarities = queries @ features.T
    expected = neighbours._logits(*picked(similarities, classes, vote), NUM_CLASSES, vote)
    for seed in range(5):
        order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))
        found = neighbours._logits(*picked(similarities[:, order], classes[order], vote), NUM_CLASSES, vote)
        assert torch.equal(found, expected)
    p = torch.softmax(expected, 1)
    assert torch.allclose(p[0].topk(3).values, p[0, classes[0]].expand(3))


def picked(similarities: Tensor, classes: Tensor, vote: Vote) -> tuple[Tensor, Tensor]:
    values, nearest = neighbours._nearest(similarities, vote.k)
    return values, classes[nearest]


def test_a_row_that_cannot_be_scored_has_no_logits() -> None:
    """And no other row is the worse for it."""
    features, classes = images(40)
    embeds = torch.stack([features[3] * 7, torch.full((6,), torch.nan), torch.zeros(6), torch.full((6,), torch.inf)])
    logits = vote_logits(unit_features(embeds), features, classes, NUM_CLASSES, Vote())
    assert usable_logits(logits).tolist() == [True, False, False, False]
    alone = vote_logits(features[3:4], features, classes, NUM_CLASSES, Vote())
    assert torch.allclose(logits[:1], alone, atol=1e-5)


def test_the_gradient_is_that_of_the_votes() -> None:
    """Against differences of the probability along it, within the same neighbours."""
    features, classes = images(60)
    query = images(1, seed=5)[0].double().requires_grad_()

    def p(point: Tensor) -> Tensor:
        return torch.log_softmax(vote_logits(point, features.double(), classes, NUM_CLASSES, Vote(k=60, tau=0.2)), 1)[
            0, 2
        ]

    (gradient,) = torch.autograd.grad(p(query), query)
    step = 1e-2 * gradient / gradient.norm()
    with torch.no_grad():
        slope = (p(query + step) - p(query - step)) / (2 * step.norm())
    assert gradient.norm() > 0.1
    assert float(slope) == pytest.approx(float(gradient.norm()), rel=2e-2)


def test_no_image_votes_for_itself() -> None:
    """Classes by lot cannot be predicted: with its own vote every image would be right."""
    features, _ = images(300)
    classes = torch.randint(NUM_CLASSES, (300,), generator=torch.Generator().manual_seed(4))
    fit = fit_vote(features, classes, NUM_CLASSES)
    accuracy = (fit.logits.argmax(1) == classes[fit.rows]).double().mean()
    assert abs(float(accuracy) - 1 / NUM_CLASSES) < 0.1
    assert fit.temperature.fitted_nll == pytest.approx(math.log(NUM_CLASSES), abs=0.02)


def test_the_choice_is_the_best_of_all_and_is_calibrated(monkeypatch: pytest.MonkeyPatch) -> None:
    """No other k and tau is better; probabilities of new images are right as often as they say."""
    features, classes = images(1500)
    fit = fit_vote(features, classes, NUM_CLASSES)
    default = Vote()
    for k, tau in ((default.k, default.tau), (5, 0.03), (200, 0.2)):
        monkeypatch.setattr(neighbours, "_KS", (k,))
        monkeypatch.setattr(neighbours, "_TAUS", (tau,))
        assert fit_vote(features, classes, NUM_CLASSES).temperature.fitted_nll >= fit.temperature.fitted_nll
    others, truth = images(2000, seed=8)
    p = torch.softmax(vote_logits(others, features, classes, NUM_CLASSES, fit.vote) / fit.calibration, 1)
    confidence, predicted = p.max(1)
    assert float(confidence.mean()) == pytest.approx(float((predicted == truth).float().mean()), abs=0.03)


def test_of_a_perfect_vote_the_temperature_is_left_alone() -> None:
    """Its likelihood rises without end as the temperature falls, which would make every probability 0 or 1."""
    classes = torch.arange(2).repeat_interleave(30)
    generator = torch.Generator().manual_seed(0)
    features = unit_features(torch.eye(2)[classes] + 0.01 * torch.randn(60, 2, generator=generator))
    fit = fit_vote(features, classes, 2)
    assert fit.temperature.bound == "lower" and fit.calibration == 1


def test_of_many_images_some_are_asked_and_all_vote(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evenly spread, so that every class has its share."""
    monkeypatch.setattr(neighbours, "_KS", (20,))
    monkeypatch.setattr(neighbours, "_TAUS", (0.07,))
    features, classes = images(300)
    whole = fit_vote(features, classes, NUM_CLASSES)
    monkeypatch.setattr(neighbours, "MAX_QUERIES", 100)
    some = fit_vote(features, classes, NUM_CLASSES)
    assert some.rows.tolist() == [*range(0, 300, 3)] and len(whole.rows) == 300
    assert torch.allclose(some.logits, whole.logits[some.rows], atol=1e-5)

"""Statistics of classes with two or three images, against numpy: where the divisor of a variance shows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engine.methods.conditioning.gaussians import ClassGaussians, ClassMoments
from engine.methods.conditioning.mixtures import MixtureOptions, fit_mixtures
from engine.studies.prepare.fitting import fit_conditioning
from engine.studies.prepare.observation import Observations

LABELS = ("two", "three", "many")
COUNTS = (2, 3, 40)


@pytest.fixture(scope="module")
def classes() -> torch.Tensor:
    """In no order."""
    return torch.repeat_interleave(torch.arange(3), torch.tensor(COUNTS))[torch.randperm(45)]


@pytest.fixture(scope="module")
def embeds() -> torch.Tensor:
    return 3 + 2 * torch.randn(45, 4, generator=torch.Generator().manual_seed(1))


def population(embeds: torch.Tensor, classes: torch.Tensor, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of a class, divided by its number of images."""
    rows = embeds[classes == index].double().numpy()
    return rows.mean(0), rows.var(0, ddof=0)


def test_gaussians_have_the_population_deviation(embeds, classes):
    """In one part, in parts, and merged: of two images half their distance, which ddof 1 would enlarge by 41 %."""
    whole, parts = ClassMoments.empty(LABELS, 4), ClassMoments.empty(LABELS, 4)
    whole.add(embeds, classes)
    for rows in torch.arange(45).split(7):
        part = ClassMoments.empty(LABELS, 4)
        part.add(embeds[rows], classes[rows])
        parts.merge(part)
    for moments in (whole, parts):
        gaussians = ClassGaussians.of(moments)
        for index, count in enumerate(COUNTS):
            mean, variance = population(embeds, classes, index)
            assert int(gaussians.count[index]) == count
            assert gaussians.mean[index].numpy() == pytest.approx(mean, rel=1e-5)
            assert gaussians.std[index].numpy() == pytest.approx(np.sqrt(variance), rel=1e-5)
    first, second = embeds[classes == 0]
    assert torch.allclose(ClassGaussians.of(whole).std[0], (first - second).abs() / 2)


def test_mixtures_of_few_images_are_one_gaussian(embeds, classes):
    """With the population variance, and the floor of scikit-learn on top."""
    options = MixtureOptions(components=3)
    mixtures = fit_mixtures(embeds, classes, LABELS, options)
    for index in (0, 1):
        mean, variance = population(embeds, classes, index)
        assert mixtures.weights[index].tolist() == [1.0, 0.0, 0.0]
        assert mixtures.means[index, 0].numpy() == pytest.approx(mean, rel=1e-5)
        wanted = np.sqrt(variance + options.reg_covar * variance.mean())
        assert mixtures.stds[index, 0].numpy() == pytest.approx(wanted, rel=1e-5)


def test_the_moments_of_mixtures_are_those_of_their_images():
    """Also of modes far apart, where most of a variance lies between them, and of unequal weights."""
    centres = torch.tensor([-8.0, 0.0, 8.0]).repeat_interleave(torch.tensor([60, 20, 20]))
    embeds = centres[:, None] + torch.randn(100, 4, generator=torch.Generator().manual_seed(2))
    classes = torch.arange(100) % 2
    mixtures = fit_mixtures(embeds, classes, LABELS[:2])
    assert mixtures.num_components.tolist() == [3, 3]
    found = ClassGaussians.of(mixtures.moments())
    for index in range(2):
        mean, variance = population(embeds, classes, index)
        assert found.mean[index].numpy() == pytest.approx(mean, abs=1e-4)
        assert found.std[index].numpy() == pytest.approx(np.sqrt(variance), rel=1e-4)


def test_prepare_fits_these_statistics(embeds, classes):
    """The artefact of a pass has them, and counts each class's errors."""
    logits = torch.nn.functional.one_hot(classes.roll(1), 3) * 4.0
    observations = Observations(
        embeds=embeds, logits=logits, classes=classes, temperature=2.0, images_digest="0" * 32, unusable=()
    )
    conditioning = fit_conditioning(observations, LABELS, {}, 1)
    assert isinstance(conditioning.statistics, ClassMoments) and conditioning.counts == COUNTS
    for index in range(3):
        mean, variance = population(embeds, classes, index)
        assert conditioning.statistics.mean[index].numpy() == pytest.approx(mean, rel=1e-6)
        squares = conditioning.statistics.squares[index].numpy()
        assert squares / COUNTS[index] == pytest.approx(variance, rel=1e-6)
    wrong = (classes.roll(1) != classes).numpy()
    assert conditioning.num_errors == tuple(int(wrong[classes.numpy() == index].sum()) for index in range(3))
    # Of logits that were divided by a temperature of two, the temperature in use is two.
    assert conditioning.temperature.current == 2.0
    nll = torch.nn.functional.cross_entropy(logits, classes)
    assert conditioning.temperature.current_nll == pytest.approx(float(nll), rel=1e-6)

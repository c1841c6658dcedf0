"""The temperature of a target, fitted to the labels of images."""

from __future__ import annotations

import pytest
import torch

from engine.methods.temperature import HIGHEST, LOWEST, fit_temperature


@pytest.mark.parametrize("true", [0.05, 1.0, 17.6])
def test_the_temperature_that_made_the_labels_is_found(true):
    """Labels drawn from softmax(z / T): the fit finds T, and no temperature beside it is better."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(20_000, 5, generator=generator) * 3 * true
    labels = torch.multinomial(torch.softmax(logits / true, 1), 1, generator=generator)[:, 0]
    fit = fit_temperature(logits, labels, 2 * true)
    assert fit.fitted == pytest.approx(true, rel=0.03) and not fit.bound and fit.fitted_nll < fit.current_nll
    assert "better at" in fit.verdict
    for factor in (0.999, 1.001):
        assert fit_temperature(logits, labels, fit.fitted * factor).current_nll > fit.fitted_nll
    assert "as good as any" in fit_temperature(logits, labels, fit.fitted * 1.001).verdict


def test_a_fit_without_a_minimum_says_so():
    """No error, and nothing but errors: the bound, in words."""
    logits = torch.randn(100, 4, generator=torch.Generator().manual_seed(0))
    right, wrong = (fit_temperature(logits, choose(1), 1.0) for choose in (logits.argmax, logits.argmin))
    assert (right.bound, right.fitted) == ("lower", LOWEST) and "lower bound" in right.verdict
    assert (wrong.bound, wrong.fitted) == ("upper", HIGHEST) and "no better than chance" in wrong.verdict
    with pytest.raises(ValueError, match="not finite"):
        fit_temperature(logits * torch.inf, logits.argmax(1), 1.0)

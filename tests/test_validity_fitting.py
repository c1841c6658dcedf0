"""`p_valid` fitted on simulated people whose true probabilities are known: coefficients, calibration, verdicts."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest

from engine.methods.validity import MAX_P, MIN_P, ValidityModel, log_odds
from engine.methods.validity_fitting import MIN_EACH, MIN_IMAGES, MIN_STRATUM, Answers, fit_validity
from engine.methods.validity_quality import ALL, ERRS, RIGHT, auc, calibration_bins, has_agreed, kept_quality, qualities

TRUE = ValidityModel(intercept=0.4, weights=(0.5, 0.2, 0.0))


def simulated(
    num_images: int, num_asked: int = 50, *, seed: int = 0, model: ValidityModel = TRUE, error_rate: float = 0.2
) -> Answers:
    """Answers of people who say a label as a model has it; the target errs at random."""
    rng = np.random.default_rng(seed)
    odds = rng.normal(0.5, 2.5, (num_images, len(model.weights)))
    p_labels = 1 / (1 + np.exp(-odds))
    p = np.array([model.p_valid(row) for row in p_labels])
    asked = np.full(num_images, num_asked)
    return Answers(
        p_labels=p_labels,
        num_agreeing=rng.binomial(asked, p),
        num_asked=asked,
        target_errs=rng.random(num_images) < error_rate,
    )


def of_group(fit, name):
    return next(group for group in fit.quality if group.name == name)


def test_known_coefficients_are_recovered():
    fit = fit_validity(simulated(4000))
    assert fit.model is not None and fit.is_balanced
    assert fit.model.intercept == pytest.approx(TRUE.intercept, abs=0.08)
    assert fit.model.weights == pytest.approx(TRUE.weights, abs=0.03)


def test_the_error_shrinks_with_the_number_of_images():
    """Consistency: the ridge decides where images are few, and does not bias where they are many."""
    wrong = [
        np.mean([np.abs(np.subtract(fit_validity(simulated(n, 5, seed=seed)).model.weights, TRUE.weights)).max()
                 for seed in range(5)])
        for n in (60, 600, 6000)
    ]  # fmt: skip
    assert wrong[0] > wrong[1] > wrong[2] and wrong[2] < 0.05


def test_few_images_give_weights_closer_to_equal():
    def spread(num_images: int) -> float:
        weights = fit_validity(simulated(num_images)).model.weights
        return max(weights) - min(weights)

    assert spread(60) < spread(4000)


def test_p_valid_never_falls_where_an_oracle_is_surer():
    """Monotone in each probability, also where people disagree with an oracle: its weight is then zero."""
    contrary = simulated(2000, model=ValidityModel(intercept=0.0, weights=(0.6, 0.6, -0.5)))
    model = fit_validity(contrary).model
    assert model is not None and min(model.weights) == 0
    grid = np.linspace(0, 1, 41)
    for place in range(3):
        values = [model.p_valid([p if number == place else 0.3 for number in range(3)]) for p in grid]
        assert all(later >= earlier for earlier, later in itertools.pairwise(values))


def test_it_is_calibrated_on_other_images():
    fit, others = fit_validity(simulated(1500)), simulated(4000, seed=1)
    estimates = np.array([fit.model.p_valid(row) for row in others.p_labels])
    [everything, errs, right] = qualities(estimates, others.num_agreeing, others.num_asked, others.target_errs)
    assert [everything.name, errs.name, right.name] == [ALL, ERRS, RIGHT]
    assert max(group.calibration_error for group in (everything, errs, right)) < 0.03
    # What the fit says of itself by cross-validation is true of images that it never saw.
    held_out = of_group(fit, ALL)
    assert held_out.auc == pytest.approx(everything.auc, abs=0.03)
    assert held_out.brier == pytest.approx(everything.brier, abs=0.02)
    assert fit.nll < fit.constant_nll


def test_half_of_the_weight_is_that_of_errors():
    """Where the target errs people agree less for the same probabilities: the fit goes with them, not with the many."""
    rng = np.random.default_rng(0)
    errs = np.arange(4000) < 200
    p_labels = 1 / (1 + np.exp(-rng.normal(0, 2, (4000, 1))))
    people = np.where(errs, 0.3, 0.9)
    asked = np.full(4000, 20)
    answers = Answers(p_labels=p_labels, num_agreeing=rng.binomial(asked, people), num_asked=asked, target_errs=errs)
    weights = answers.weights
    assert weights[errs].sum() == pytest.approx(weights[~errs].sum()) and weights.sum() == pytest.approx(4000)
    few = dataclasses.replace(answers, target_errs=np.arange(4000) < MIN_STRATUM - 1)
    assert answers.is_balanced and not few.is_balanced and (few.weights == 1).all()


def test_it_depends_on_no_order_of_equal_rows_and_is_deterministic():
    answers = simulated(300)
    assert fit_validity(answers) == fit_validity(simulated(300))


def test_images_of_many_people_weigh_more():
    answers = dataclasses.replace(simulated(200), num_asked=np.array([1, 9] * 100), num_agreeing=np.array([1, 0] * 100))
    assert answers.weights[1] == pytest.approx(9 * answers.weights[0])


def test_one_rater_is_enough_and_is_named():
    fit = fit_validity(simulated(800, 1))
    assert fit.model is not None and "one answer an image" in fit.verdict
    assert fit.num_answers == 800


@pytest.mark.parametrize(
    ("answers", "reason"),
    [
        (simulated(MIN_IMAGES - 1), f"{MIN_IMAGES} are needed"),
        (dataclasses.replace(simulated(500, 1), num_agreeing=np.ones(500, dtype=int)), f"{MIN_EACH} are needed"),
        (dataclasses.replace(simulated(500, 1), num_agreeing=np.zeros(500, dtype=int)), "most people say"),
        (dataclasses.replace(simulated(500, 3), num_agreeing=np.full(500, 2)), "most people do not say"),
    ],
)
def test_too_few_answers_end_in_a_verdict(answers, reason):
    fit = fit_validity(answers)
    assert fit.model is None and fit.verdict.startswith("no usable fit") and reason in fit.verdict


def test_answers_that_are_separable_end_in_a_verdict():
    """The likelihood rises for ever with the weights."""
    p_labels = np.repeat([[0.49], [0.51]], 100, axis=0)
    answers = Answers(
        p_labels=p_labels, num_agreeing=np.repeat([0, 1], 100), num_asked=np.ones(200, dtype=int),
        target_errs=np.zeros(200, dtype=bool),
    )  # fmt: skip
    fit = fit_validity(answers)
    assert fit.model is None and "no maximum" in fit.verdict


def test_oracles_that_say_nothing_end_in_a_verdict():
    """People's answers have nothing to do with the probabilities, or the opposite."""
    for weights in ((0.0, 0.0), (-0.8, -0.8)):
        answers = simulated(600, 3, model=ValidityModel(intercept=0.0, weights=weights), seed=3)
        fit = fit_validity(answers)
        if weights[0] < 0:
            assert fit.model is None and "no better than that of a constant" in fit.verdict
        assert fit.model is None or fit.constant_nll - fit.nll < 0.002


def test_probabilities_of_zero_and_one_are_no_infinities():
    model = ValidityModel(intercept=0.0, weights=(1.0, 1.0))
    assert model.p_valid([0.0, 0.0]) == model.p_valid([MIN_P, MIN_P]) > 0
    assert model.p_valid([1.0, 1.0]) == model.p_valid([MAX_P, MAX_P]) < 1
    assert log_odds(0.5) == 0 and log_odds(0.0) == pytest.approx(-log_odds(1.0))
    assert ValidityModel(intercept=900.0, weights=(0.0,)).p_valid([0.5]) == 1
    assert ValidityModel(intercept=-900.0, weights=(0.0,)).p_valid([0.5]) == 0
    with pytest.raises(ValueError, match="zip"):
        model.p_valid([0.5])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"num_agreeing": np.full(50, 51)}, "num_agreeing"),
        ({"num_asked": np.zeros(50, dtype=int), "num_agreeing": np.zeros(50, dtype=int)}, "num_agreeing"),
        ({"p_labels": np.full((50, 1), 1.5)}, "between 0 and 1"),
        ({"p_labels": np.full((50, 1), math.nan)}, "between 0 and 1"),
        ({"p_labels": np.zeros((50, 0))}, "a column for each oracle"),
    ],
)
def test_impossible_answers_are_refused(change, reason):
    with pytest.raises(ValueError, match=reason):
        dataclasses.replace(simulated(50), **change)


def test_figures_of_a_rule_by_hand():
    """Ten images: shares of people, and a rule that keeps six of them."""
    shares = np.array([1.0, 0.9, 0.8, 0.8, 0.7, 0.6, 0.4, 0.2, 0.0, 0.0])
    kept = np.array([True, True, True, False, True, False, True, True, False, False])
    figures = kept_quality(kept, shares)
    assert figures.share_kept == 0.6 and figures.precision == 0.5 and figures.people == pytest.approx(4 / 6, abs=1e-5)
    assert figures.wrong_pass == 0.5 and figures.rejected_pass == 0.5
    # 4 of 5 people are 0.8, whatever a quotient rounds to.
    assert has_agreed(np.array([4 / 5, 0.7999])).tolist() == [True, False]
    nothing = kept_quality(np.zeros(10, dtype=bool), shares)
    assert nothing.precision is None and nothing.people is None and nothing.wrong_pass == 0


def test_bins_hold_equally_many_images():
    estimates = np.linspace(0, 1, 95)
    bins = calibration_bins(estimates, estimates**2)
    assert sorted({count for _, _, count in bins}) == [10, 11] and len(bins) == 9
    assert [estimate for estimate, _, _ in bins] == sorted(estimate for estimate, _, _ in bins)


def test_the_area_under_the_curve_is_that_of_scikit_learn():
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(0)
    estimates, agreed = rng.integers(0, 20, 300) / 20, rng.random(300) < 0.7
    assert auc(estimates, agreed) == pytest.approx(roc_auc_score(agreed, estimates), abs=1e-6)
    assert auc(estimates, np.ones(300, dtype=bool)) is None

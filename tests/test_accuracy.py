"""Accuracies by arm and context, errors on generated samples and on test images, and the findings in words."""

from __future__ import annotations

import numpy as np
import pytest

from engine.studies.retrain.accuracy import Attempt, compare, compare_errors
from engine.studies.retrain.findings import findings


def test_differences_are_paired_seed_by_seed():
    """Seeds that differ much, arms that differ by the same: an unpaired interval would be wide."""
    base = [np.array([True] * good + [False] * (10 - good)) for good in (2, 5, 8)]
    better = [np.array([True] * (good + 1) + [False] * (9 - good)) for good in (2, 5, 8)]
    right = {"before": [base[0]], "none": base, "accepted": better}
    compared = compare(right, [("a",)] * 5 + [("b", "b")] * 3 + [()] * 2)
    difference = compared.overall.differences["accepted"]
    assert difference.value == pytest.approx(0.1) and difference.high - difference.low < 1e-9
    assert {row.context: row.num_images for row in compared.contexts} == {"a": 5, "b": 3}
    assert compared.overall.num_images == 10 and compared.overall.before.value == 0.2


def test_losses_and_missing_correlations_are_said():
    """A context that retraining harms is named with its interval; seeds that agree are no interval; too few contexts
    have no rank correlation."""
    good = np.ones(40, bool)
    harmed = [np.r_[good[:20], np.zeros(10, bool), np.zeros(10 - seed, bool), good[:seed]] for seed in (0, 1)]
    right = {"before": [good], "none": [good, good], "accepted": harmed}
    compared = compare(right, [("kept",)] * 20 + [("same",)] * 10 + [("",)] * 10)
    attempts = [Attempt("kept", True, True)] * 10 + [Attempt("", False, True)] * 30 + [Attempt("far", True, True)]
    found = compare_errors(attempts, compared)
    ranked = {row.context: (row.num_generated, row.is_ranked) for row in found.rows}
    assert ranked == {"": (0, False), "kept": (10, True)}
    said = "\n".join(findings(compared, found))
    assert "interval below zero: no context -95.0 (-158.5 to -31.5) (by chance alone, about 0.1 of 3" in said
    assert "no interval: same -100.0 (in every seed)." in said
    assert found.spearman is None and "1 contexts have 10 valid" in said


def test_the_weakest_context_comes_first_and_errors_are_counted():
    """Accuracies before by hand, with Wilson's interval of the errors; a sample that is not valid is not counted."""
    before = np.array([True] * 9 + [False] + [True] * 3 + [False] * 7 + [True] * 10)
    contexts = [("strong",)] * 10 + [("weak",)] * 10 + [("perfect",)] * 10
    after = np.array([True] * 20 + [False] * 10)
    compared = compare({"before": [before], "none": [before, before], "accepted": [after, after]}, contexts)
    assert [(row.context, row.before.value) for row in compared.contexts] == [
        ("weak", 0.3), ("strong", 0.9), ("perfect", 1.0)
    ]  # fmt: skip
    gains = {row.context: row.differences["accepted"].value for row in compared.contexts}
    assert gains == pytest.approx({"weak": 0.7, "strong": 0.1, "perfect": -1.0})
    errors = {"weak": 9, "strong": 5, "perfect": 0}
    attempts = [Attempt(name, True, row < number) for name, number in errors.items() for row in range(10)]
    invalid = [Attempt("perfect", False, True)] * 5
    agreement = compare_errors([*attempts, *invalid], compared)
    rows = {row.context: row for row in agreement.rows}
    assert {name: row.generated.value for name, row in rows.items()} == {"weak": 0.9, "strong": 0.5, "perfect": 0.0}
    assert {name: row.test.value for name, row in rows.items()} == {"weak": 0.7, "strong": 0.1, "perfect": 0.0}
    assert rows["perfect"].num_generated == 10 and agreement.num_ranked == 3
    assert agreement.spearman == pytest.approx(1.0)
    assert rows["weak"].test.low < 0.7 < rows["weak"].test.high

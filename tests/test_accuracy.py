"""Accuracies by arm and context, errors on generated samples and on test images, and the findings in words."""

from __future__ import annotations

import numpy as np
import pytest

from engine.studies.compare.significance import holm
from engine.studies.retrain.accuracy import Attempt, compare, compare_errors
from engine.studies.retrain.changes import compare_arms, weak_contexts
from engine.studies.retrain.findings import findings


def test_differences_are_paired_seed_by_seed_and_image_by_image():
    """Seeds that differ much, arms that differ by the same eight images: unpaired, the interval would be wide."""
    base = [np.arange(400) < good for good in (100, 200, 300)]
    better = [right | (np.arange(400) >= 392) for right in base]
    right = {"before": [base[0]], "none": base, "accepted": better}
    compared = compare(right, [("a",)] * 200 + [("b", "b")] * 150 + [()] * 50)
    difference = compared.overall.differences["accepted"]
    assert difference.value == 0.02 and 0 < difference.low < difference.high < 0.04
    assert {row.context: row.num_images for row in compared.contexts} == {"a": 200, "b": 150}
    assert compared.overall.num_images == 400 and compared.overall.before.value == 0.25
    assert compared.contexts[0].differences["accepted"].value == 0


def arms_with_losses() -> tuple[dict[str, list[np.ndarray]], list[tuple[str, ...]]]:
    """A weak context that gains, one that loses twelve images, one that loses a single one, one that is kept."""
    before = np.r_[np.zeros(60, bool), np.ones(340, bool)]
    accepted = np.r_[np.ones(50, bool), np.zeros(50, bool), np.ones(300, bool)]
    accepted[60:90], accepted[150] = True, False
    contexts = [("weak",)] * 100 + [("kept",)] * 100 + [("lost",)] * 100 + [("same",)] * 100
    accepted[200:212] = False
    return {"before": [before], "none": [before] * 5, "accepted": [accepted] * 5}, contexts


def test_losses_are_those_that_holm_leaves():
    """Twelve images in every seed are a loss, one is none; the weak context counts for neither; means by hand."""
    right, contexts = arms_with_losses()
    for base in ("none", "before"):
        change = compare_arms(right, contexts, arm="accepted", base=base)
        assert [row.context for row in change.weak] == ["weak"] and [row.context for row in change.worse] == ["lost"]
        assert change.gain and change.gain.value == pytest.approx(0.4)
        assert change.others and change.others.value == pytest.approx(-0.13 / 3) and change.others.high < 0
        by_name = {row.context: row for row in change.contexts}
        p_values = [by_name[name].p_worse for name in ("kept", "lost", "same")]
        assert [by_name[name].p_holm for name in ("kept", "lost", "same")] == pytest.approx(holm(p_values))
        assert by_name["same"].change.value == 0 and by_name["weak"].p_holm is None
    reverse = compare_arms(right, contexts, arm="none", base="accepted", weak=())
    assert [row.context for row in reverse.worse] == ["weak"] and reverse.gain is None
    everything = compare_arms(right, contexts, arm="accepted", base="none", weak=("weak", "kept", "lost", "same"))
    assert everything.others is None and not everything.worse and everything.gain
    with pytest.raises(ValueError, match="5 and 2 seeds"):
        compare_arms(right | {"none": right["none"][:2]}, contexts, arm="accepted", base="none")


def test_weak_is_what_is_surely_below_the_rest():
    """80 of 100 is, where all are at 90; 88 of 100 may be chance, and so may 2 of 3."""
    shares = {"weak": (80, 100), "chance": (88, 100), "few": (2, 3), "strong": (99, 100)}
    before = np.concatenate([np.arange(total) < good for good, total in shares.values()])
    contexts = [(name,) for name, (_, total) in shares.items() for _ in range(total)]
    assert weak_contexts({"before": [before]}, contexts) == ("weak",)


def test_images_of_one_scan_are_drawn_together():
    """A loss of one scan in every context is the loss of one image, not of ten."""
    before = np.ones(300, bool)
    after = before.copy()
    after[::30] = False
    contexts = [(f"c{row // 30}",) for row in range(300)]
    right = {"before": [before], "none": [before] * 5, "accepted": [after] * 5}
    apart = compare_arms(right, contexts, arm="accepted", base="none", weak=())
    together = compare_arms(
        right, contexts, arm="accepted", base="none", weak=(), origins=[f"scan {row % 30}" for row in range(300)]
    )
    assert apart.others and together.others and apart.others.value == together.others.value
    assert apart.others.high < 0 < together.others.high


def test_losses_and_missing_correlations_are_said():
    """A context that retraining harms is named with its interval; too few contexts have no rank correlation."""
    right, contexts = arms_with_losses()
    compared = compare(right, contexts)
    attempts = [Attempt("kept", True, True)] * 10 + [Attempt("lost", False, True)] * 30 + [Attempt("far", True, True)]
    found = compare_errors(attempts, compared)
    ranked = {row.context: (row.num_generated, row.is_ranked) for row in found.rows}
    assert ranked == {"lost": (0, False), "kept": (10, True)}
    said = findings(compared, found, "accepted")
    assert said[1].startswith("Weak: weak: 40.0% before, 40.0% after real images alone, 80.0% in arm accepted;")
    assert said[2].startswith("Lost, accepted less none: mean -4.3 (") and " over 3 other contexts; " in said[2]
    assert "significantly worse (Holm over 3, p < 0.05): lost -12.0 (" in said[2] and said[2].count("(") == 3
    assert said[3].startswith("Lost, accepted less before: mean -4.3 (")
    assert found.spearman is None and "1 contexts have 10 valid" in said[-1]
    kept = compare({"before": right["before"], "none": right["none"], "accepted": right["none"]}, contexts)
    assert "no other context significantly worse (Holm over 3)." in findings(kept, found, "accepted")[2]


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

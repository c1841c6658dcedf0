"""Oracles, rules and scores against people: precision and recall, order, and the threshold to be recommended."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.data.reading.people.population import Population
from engine.data.reading.people.results import Recommendation, RuleResult, ScoreResult
from engine.methods.corrected_shares import weighted_share
from engine.methods.discrimination import weighted_auc
from engine.methods.intervals import wilson_interval

# Precision that the lower bound at the recommended threshold reaches.
GOAL = 0.9
# From the strictest on: a threshold is recommended where it and all stricter ones reach the goal, so that each is a
# test of its own at the level of its interval (fixed sequence testing).
THRESHOLDS = (0.999, 0.99, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5)
# Scores for which a threshold is recommended; the first that is known.
RECOMMENDED = ("p_valid", "oracle_p_label_min")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reviewed:
    """The images that people looked at, [n].

    Attributes:
        rows: in the population.
        human: share of raters who say the label.
        weights: images that each one stands for.
    """

    rows: NDArray[np.intp]
    human: NDArray[np.float64]
    weights: NDArray[np.float64]


def rule_results(population: Population, reviewed: Reviewed) -> Iterator[RuleResult]:
    """Every rule that the rows allow, against people."""
    for name, takes in population.rules.items():
        yield _rule_result(name, takes, population, reviewed)


def _rule_result(name: str, takes: NDArray[np.bool_], population: Population, reviewed: Reviewed) -> RuleResult:
    taken, weights, human = takes[reviewed.rows].astype(float), reviewed.weights, reviewed.human
    errs = population.target_errs[reviewed.rows]
    return RuleResult(
        name=name,
        kept=float(takes.mean()),
        precision=weighted_share(human, weights * taken),
        recall=weighted_share(taken, weights * human),
        wrong_passed=weighted_share(taken, weights * (1 - human) * errs),
    )


def score_results(population: Population, reviewed: Reviewed) -> Iterator[ScoreResult]:
    """The area under the curve of every score that is known of the reviewed images."""
    for name, values in population.scores.items():
        here = values[reviewed.rows]
        known = ~np.isnan(here)
        if known.any():
            auc = weighted_auc(here[known], reviewed.human[known], reviewed.weights[known])
            if auc is not None:
                yield ScoreResult(name=name, auc=auc)


def recommend(population: Population, reviewed: Reviewed, goal: float) -> Recommendation | None:
    """The least threshold at which, and at all stricter ones, the lower bound of the precision reaches a goal.

    Thresholds above which too few images were looked at for any bound to reach it are passed over.

    Returns:
        None without a score that thresholds are for.
    """
    score = next((name for name in RECOMMENDED if name in population.scores), None)
    if score is None:
        return None
    values = np.nan_to_num(population.scores[score], nan=-1.0)
    best: RuleResult | None = None
    chosen: tuple[float, RuleResult] | None = None
    is_open = True
    for threshold in THRESHOLDS:
        rule = _rule_result(f"{score} >= {threshold:g}", values >= threshold, population, reviewed)
        if rule.precision is None:
            continue
        if best is None or best.precision is None or rule.precision.low > best.precision.low:
            best = rule
        if not is_open:
            continue
        if rule.precision.low >= goal:
            chosen = threshold, rule
        elif _highest_bound(reviewed.weights * (values >= threshold)[reviewed.rows]) >= goal:
            is_open = False
    if chosen is None:
        return Recommendation(score=score, goal=goal, threshold=None, rule=best)
    return Recommendation(score=score, goal=goal, threshold=chosen[0], rule=chosen[1])


def _highest_bound(weights: NDArray[np.float64]) -> float:
    """The lower bound of the precision if people agreed on every image."""
    effective = float(weights.sum()) ** 2 / float((weights**2).sum())
    return wilson_interval(effective, effective).low

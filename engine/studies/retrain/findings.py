"""The findings of a retraining in words."""

from __future__ import annotations

from engine.methods.intervals import LEVEL
from engine.studies.retrain.accuracy import (
    ACCEPTED,
    NONE,
    AccuracyRow,
    Comparison,
    ErrorAgreement,
    context_name,
    points,
)

NUM_WEAKEST = 3


def findings(comparison: Comparison, agreement: ErrorAgreement) -> list[str]:
    """A sentence for each finding; nothing beyond the figures."""
    sentences = [f"All test images: {_change(comparison.overall)}."]
    sentences += [f"Weak: {context_name(row.context)}: {_change(row)}." for row in comparison.contexts[:NUM_WEAKEST]]
    if comparison.contexts:
        sentences += _losses(comparison.contexts)
    if agreement.spearman is not None:
        sentences.append(
            "Rank correlation of the target's error rates on generated samples and on test images:"
            f" {agreement.spearman:.2f} (Spearman, {agreement.num_ranked} contexts)."
        )
    else:
        sentences.append(f"No rank correlation of generated and true errors: {agreement.reason}.")
    return sentences


def _change(row: AccuracyRow) -> str:
    return (
        f"{row.before.value:.1%} before, {row.mean(NONE):.1%} after real images alone, {row.mean(ACCEPTED):.1%} with"
        f" accepted samples; in points, accepted less none {points(row.differences[ACCEPTED])}"
    )


def _losses(rows: tuple[AccuracyRow, ...]) -> list[str]:
    """Contexts whose interval lies below zero; separately those where all seeds agree, which gives no interval."""
    lower = [row for row in rows if row.differences[ACCEPTED].high < 0]
    lost = [row for row in lower if not row.differences[ACCEPTED].is_degenerate]
    same = [row for row in lower if row.differences[ACCEPTED].is_degenerate]
    chance = f"by chance alone, about {len(rows) * (1 - LEVEL) / 2:.1f} of {len(rows)} intervals at {LEVEL:.0%} do"
    sentences = ["Lost: in no context does the interval of accepted less none lie below zero."]
    if lost:
        sentences = [f"Lost, accepted less none, interval below zero: {_listed(lost)} ({chance})."]
    if same:
        sentences.append(f"Lower by as much in every seed, which gives no interval: {_listed(same)}.")
    return sentences


def _listed(rows: list[AccuracyRow]) -> str:
    return "; ".join(f"{context_name(row.context)} {points(row.differences[ACCEPTED])}" for row in rows)

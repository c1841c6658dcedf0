"""The findings of a retraining in words."""

from __future__ import annotations

from engine.methods.intervals import LEVEL
from engine.studies.retrain.accuracy import AccuracyRow, Comparison, ErrorAgreement, context_name, points
from engine.studies.retrain.arm_records import BEFORE, NONE
from engine.studies.retrain.changes import ArmChange

MAX_WEAK, MAX_WORSE = 5, 10


def findings(comparison: Comparison, agreement: ErrorAgreement, arm: str) -> list[str]:
    """A sentence for each finding about an arm; nothing beyond the figures."""
    to_none, to_before = (comparison.change(arm, base) for base in (NONE, BEFORE))
    weak = {change.context for change in to_none.weak}
    rows = [row for row in comparison.contexts if row.context in weak]
    sentences = [f"All test images: {_change(comparison.overall, arm)}."]
    sentences += [f"Weak: {context_name(row.context)}: {_change(row, arm)}." for row in rows[:MAX_WEAK]]
    if len(rows) > MAX_WEAK:
        sentences.append(f"Weak: {len(rows) - MAX_WEAK} contexts more, in retrain.json.")
    if comparison.contexts:
        sentences += [_losses(to_none, bool(weak)), _losses(to_before, bool(weak))]
    if agreement.spearman is not None:
        sentences.append(
            "Rank correlation of the target's error rates on generated samples and on test images:"
            f" {agreement.spearman:.2f} (Spearman, {agreement.num_ranked} contexts)."
        )
    else:
        sentences.append(f"No rank correlation of generated and true errors: {agreement.reason}.")
    return sentences


def _change(row: AccuracyRow, arm: str) -> str:
    return (
        f"{row.before.value:.1%} before, {row.mean(NONE):.1%} after real images alone, {row.mean(arm):.1%} in"
        f" arm {arm}; in points, {arm} less none {points(row.differences[arm])}"
    )


def _losses(change: ArmChange, has_weak: bool) -> str:
    """What an arm costs in the contexts that were not to gain."""
    compared = f"{change.arm} less {change.base}"
    if change.others is None:
        return f"Kept, {compared}: every context is weak, so that there is none to lose in."
    which = f"{len(change.rest)} {'other ' if has_weak else ''}contexts"
    if not change.worse:
        result = f"no{' other' if has_weak else ''} context significantly worse (Holm over {len(change.rest)})"
    else:
        listed = "; ".join(f"{context_name(row.context)} {points(row.change)}" for row in change.worse[:MAX_WORSE])
        more = f"; and {len(change.worse) - MAX_WORSE} more" if len(change.worse) > MAX_WORSE else ""
        result = f"significantly worse (Holm over {len(change.rest)}, p < {1 - LEVEL:.2f}): {listed}{more}"
    return f"{'Lost' if change.worse else 'Kept'}, {compared}: mean {points(change.others)} over {which}; {result}."

"""The outcome of an ablation: tables, figures, findings, and what limits them."""

from __future__ import annotations

from collections.abc import Sequence

from engine.studies.ablate.figures import figures_of
from engine.studies.ablate.findings import findings
from engine.studies.ablate.parts import WHOLE
from engine.studies.ablate.results import Results
from engine.studies.ablate.tables import tables_of
from engine.studies.experiments.program import StudyOutcome


def outcome_of(results: Results, notes: Sequence[str]) -> StudyOutcome:
    """Tables, figures and sentences."""
    return StudyOutcome(
        tables=tables_of(results),
        figures=figures_of(results),
        findings=tuple(findings(results)),
        notes=(*results.design.notes, *_limits(results), *notes),
    )


def _limits(results: Results) -> list[str]:
    whole, notes = results.samples[WHOLE], []
    if not any(results.changes.values()):
        notes.append("differences need two samples a row; give a larger count")
    if whole.valid is None:
        notes.append("no oracle says which labels are valid: parts are judged by the target's errors alone")
    if not whole.transfer:
        notes.append("models.transfer names no classifier, so that nothing is said of transfer")
    if whole.psnr is None:
        notes.append("the request has no `twin: true`, so that nothing is said of how far guidance moves images")
    return notes

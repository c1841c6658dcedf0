"""A run and its pin: the comparison with a baseline is kept in the run, where report and `status` find it.

`engine.data.run.comparison.read_pinned` reads it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engine.data.run.comparison import keep_pinned
from engine.data.run.file_names import REPORT
from engine.data.stores.opening import open_store
from engine.report.render import write_report
from engine.studies.compare.baseline import read_baseline
from engine.studies.compare.limits import Limits
from engine.studies.compare.program import RunComparison, compare_runs
from engine.studies.compare.scored_run import read_scored_run
from engine.studies.compare.tables import comparison_document


def compare_with_pin(address: str, baseline: Path) -> RunComparison:
    """Compare a run with a baseline, and keep that in the run.

    Raises:
        RiskforgeError: they share nothing that could be compared, or the store refuses.
    """
    comparison = compare_runs(read_baseline(baseline), read_scored_run(address))
    keep_in_run(address, comparison_document(comparison, Limits(), [], str(baseline)))
    return comparison


def keep_in_run(address: str, document: dict[str, Any]) -> None:
    """Keep the comparison of a run, or a rescoring, with its baseline in its folder, and write its report again.

    Args:
        document: as `compare --json` prints it.

    Raises:
        RiskforgeError: the store refuses, or the report cannot be written.
    """
    store = open_store(address)
    keep_pinned(store, document)
    if store.exists(REPORT):
        write_report(store)

"""A run and its pin: the comparison with a baseline is kept in the run, where report and `status` find it."""

from __future__ import annotations

from typing import Any

from engine.data.run.comparison import keep_pinned
from engine.data.run.file_names import REPORT
from engine.data.stores.opening import open_store
from engine.report.render import write_report


def keep_in_run(address: str, document: dict[str, Any]) -> None:
    """Keep the comparison of a run, or a rescoring, with its baseline in its folder, and write its report again.

    `engine.data.run.comparison.read_pinned` reads it.

    Args:
        document: as `compare --json` prints it.

    Raises:
        RiskforgeError: the store refuses, or the report cannot be written.
    """
    store = open_store(address)
    keep_pinned(store, document)
    if store.exists(REPORT):
        write_report(store)

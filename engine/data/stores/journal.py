"""The journal: events of a run, line by line, for human readers and `riskforge status`; no decision depends on it."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

from engine.data.stores.base import EVENTS, Store
from engine.errors import OutputError
from engine.methods.strict_json import parse_json

MAX_TAIL_BYTES = 1_000_000
# Event of a sentence for the user, in `text`.
NOTICE = "notice"
END_SECONDS = 20.0


class Journal:
    """Appends to `_state/events/NUMBER.jsonl`, a file for each driver.

    Args:
        number: of the driver, as in its lease.
    """

    def __init__(self, store: Store, number: int) -> None:
        self._store = store
        self._name = f"{EVENTS}/{number:06d}.jsonl"

    def note(self, event: str, **details: Any) -> None:
        """Add a line. A full disk is reported by other writers."""
        line = json.dumps({"time": round(time.time(), 3), "event": event} | details, ensure_ascii=False)
        with contextlib.suppress(OutputError):
            self._store.append(self._name, line + "\n")

    def keep(self, *, is_end: bool = False) -> None:
        """Make the lines visible to others; called often, and at the end.

        The end does not wait long: with a broken network it would use up all its retries.
        """
        if is_end:
            last = threading.Thread(target=self._flush, name="journal", daemon=True)
            last.start()
            last.join(END_SECONDS)
        else:
            self._flush(if_due=True)

    def _flush(self, *, if_due: bool = False) -> None:
        with contextlib.suppress(OutputError):
            self._store.flush(if_due=if_due)


def read_events(store: Store) -> Iterator[dict[str, Any]]:
    """The latest lines of the latest driver, oldest first; those that were cut short are left out."""
    names = store.list(EVENTS)
    if not names:
        return
    try:
        lines = store.tail(names[-1], MAX_TAIL_BYTES).splitlines()
    except OutputError as error:
        if not isinstance(error.__cause__, FileNotFoundError):
            raise
        return
    for line in lines:
        with contextlib.suppress(ValueError):
            event = parse_json(line)
            if isinstance(event, dict):
                yield event

"""The journal: what happened in a run, line by line, for people and `riskforge status`. Nothing is decided by it."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from typing import Any

from engine.dataset.store import EVENTS, Store

MAX_TAIL_BYTES = 1_000_000


class Journal:
    """Appends to `_state/events/NUMBER.jsonl`, a file for each driver.

    Args:
        number: of the driver, as its lease has it.
    """

    def __init__(self, store: Store, number: int) -> None:
        self._path = store.path(f"{EVENTS}/{number:06d}.jsonl")

    def note(self, event: str, **about: Any) -> None:
        """Add a line. A disk that is full is told by those who write more."""
        line = json.dumps({"time": round(time.time(), 3), "event": event} | about, ensure_ascii=False)
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")


def read_events(store: Store) -> Iterator[dict[str, Any]]:
    """The latest lines of the latest driver, oldest first; those that were cut short are left out."""
    names = store.list(EVENTS)
    if not names:
        return
    with contextlib.suppress(FileNotFoundError), store.path(names[-1]).open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - MAX_TAIL_BYTES))
        for line in file.read().splitlines():
            with contextlib.suppress(ValueError):
                event = json.loads(line)
                if isinstance(event, dict):
                    yield event

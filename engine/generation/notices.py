"""What the hardware made a worker do otherwise than the job says: remembered, and reported once."""

from __future__ import annotations

import threading
from collections.abc import Iterable


class Notices:
    """Sentences for the user, each taken once, whichever thread adds it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: set[str] = set()
        self._waiting: list[str] = []

    def add(self, text: str) -> None:
        """Remember a sentence; one that is known already is not repeated."""
        with self._lock:
            if text not in self._known:
                self._known.add(text)
                self._waiting.append(text)

    def give_back(self, texts: Iterable[str]) -> None:
        """Let sentences that were taken and not stored be taken again."""
        with self._lock:
            self._waiting[:0] = texts

    def take(self) -> list[str]:
        """The sentences since the last call, in their order."""
        with self._lock:
            taken, self._waiting = self._waiting, []
            return taken

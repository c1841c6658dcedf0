"""Which share of the workers' time goes into sampling and scoring."""

from __future__ import annotations


class SamplingShare:
    """Sums up the time of workers from ready to their last commit, and the part of it spent sampling."""

    def __init__(self) -> None:
        self._since: dict[int, float] = {}
        self._sampling_seconds = 0.0
        self._total_seconds = 0.0

    def add_worker(self, worker: int, now: float) -> None:
        """Record that a worker became ready."""
        self._since[worker] = now

    def add_commit(self, worker: int, sampling_seconds: float, now: float) -> None:
        """Record that a worker committed a shard."""
        self._total_seconds += now - self._since.get(worker, now)
        self._since[worker] = now
        self._sampling_seconds += sampling_seconds

    def remove_worker(self, worker: int) -> None:
        """Record that a worker is gone; its time since the last commit does not count."""
        self._since.pop(worker, None)

    def value(self) -> float | None:
        """The share, in [0, 1], over all workers; None if nothing was committed."""
        return min(1.0, self._sampling_seconds / self._total_seconds) if self._total_seconds else None

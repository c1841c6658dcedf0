"""Quotas: how many samples to make of a class until enough of them are accepted.

A request with a rule of acceptance has a quota of accepted samples for each class. Its samples are made in rounds,
class by class: the first, the pilot, is as large as the quota, as fewer attempts could not fill it; its yield decides
the size of the next, and so on until the quota is filled or the limit of attempts is reached. A round makes what is
missing at the yield so far and no more, so that the last one leaves few samples beyond the quota.

Rounds are decided in an order that does not depend on the speed of workers: pass by pass, in the order of requests and
classes. A class is decided when all its shards are settled (committed, or in quarantine) and those before it in the
pass are decided. So plan and numbers of shards follow from what is committed alone, after a resume or with other
workers too; meanwhile the workers are busy with the rounds of other classes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from engine.job.plan import Extent, Plan, RequestPlan, ShardSpec

# A low yield is an uncertain estimate: a round has at most this many times the attempts of all rounds before.
MAX_GROWTH = 4

Place = tuple[int, int]


class Counts(Protocol):
    """Samples of a shard: of any status, and accepted ones."""

    @property
    def attempted(self) -> int:
        """Samples of any status."""
        ...

    @property
    def accepted(self) -> int:
        """Accepted samples."""
        ...


@dataclass(slots=True)
class _Cell:
    """Progress of a class of a request; `planned` counts attempts in planned shards, the others in committed ones."""

    wanted: int
    limit: int
    planned: int = 0
    num_rounds: int = 0
    attempted: int = 0
    accepted: int = 0
    num_unsettled: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """The state of the quota of a class.

    Attributes:
        request: number of the request.
        cell: number of the class, or subset, within the request.
        attempted: samples made, of any status.
    """

    request: int
    cell: int
    wanted: int
    accepted: int
    attempted: int

    @property
    def missing(self) -> int:
        """Accepted samples that are lacking."""
        return max(0, self.wanted - self.accepted)


class Quotas:
    """The quotas of a plan and their progress. No clock, no files: the shards that are settled decide everything.

    Args:
        requests: the plan's requests.
        extents: the shards that are already planned, in order.
        samples_per_shard: of further rounds.
    """

    def __init__(self, requests: tuple[RequestPlan, ...], extents: Iterable[Extent], samples_per_shard: int) -> None:
        self._samples_per_shard = samples_per_shard
        self._cells = {
            (request.number, number): _Cell(wanted=request.spec.num_wanted, limit=request.spec.attempts_limit)
            for request in requests
            if request.spec.has_quota
            for number in range(len(request.cells))
        }
        for extent in extents:
            # A curated run has the rounds of its parent, and no quota.
            if (extent.request, extent.cell) in self._cells:
                self._plan(extent)
        order = sorted(self._cells, key=lambda place: (self._cells[place].num_rounds, place))
        self._open = deque(order)

    @property
    def is_final(self) -> bool:
        """Whether no further round will be added."""
        return not self._open

    def settle(self, shard: ShardSpec, attempted: int, accepted: int) -> None:
        """Count the samples of a shard, zero for a shard in quarantine. Call once for each shard."""
        cell = self._cells.get((shard.request, shard.cell))
        if cell is None:
            return
        cell.attempted += attempted
        cell.accepted += accepted
        cell.num_unsettled -= 1

    def advance(self) -> tuple[Extent, ...]:
        """The rounds that can be decided now, in order. They count as planned from here on."""
        added = []
        while self._open and not self._cells[self._open[0]].num_unsettled:
            place = self._open.popleft()
            cell = self._cells[place]
            if size := round_size(cell.wanted, cell.limit, cell.planned, cell.attempted, cell.accepted):
                extent = _extent(place, cell.planned, size, self._samples_per_shard)
                self._plan(extent)
                self._open.append(place)
                added.append(extent)
        return tuple(added)

    def standings(self) -> list[Standing]:
        """The state of each quota, in order."""
        return [
            Standing(request=request, cell=number, wanted=cell.wanted, accepted=cell.accepted, attempted=cell.attempted)
            for (request, number), cell in self._cells.items()
        ]

    def _plan(self, extent: Extent) -> None:
        cell = self._cells[extent.request, extent.cell]
        cell.planned = extent.stop
        cell.num_rounds += 1
        cell.num_unsettled += extent.num_shards


def round_size(wanted: int, limit: int, planned: int, attempted: int, accepted: int) -> int:
    """Attempts in a class's round after the first; 0 where its quota is filled or the limit of attempts is reached.

    Args:
        wanted: the quota of accepted samples.
        limit: attempts at most.
        planned: attempts in the rounds so far, those of shards in quarantine too.
        attempted, accepted: samples in its committed shards.
    """
    missing, rest = wanted - accepted, limit - planned
    if missing <= 0 or rest <= 0:
        return 0
    # Laplace's estimate of the yield, (accepted + 1) / (attempted + 2), is never zero; in whole numbers, as they
    # are the same on every machine. To the nearest: rounded up, a round for one sample at 0.9 would make two.
    needed = (2 * missing * (attempted + 2) + accepted + 1) // (2 * (accepted + 1))
    return min(rest, needed, MAX_GROWTH * planned)


def replay(plan: Plan, committed: Mapping[int, Counts], quarantined: Iterable[int], samples_per_shard: int) -> Quotas:
    """The quotas of a plan after the shards that earlier sessions committed or put in quarantine.

    Args:
        committed: counts of shards by number.
        quarantined: shards without samples; a shard that is committed after all counts as committed.
    """
    quotas = Quotas(plan.requests, plan.extents, samples_per_shard)
    if quotas.is_final:
        return quotas
    for number, counts in committed.items():
        quotas.settle(plan.shard(number), counts.attempted, counts.accepted)
    for number in quarantined:
        if number not in committed:
            quotas.settle(plan.shard(number), 0, 0)
    return quotas


def _extent(place: Place, start: int, size: int, samples_per_shard: int) -> Extent:
    request, cell = place
    return Extent(request=request, cell=cell, start=start, stop=start + size, samples_per_shard=samples_per_shard)

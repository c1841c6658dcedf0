"""Quotas: how many samples to make of a class until enough of them are accepted.

A request with a rule of acceptance wants so many accepted samples of each class. Its samples are made in rounds, class
by class: the first, the pilot, is as large as the quota, as no fewer attempts could fill it; what it yields decides the
next, and so on until the quota is filled or the limit of attempts is reached.

Rounds are decided in an order that does not depend on who was quicker: pass by pass, in the order of requests and
classes. A class is decided when all its shards are settled (committed, or in quarantine) and those before it in the
pass are decided. So plan and numbers of shards follow from what is committed alone, after a resume or with other
workers too; meanwhile the workers are busy with the rounds of other classes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from engine.job.plan import EVERY_CELL, MIN_ROUND, Extent, Plan, RequestPlan, ShardSpec

# A poor yield is poorly measured: a round has at most so many times the attempts of all rounds before.
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
    """How far a class of a request is; attempts are in shards that are planned, the other numbers in committed ones."""

    wanted: int
    limit: int
    planned: int = 0
    num_rounds: int = 0
    attempted: int = 0
    accepted: int = 0
    num_unsettled: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """What became of the quota of a class.

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
    """The quotas of a plan and how far they are. No clock, no files: what is told here decides all.

    Args:
        requests: the plan's requests.
        extents: what is planned already, in order.
        samples_per_shard: of the rounds to come.
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
            if extent.cell != EVERY_CELL:
                self._plan(extent)
        order = sorted(self._cells, key=lambda place: (self._cells[place].num_rounds, place))
        self._open = deque(order)

    @property
    def is_final(self) -> bool:
        """Whether no round will be added any more."""
        return not self._open

    def settle(self, shard: ShardSpec, attempted: int, accepted: int) -> None:
        """Note what a shard has given, none where it is in quarantine. Once for each shard."""
        if shard.cell == EVERY_CELL:
            return
        cell = self._cells[shard.request, shard.cell]
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
        """How far each quota is, in order."""
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
    # are the same on every machine.
    needed = -(-missing * (attempted + 2) // (accepted + 1))
    return min(rest, max(min(needed, MAX_GROWTH * planned), MIN_ROUND))


def replay(plan: Plan, committed: Mapping[int, Counts], quarantined: Iterable[int], samples_per_shard: int) -> Quotas:
    """The quotas of a plan after what was committed, or put in quarantine, in earlier sessions.

    Args:
        committed: counts of shards by number.
        quarantined: shards that give nothing; those that are committed after all count as such.
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

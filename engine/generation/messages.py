"""What goes into the scheduler and what comes out of it: events, actions, and the rules it goes by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from engine.errors import EXIT_USER


class Report(Protocol):
    """Hears from a worker how far a shard is."""

    def __call__(self, num_done: int, batch_seconds: float = 0.0, batch_limit: int = 0) -> None:
        """So many samples are done; see `ShardProgress`."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """When patience ends, in seconds.

    Attributes:
        limit_factor: a worker that was not heard of for so many times the slowest batch of its request hangs;
        min_limit_seconds: but not before this,
        first_limit_seconds: nor before this, where no batch of the request was measured yet; whatever shows that it
            gets further (`WorkerActive`) is heard, too.
        start_limit_seconds: a worker that loads its models and shows no progress for so long hangs.
        check_seconds: between two looks for workers that hang.
        max_backoff_seconds: longest wait before another worker is started where they fail to start. The first is
            replaced at once, then the wait begins at one second and doubles.
        deadline: moment, on the clock of `Tick`, from when on nothing is begun; None for none.
        grace_seconds: what is in work then, or when the run is asked to end, has so long to finish.
        max_strikes: a shard goes into quarantine after so many faults.
        max_start_faults: the run is given up when so many workers in a row fail to start while none is ready.
    """

    limit_factor: float = 10.0
    min_limit_seconds: float = 300.0
    first_limit_seconds: float = 600.0
    start_limit_seconds: float = 600.0
    check_seconds: float = 2.0
    max_backoff_seconds: float = 60.0
    deadline: float | None = None
    grace_seconds: float = 60.0
    max_strikes: int = 3
    max_start_faults: int = 3


@dataclass(frozen=True, slots=True)
class Tick:
    """The time, in seconds from any beginning; it never goes back."""

    now: float


@dataclass(frozen=True, slots=True)
class WorkerPlaced:
    """A worker has a machine and begins to load its models.

    Attributes:
        node_kind: what the machine is; equal ones run out of memory at equal sizes.
    """

    worker: int
    node_kind: str


@dataclass(frozen=True, slots=True)
class WorkerActive:
    """A worker gets further with what no batch measures: it loads, downloads, compiles, or does a step of a batch."""

    worker: int


@dataclass(frozen=True, slots=True)
class WorkerReady:
    """A worker has loaded what it needs for a start."""

    worker: int


@dataclass(frozen=True, slots=True)
class ShardProgress:
    """So many samples of a shard are done.

    Attributes:
        batch_seconds: time that the last batch took, 0 where none is done.
        batch_limit: largest batch that has fitted since memory ran out; 0 where it never has.
    """

    worker: int
    shard: int
    num_done: int
    batch_seconds: float = 0.0
    batch_limit: int = 0


@dataclass(frozen=True, slots=True)
class ShardSampled:
    """A worker has sampled a shard and begins the next one, while this one is encoded, written and committed."""

    worker: int
    shard: int


@dataclass(frozen=True, slots=True)
class ShardDone:
    """A worker has committed a shard."""

    worker: int
    shard: int


@dataclass(frozen=True, slots=True)
class ShardError:
    """An exception came out of a shard. The worker's process lives, in an unknown condition.

    Attributes:
        every_sample: whether every sample of the request's first batch there raised it.
    """

    worker: int
    shard: int
    message: str
    every_sample: bool = False


@dataclass(frozen=True, slots=True)
class WorkerLost:
    """A worker is gone, with its node (nobody's fault) or alone."""

    worker: int
    node_lost: bool
    message: str


@dataclass(frozen=True, slots=True)
class UserFault:
    """Something that only the user can mend, or a store that is lost: no other attempt would fare better.

    Attributes:
        exit_code: of the command that ends with it.
    """

    message: str
    exit_code: int = EXIT_USER


@dataclass(frozen=True, slots=True)
class Lot:
    """Shards in a row that are of one kind.

    Attributes:
        kind: number of the request.
        model: number of the diffusion model that the request samples with.
    """

    num_shards: int
    kind: int = 0
    model: int = 0


@dataclass(frozen=True, slots=True)
class PlanGrown:
    """More shards are planned, numbered on from the last; or none, and it is final that no more will come."""

    lots: tuple[Lot, ...]
    is_final: bool


@dataclass(frozen=True, slots=True)
class Drain:
    """Begin nothing more; what is in work has the time of `Rules.grace_seconds`."""


@dataclass(frozen=True, slots=True)
class StartWorker:
    """Start a worker under a number that was not used before."""

    worker: int


@dataclass(frozen=True, slots=True)
class StopWorker:
    """End a worker; what it still does is of no interest."""

    worker: int


@dataclass(frozen=True, slots=True)
class Assign:
    """Queue a shard on a worker; attempts are counted from 1.

    Attributes:
        batch_limit: largest batch that fits machines of this kind, as far as is known; 0 for no limit.
    """

    worker: int
    shard: int
    attempt: int
    batch_limit: int = 0


@dataclass(frozen=True, slots=True)
class Replaced:
    """A worker hung and is replaced: for the eyes of the user, `StopWorker` comes with it."""

    worker: int
    message: str


@dataclass(frozen=True, slots=True)
class Quarantine:
    """Leave a shard out: it was at fault too often."""

    shard: int
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Finished:
    """Every shard is committed or in quarantine."""


@dataclass(frozen=True, slots=True)
class Drained:
    """Nothing is in work any more, or its time is over; shards are left for a later run."""


@dataclass(frozen=True, slots=True)
class Abort:
    """Give the run up. `user_fault`: the message is for the user, as `UserFault`; else something is broken."""

    message: str
    user_fault: bool
    exit_code: int = EXIT_USER


OfWorker = (
    WorkerPlaced | WorkerActive | WorkerReady | ShardProgress | ShardSampled | ShardDone | ShardError | WorkerLost
)
Event = OfWorker | Tick | UserFault | PlanGrown | Drain
Action = StartWorker | StopWorker | Assign | Replaced | Quarantine | Finished | Drained | Abort

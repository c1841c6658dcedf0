"""The scheduler's interface: the events it takes, the actions it returns, and the limits it enforces."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine.errors import EXIT_USER

if TYPE_CHECKING:
    from engine.generation.usage import BatchUsage


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerLimits:
    """Timeouts and limits, in seconds.

    Attributes:
        limit_factor: a worker hangs if its last heartbeat is older than this many times the slowest batch of its
            request,
        min_limit_seconds: and older than this,
        first_limit_seconds: and, while no batch of the request has been measured, older than this; until then every
            sign of progress (`WorkerActive`) counts as a heartbeat.
        start_limit_seconds: a worker that is loading its models hangs after this long without progress.
        check_seconds: time between two liveness checks.
        max_backoff_seconds: longest wait before the next start when workers fail to start. The first replacement
            starts at once; after that the wait is one second and doubles with every failure.
        deadline: time, on the clock of `Tick`, after which no shard is started; None for no deadline.
        grace_seconds: how long shards in flight may take to finish after the deadline or a request to stop.
        max_strikes: a shard is quarantined after this many faults.
        max_start_faults: the run is given up when this many workers in a row fail to start while none is ready.
        max_node_faults: a node is avoided after this many faults in a row, of different shards or starts, if there is
            another.
        idle_seconds: how long a worker is kept that waits for the next round of a quota, if loading took no longer.
        second_attempt_factor: at the end, a shard that takes longer than this many times the usual duration, or that is
            expected to take that much longer than a fresh attempt, is attempted by another worker too; infinity: never.
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
    max_node_faults: int = 3
    idle_seconds: float = 30.0
    second_attempt_factor: float = math.inf


@dataclass(frozen=True, slots=True)
class Tick:
    """The current time, in seconds from any origin; monotonic."""

    now: float


@dataclass(frozen=True, slots=True)
class WorkerPlaced:
    """A worker has been given a machine and starts loading its models.

    Attributes:
        node_kind: type of the machine; machines of one type run out of memory at the same batch size.
        node: identifies the machine; empty if there is only one.
        machine: its name, for people; the scheduler does not read it.
    """

    worker: int
    node_kind: str
    node: str = ""
    machine: str = ""


@dataclass(frozen=True, slots=True)
class WorkerActive:
    """A heartbeat from work that no batch time measures: loading, downloading, compiling, or a step of a batch."""

    worker: int


@dataclass(frozen=True, slots=True)
class WorkerReady:
    """A worker has loaded its models."""

    worker: int


@dataclass(frozen=True, slots=True)
class ShardProgress:
    """Progress of a shard.

    Attributes:
        num_done: samples done so far.
        batch_seconds: duration of the last batch, 0 before the first one is done.
        batch_limit: largest batch size that has fitted since memory ran out; 0 for none, or none any more.
        usage: of the last batch, for people; the scheduler does not read it.
    """

    worker: int
    shard: int
    num_done: int
    batch_seconds: float = 0.0
    batch_limit: int = 0
    usage: BatchUsage | None = None


@dataclass(frozen=True, slots=True)
class ShardSampled:
    """A worker has sampled a shard and starts the next one while this one is encoded, written and committed."""

    worker: int
    shard: int


@dataclass(frozen=True, slots=True)
class ShardDone:
    """A worker has committed a shard."""

    worker: int
    shard: int


@dataclass(frozen=True, slots=True)
class ShardError:
    """A shard raised an exception. The worker's process is alive, in an unknown state.

    Attributes:
        every_sample: whether every sample of the request's first batch on that worker raised it.
    """

    worker: int
    shard: int
    message: str
    every_sample: bool = False


@dataclass(frozen=True, slots=True)
class WorkerLost:
    """A worker is gone: with its node, which is attributed to no shard, or alone."""

    worker: int
    node_lost: bool
    message: str


@dataclass(frozen=True, slots=True)
class UserFault:
    """An error that only the user can fix, or a store that cannot be reached: a retry would fail the same way.

    Attributes:
        exit_code: exit code of the command that ends with it.
    """

    message: str
    exit_code: int = EXIT_USER


@dataclass(frozen=True, slots=True)
class ShardRange:
    """Consecutive shards of one request.

    Attributes:
        request: number of the request.
        model: number of the diffusion model that the request samples with.
    """

    num_shards: int
    request: int = 0
    model: int = 0


@dataclass(frozen=True, slots=True)
class PlanGrown:
    """The plan has more shards, numbered on from the last one; or none, and it is final."""

    ranges: tuple[ShardRange, ...]
    is_final: bool


@dataclass(frozen=True, slots=True)
class CapacityChanged:
    """The machines have room for another number of workers.

    Attributes:
        num_workers: workers at a time; at least one is always asked for.
        nodes: the machines that have room for a worker, those to avoid included.
    """

    num_workers: int
    nodes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Drain:
    """Start no more shards; those in flight may finish within `SchedulerLimits.grace_seconds`."""


@dataclass(frozen=True, slots=True)
class StartWorker:
    """Start a worker with a number that was never used before."""

    worker: int


@dataclass(frozen=True, slots=True)
class StopWorker:
    """Stop a worker; whatever it still does is ignored."""

    worker: int


@dataclass(frozen=True, slots=True)
class Assign:
    """Queue a shard on a worker; attempts are counted from 1.

    Attributes:
        batch_limit: largest batch size known to fit machines of this type; 0 for no limit.
        is_second: whether another worker has the shard in flight; the first one that has sampled it goes on.
    """

    worker: int
    shard: int
    attempt: int
    batch_limit: int = 0
    is_second: bool = False


@dataclass(frozen=True, slots=True)
class Replaced:
    """Report to the user that a hanging worker is replaced; comes with a `StopWorker`."""

    worker: int
    message: str


@dataclass(frozen=True, slots=True)
class AvoidNodes:
    """Start no worker on these machines; replaces what was to be avoided before.

    Attributes:
        message: why there is one more; empty if there is not.
    """

    nodes: tuple[str, ...]
    message: str = ""


@dataclass(frozen=True, slots=True)
class Quarantine:
    """Skip a shard that has reached the limit of strikes."""

    shard: int
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Finished:
    """Every shard is committed or in quarantine."""


@dataclass(frozen=True, slots=True)
class Drained:
    """Nothing is in flight any more, or the grace period is over; shards are left for a later run."""


@dataclass(frozen=True, slots=True)
class Abort:
    """Give up the run.

    Attributes:
        user_fault: whether the message is for the user to act on, as in `UserFault`; otherwise something is broken.
    """

    message: str
    user_fault: bool
    exit_code: int = EXIT_USER


WorkerEvent = (
    WorkerPlaced | WorkerActive | WorkerReady | ShardProgress | ShardSampled | ShardDone | ShardError | WorkerLost
)
Event = WorkerEvent | Tick | UserFault | PlanGrown | CapacityChanged | Drain
Action = StartWorker | StopWorker | Assign | Replaced | AvoidNodes | Quarantine | Finished | Drained | Abort

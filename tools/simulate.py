"""The real scheduler in a simulated world: `python -m tools.simulate schedules 10000`, or `... scale`.

Discrete events, drawn from a seed, drive `engine.driver.scheduling` and `engine.job.quotas`, as
`engine.driver.run_loop` does with real workers and files. In this world processes crash before and after they commit,
hang, are slow, run out of memory, answer late, twice or not at all; nodes vanish, alone and several at once, join, and
let everything fail; and the driver is killed and started again while workers of the dead driver still commit.
"""

from __future__ import annotations

import argparse
import heapq
import math
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from engine.driver.scheduling import scheduler
from engine.driver.scheduling.dispatch import MAX_QUEUED
from engine.driver.scheduling.endgame import SECOND_ATTEMPT_FACTOR
from engine.driver.scheduling.messages import (
    Abort,
    Action,
    Assign,
    AvoidNodes,
    CapacityChanged,
    Drain,
    Drained,
    Event,
    Finished,
    PlanGrown,
    Quarantine,
    SchedulerLimits,
    ShardDone,
    ShardError,
    ShardProgress,
    ShardRange,
    ShardSampled,
    StartWorker,
    StopWorker,
    Tick,
    WorkerLost,
    WorkerPlaced,
    WorkerReady,
)
from engine.job.parsing import parse_job
from engine.job.plan import Extent, Plan, build_plan
from engine.job.quotas import Quotas, replay

LIMITS = SchedulerLimits(
    min_limit_seconds=40.0, first_limit_seconds=80.0, start_limit_seconds=60.0, check_seconds=5.0, grace_seconds=15.0
)
TICK_SECONDS = 5.0
# Of a large run: there are no batches, so nobody hangs.
LARGE_LIMITS = SchedulerLimits(first_limit_seconds=math.inf, start_limit_seconds=math.inf, check_seconds=5.0)
SAMPLES_PER_SHARD = 4
MAX_DRIVERS = 200
MAX_EVENTS = 200_000
# Samples of a batch that a job wants, that fit each kind of node, and that fit while something else takes the memory.
WANTED = 64
MEMORY = {"small": 16, "large": 64}
DIP = 4
# How many times longer a slow process takes, and workers that a node has room for.
SLOW = 4.0
SLOTS = 2
NODE_KINDS = ("small", "large")
# After so many batches in a row that fit, a process tries twice as many samples.
GROW_AFTER = 3
CLASSES = [str(number) for number in range(10)]
MODELS = ("zoo:digits/stable-diffusion", "zoo:digits/stable-unclip")
DIGESTS = {"diffusion": dict.fromkeys(MODELS, ""), "clip": "", "target": "", "transfer": [], "oracle": ""}


class BrokenInvariantError(AssertionError):
    """Something happened that must not."""


def require(holds: bool, what: str) -> None:
    """Stop where an invariant does not hold."""
    if not holds:
        raise BrokenInvariantError(what)


@dataclass(frozen=True, slots=True)
class Counts:
    """Samples of a shard."""

    attempted: int
    accepted: int


@dataclass(slots=True)
class Disk:
    """What outlives every process: stages, shards, quarantine, and whether there ever was one."""

    plan: Plan
    shards: dict[int, tuple[Any, ...]] = field(default_factory=dict)
    quarantined: dict[int, tuple[str, ...]] = field(default_factory=dict)
    has_quarantined: bool = False

    def publish_stage(self, number: int, extents: tuple[Extent, ...]) -> Plan:
        """Create the next stage; a second driver must not."""
        require(number == len(self.plan.stages), "a stage was published over another")
        self.plan = self.plan.grown(extents)
        return self.plan

    def commit(self, shard: int, content: tuple[Any, ...]) -> None:
        """Create a shard if absent; what is there stays, and is equal."""
        require(self.shards.setdefault(shard, content) == content, f"shard {shard} was made with other bytes")


@dataclass(slots=True)
class Batches:
    """The batches of a process for one request: halved where memory runs out, and grown back.

    Attributes:
        size: samples of the next batch.
        limit: what the process reports; 0 for none.
        proven: the largest size that has fitted since memory ran out.
        num_good: batches that fitted since the size changed.
    """

    size: int = WANTED
    limit: int = 0
    proven: int = 0
    num_good: int = 0

    def give(self, limit: int) -> None:
        """Follow a limit of the driver, unless more than that has fitted here."""
        if limit > self.proven:
            self.limit = min(self.limit or limit, limit)
            self.size = min(self.size, self.limit)

    def make(self, memory: int) -> bool:
        """Make a batch in a memory for so many samples; whether that has changed the limit."""
        before = self.limit
        if self.limit and self.num_good >= GROW_AFTER and 2 * self.size <= memory:
            self.size, self.num_good = 2 * self.size, 0
            self.limit = self.size if self.size < WANTED else 0
        while self.size > memory:
            self.limit = self.size = self.size // 2
            self.proven = self.num_good = 0
        self.num_good += 1
        self.proven = max(self.proven, self.size)
        return self.limit != before


@dataclass(slots=True)
class Process:
    """A worker's process: shards to sample, when all it has sampled is written, whether it still does anything."""

    queue: list[tuple[int, int, int]] = field(default_factory=list)
    batches: dict[int, Batches] = field(default_factory=dict)
    written_at: float = 0.0
    is_alive: bool = True
    node: str = ""
    is_busy: bool = False
    slowness: float = 1.0

    @property
    def node_kind(self) -> str:
        """Type of its node."""
        return self.node.partition("-")[0]


class World:
    """A run under fire.

    Args:
        seed: draws everything.
        num_accidents: so many at most, after which all goes well.
    """

    def __init__(self, seed: int, num_accidents: int | None = None) -> None:
        self.draw = draw = random.Random(seed)
        self.yields = [draw.choice([0.0, 0.1, 0.5, 0.9, 1.0]) for _ in CLASSES]
        self.disk = Disk(make_plan(draw))
        self.accidents = draw.randrange(0, 60) if num_accidents is None else num_accidents
        self.rate = draw.choice([0.02, 0.1, 0.3])
        share = draw.choice([0, 0, 0.05])
        self.poison = {number for number in range(60) if draw.random() < share} if num_accidents != 0 else set()
        self.max_workers = draw.randrange(1, 8)
        # Nodes by name, `KIND-NUMBER`; whether the number of workers follows them; and one on which everything fails.
        self.nodes = [f"{draw.choice(NODE_KINDS)}-{number}" for number in range(draw.randrange(1, 5))]
        self.num_nodes = len(self.nodes)
        self.is_elastic = draw.random() < 0.6
        self.bad_node = self.nodes[0] if len(self.nodes) > 1 and num_accidents != 0 and draw.random() < 0.2 else ""
        self.limits = replace(LIMITS, second_attempt_factor=draw.choice([SECOND_ATTEMPT_FACTOR] * 2 + [math.inf]))
        self.slow_share = draw.choice([0.0, 0.0, 0.2])
        self.num_second = self.num_avoided = 0
        self.now = 0.0
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.num_events = 0
        self.num_planned = 0
        self.num_drivers = 0
        self.driver: Driver | None = None

    def run(self) -> None:
        """Start drivers until the run has ended, and check what must hold then."""
        while not self.start_driver():
            require(self.num_drivers < MAX_DRIVERS, "the run does not end")
            while self.driver is not None:
                self.happen()
            # Workers of the dead driver go on for a while.
            for _ in range(self.draw.randrange(0, 10)):
                if self.events:
                    self.happen()
        self.check()

    def happen(self) -> None:
        """The next thing happens."""
        self.num_events += 1
        require(self.num_events < MAX_EVENTS, "events without end")
        self.now, _, action = heapq.heappop(self.events)
        action()

    def later(self, seconds: float, action: Callable[[], None]) -> None:
        """Let something happen after a time."""
        self.num_planned += 1
        heapq.heappush(self.events, (self.now + seconds, self.num_planned, action))

    def accident(self, share: float = 1.0) -> bool:
        """Whether one of the accidents that are left happens here."""
        if self.accidents > 0 and self.draw.random() < self.rate * share:
            self.accidents -= 1
            return True
        return False

    def start_driver(self) -> bool:
        """A driver begins; True where it finds the run ended."""
        self.num_drivers += 1
        driver = Driver(self)
        if not driver.has_work:
            return True
        self.driver = driver
        driver.begin()
        if self.accidents > 0 and self.draw.random() < 0.5:
            self.accidents -= 1
            how = self.draw.choice([driver.die, driver.die, driver.drain])
            self.later(self.draw.random() * 100, how)
        return False

    @property
    def capacity(self) -> CapacityChanged:
        """What a driver would be told of the nodes, without those that it avoids."""
        avoided = self.driver.avoided if self.driver else ()
        room = SLOTS * sum(node not in avoided for node in self.nodes) if self.is_elastic else self.max_workers
        return CapacityChanged(room, tuple(self.nodes))

    def lose_nodes(self, first: str) -> None:
        """A node vanishes with all that is on it, or several at once; others may come later."""
        others = [node for node in self.nodes if node != first and self.draw.random() < 0.4]
        for node in [first, *others]:
            if node in self.nodes:
                self.nodes.remove(node)
                self.later(self.draw.random() * 60, self.add_node)
            for worker, process in list(self.driver.processes.items()) if self.driver else []:
                if process.node == node and self.driver:
                    self.driver.lose(worker, with_node=True)
        self.report_capacity()

    def add_node(self) -> None:
        """A node joins."""
        self.nodes.append(f"{self.draw.choice(NODE_KINDS)}-{self.num_nodes}")
        self.num_nodes += 1
        self.report_capacity()

    def report_capacity(self) -> None:
        """The driver notices after a while what there is."""
        self.later(self.draw.random() * 10, self.tell_capacity)

    def tell_capacity(self) -> None:
        """The driver, if there is one, counts what there is."""
        if self.driver:
            self.driver.send(self.capacity)

    def content(self, shard: int) -> tuple[Any, ...]:
        """The bytes of a shard: they depend on the plan alone."""
        one = self.disk.plan.shard(shard)
        return (one.request, one.cell, one.start, one.stop, self.counts(shard))

    def counts(self, shard: int) -> Counts:
        """What a shard gives; which samples are accepted depends on their seeds alone."""
        one = self.disk.plan.shard(shard)
        share = self.yields[one.cell]
        accepted = sum(
            random.Random(f"{one.request}-{one.cell}-{at}").random() < share for at in range(one.start, one.stop)
        )
        return Counts(one.num_samples, accepted)

    def check(self) -> None:
        """What must hold in the end."""
        disk, plan = self.disk, self.disk.plan
        for number in range(plan.num_shards):
            require((number in disk.shards) != (number in disk.quarantined), f"shard {number} is lost, or there twice")
        for number, reasons in disk.quarantined.items():
            require(len(reasons) == SchedulerLimits().max_strikes, f"shard {number} has {len(reasons)} strikes")
            require(not any("node" in reason for reason in reasons), f"shard {number} got a strike for a lost node")
        keys = [one.key for number in disk.shards for one in plan.samples(plan.shard(number))]
        require(len(keys) == len(set(keys)), "a sample is there twice")
        for one in replay(plan, self.all_counts(), disk.quarantined, SAMPLES_PER_SHARD).standings():
            request = plan.requests[one.request].spec
            planned = max(
                extent.stop for extent in plan.extents if (extent.request, extent.cell) == (one.request, one.cell)
            )
            require(not one.missing or planned == request.attempts_limit, "a quota is neither filled nor at its limit")

    def all_counts(self) -> dict[int, Counts]:
        """Counts of the committed shards."""
        return {number: self.counts(number) for number in self.disk.shards}


class Driver:
    """A driver's life: what `engine.driver.run_loop.RunLoop` does, with processes of this world."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.disk = world.disk
        self.processes: dict[int, Process] = {}
        self.avoided: tuple[str, ...] = ()
        # Second attempts: worker and shard.
        self.second: set[tuple[int, int]] = set()
        # Limits of batches that its processes found by themselves, by kind of node and request.
        self.found: dict[tuple[str, int], list[int]] = {}
        self.num_limits: dict[tuple[str, int], int] = {}
        self.is_alive = True
        self.plan = self.disk.plan
        committed = {number: world.counts(number) for number in self.disk.shards}
        self.settled = {*committed, *self.disk.quarantined}
        self.quotas: Quotas = replay(self.plan, committed, self.disk.quarantined, SAMPLES_PER_SHARD)
        self.add_rounds()
        self.has_work = self.plan.num_shards > len(self.settled)

    def begin(self) -> None:
        """Start the scheduler."""
        flags = bytes(number in self.settled for number in range(self.plan.num_shards))
        self.state, actions = scheduler.start(
            flags,
            max(1, self.world.capacity.num_workers),
            ranges=map(self.shard_range, self.plan.extents),
            is_final=self.quotas.is_final,
            limits=self.world.limits,
            now=self.world.now,
        )
        self.obey(actions)
        self.tick()
        self.world.report_capacity()

    def shard_range(self, extent: Extent) -> ShardRange:
        """The row of an extent; every second request has the other model."""
        return ShardRange(extent.num_shards, request=extent.request, model=extent.request % len(MODELS))

    def add_rounds(self) -> tuple[Extent, ...]:
        """Plan the rounds that are due, on disk first."""
        if extents := self.quotas.advance():
            self.plan = self.disk.publish_stage(len(self.plan.stages), extents)
        return extents

    def tick(self) -> None:
        """Let the scheduler know the time, again and again."""
        if self.is_alive:
            self.send(Tick(self.world.now))
            self.world.later(TICK_SECONDS, self.tick)

    def drain(self) -> None:
        """A signal."""
        if self.is_alive:
            self.send(Drain())

    def die(self) -> None:
        """The driver is killed; its workers go on with what they have, and their results are lost."""
        self.is_alive = False
        if self.world.driver is self:
            self.world.driver = None

    def send(self, event: Event) -> None:
        """Send an event to the scheduler; sometimes twice."""
        if not self.is_alive:
            return
        self.step(event)
        if self.is_alive and not isinstance(event, (Tick, Drain, PlanGrown)) and self.world.draw.random() < 0.05:
            before = self.state
            state, actions = scheduler.step(self.state, event)
            require(
                (state == before and not actions) or isinstance(event, (ShardProgress, WorkerPlaced)),
                "a duplicate event changed the state",
            )

    def step(self, event: Event) -> None:
        """A step of the scheduler, and what the quotas make of it."""
        is_new = not isinstance(event, ShardDone) or self.is_held(event)
        before = self.state.batch_limits
        self.state, actions = scheduler.step(self.state, event)
        self.check_limits(before)
        self.obey(actions)
        settled = [(action.shard, Counts(0, 0)) for action in actions if isinstance(action, Quarantine)]
        if isinstance(event, ShardDone) and is_new:
            settled.append((event.shard, self.world.counts(event.shard)))
        for shard, counts in settled:
            require(shard not in self.settled, f"shard {shard} was settled twice")
            self.settled.add(shard)
            if not self.quotas.is_final:
                self.quotas.settle(self.plan.shard(shard), counts.attempted, counts.accepted)
        if settled and self.is_alive and not self.state.is_final:
            extents = self.add_rounds()
            if extents or self.quotas.is_final:
                self.step(PlanGrown(tuple(map(self.shard_range, extents)), self.quotas.is_final))

    def check_limits(self, before: Mapping[tuple[str, int], int]) -> None:
        """Limits of batches change for what a process found, and not more often than that."""
        after = self.state.batch_limits
        for key in {*before, *after} if after is not before else ():
            if after.get(key, 0) != before.get(key, 0):
                self.num_limits[key] = self.num_limits.get(key, 0) + 1
                found = self.found.get(key, [])
                require(after.get(key, 0) in found, "a limit of batches that no process found")
                require(self.num_limits[key] <= len(found), "old reports change a limit of batches")

    def is_held(self, event: ShardDone) -> bool:
        """Whether a result is of a shard that its worker holds."""
        worker = self.state.workers.get(event.worker)
        return worker is not None and event.shard in worker.queue

    def obey(self, actions: list[Action]) -> None:
        """Carry out actions, checking what must hold of each."""
        for action in actions:
            if isinstance(action, StartWorker):
                require(len(self.state.workers) <= self.state.max_workers, "too many workers")
                self.start(action.worker)
            elif isinstance(action, AvoidNodes):
                self.avoided = action.nodes
                self.world.num_avoided += bool(action.message)
                self.world.report_capacity()
            elif isinstance(action, Assign):
                self.assign(action)
            elif isinstance(action, StopWorker):
                self.processes.pop(action.worker).is_alive = False
            elif isinstance(action, Quarantine):
                require(action.shard not in self.disk.quarantined, "quarantined twice")
                self.disk.has_quarantined = True
                # Another driver's worker may have committed it in the meantime: then it counts as committed.
                if action.shard not in self.disk.shards:
                    self.disk.quarantined[action.shard] = action.reasons
            elif isinstance(action, (Finished, Drained, Abort)):
                require(not isinstance(action, Finished) or self.quotas.is_final, "finished before the quotas are")
                for process in self.processes.values():
                    process.is_alive = False
                self.die()
        self.check_held()

    def check_held(self) -> None:
        """Two workers hold one shard only as two attempts at it, and more never do."""
        holders = [(number, shard) for number, worker in self.state.workers.items() for shard in worker.queue]
        for shard, num in Counter(shard for _, shard in holders).items():
            require(num <= 2, "three workers hold one shard")
            is_second = any((number, held) in self.second for number, held in holders if held == shard)
            require(num == 1 or is_second, "two workers hold one shard, and neither as a second attempt")

    def start(self, worker: int) -> None:
        """A process waits for a node that has room, loads, and is ready; or is not."""
        self.processes[worker] = Process(slowness=SLOW if self.world.draw.random() < self.world.slow_share else 1.0)
        self.world.later(self.world.draw.random() * 5, partial(self.place, worker))

    def place(self, worker: int) -> None:
        """A process gets a node, now or later."""
        world, draw, process = self.world, self.world.draw, self.processes.get(worker)
        if process is None or not process.is_alive or not self.is_alive:
            return
        used = Counter(other.node for other in self.processes.values() if other.is_alive)
        room = SLOTS if world.is_elastic else world.max_workers
        free = [node for node in world.nodes if used[node] < room and node not in self.avoided]
        if not free:
            world.later(5.0, partial(self.place, worker))
            return
        process.node = draw.choice(free)
        self.answer(worker, WorkerPlaced(worker, process.node_kind, process.node))
        if world.accident(0.3):
            world.later(draw.random(), partial(self.lose, worker, draw.random() < 0.5))
        elif not world.accident(0.2):
            world.later(draw.random() * 5, partial(self.answer, worker, WorkerReady(worker)))

    def assign(self, action: Assign) -> None:
        """A shard is queued on a process."""
        require(action.shard not in self.settled, f"shard {action.shard} was dispatched after it was settled")
        process = self.processes[action.worker]
        if action.is_second:
            self.second.add((action.worker, action.shard))
            self.world.num_second += 1
            require(action.attempt > 1, "a second attempt that is counted as the first")
        process.queue.append((action.shard, action.attempt, action.batch_limit))
        require(len(process.queue) <= MAX_QUEUED + 1, "too many shards queued")
        if not process.is_busy:
            self.work(action.worker, process)

    def work(self, worker: int, process: Process) -> None:
        """A process begins its next shard."""
        process.is_busy = bool(process.queue) and process.is_alive
        if not process.is_busy:
            return
        shard, _, limit = process.queue[0]
        seconds = (1 + self.world.draw.random() * 10) * process.slowness
        request, memory = self.plan.shard(shard).request, MEMORY[process.node_kind]
        if self.world.accident(0.3):
            memory, seconds = DIP, seconds * 2
        batches = process.batches.setdefault(request, Batches())
        batches.give(limit)
        if batches.make(memory):
            self.found.setdefault((process.node_kind, request), []).append(batches.limit)
        progress = ShardProgress(worker, shard, 1, batch_seconds=seconds / 2, batch_limit=batches.limit)
        self.world.later(seconds / 2, partial(self.answer, worker, progress))
        self.world.later(seconds, partial(self.finish, worker, process, shard))

    def finish(self, worker: int, process: Process, shard: int) -> None:
        """A shard is sampled, or comes to grief."""
        if not process.is_alive:
            return
        world, draw = self.world, self.world.draw
        fate = (
            draw.choice(["crash", "error", "hang", "node", "commit-crash", "lost", "late"]) if world.accident() else ""
        )
        if process.node == world.bad_node != "":
            fate = draw.choice(["crash", "error"])
        elif shard in world.poison:
            fate = draw.choice(["crash", "error", "hang"])
        if fate == "hang":
            return
        if fate == "error":
            process.is_busy = False
            self.answer(worker, ShardError(worker, shard, "an exception"))
            return
        if fate == "node":
            world.lose_nodes(process.node)
            return
        if fate == "crash":
            self.lose(worker, False)
            return
        process.queue.pop(0)
        self.answer(worker, ShardSampled(worker, shard))
        # Written in order, while the next are sampled; mostly quicker than that, not always.
        process.written_at = max(process.written_at, world.now) + draw.choice([0.0, 0.1, 1.0, 12.0]) * draw.random()
        world.later(process.written_at - world.now, partial(self.write, worker, process, shard, fate))
        self.work(worker, process)

    def write(self, worker: int, process: Process, shard: int, fate: str) -> None:
        """A sampled shard is committed."""
        # One that was stopped or lost has no thread to write any more, or is just before its end.
        if not process.is_alive and self.world.draw.random() < 0.9:
            return
        # Also of a process whose driver is dead or has given it up: nothing can stop it.
        self.disk.commit(shard, self.world.content(shard))
        if shard in self.disk.quarantined:
            del self.disk.quarantined[shard]
        if fate == "commit-crash":
            self.lose(worker, False)
        elif fate != "lost":
            delay = self.world.draw.random() * 100 if fate == "late" else 0.0
            self.world.later(delay, partial(self.answer, worker, ShardDone(worker, shard)))

    def lose(self, worker: int, with_node: bool) -> None:
        """A process is gone."""
        process = self.processes.get(worker)
        if process is not None and process.is_alive:
            process.is_alive = False
            self.answer(worker, WorkerLost(worker, with_node, "the node was lost" if with_node else "the process died"))

    def answer(self, worker: int, event: Event) -> None:
        """Something that a process says reaches the driver, if it lives, however late."""
        self.send(event)


def make_plan(draw: random.Random) -> Plan:
    """A job of one to three requests, with and without quotas."""
    requests = []
    for number in range(draw.randrange(1, 4)):
        request: dict[str, Any] = {"name": f"r{number}", "method": "prompt", "diffusion": MODELS[number % len(MODELS)]}
        request |= {"classes": sorted(draw.sample(range(10), draw.randrange(1, 4))), "count": draw.randrange(1, 24)}
        if draw.random() < 0.6:
            request |= {"accept": {"is_error": True}, "max_attempts": draw.choice(["2x", "3.5x", "10x"])}
        requests.append(request)
    models = {"diffusion": MODELS[0], "clip": "zoo:digits/clip", "target": "zoo:digits/classifier"}
    output = {"uri": "/nowhere", "samples_per_shard": SAMPLES_PER_SHARD}
    return build_plan(
        parse_job({"name": "s", "models": models, "requests": requests, "output": output}), CLASSES, DIGESTS
    )


def play(seed: int) -> World:
    """A run under fire, checked, and its plan held against that of a run without an accident.

    Raises:
        BrokenInvariantError: with what does not hold.
    """
    world = World(seed)
    world.run()
    # A shard in quarantine gives nothing to the yield that later rounds are sized by, even if it is made after all.
    if not world.disk.has_quarantined:
        clean = World(seed, num_accidents=0)
        clean.run()
        require(clean.disk.shards == world.disk.shards, "other shards than in a run without accidents")
    return world


def schedules(num: int, first: int) -> int:
    """Play many schedules; print what broke. Returns the number of broken ones."""
    started, broken, num_events, num_drivers, num_quarantined = time.monotonic(), 0, 0, 0, 0
    num_second = num_avoided = 0
    for seed in range(first, first + num):
        try:
            world = play(seed)
        except Exception as error:
            broken += 1
            print(f"seed {seed}: {type(error).__name__}: {error}")
            continue
        num_events += world.num_events
        num_drivers += world.num_drivers
        num_quarantined += len(world.disk.quarantined)
        num_second += world.num_second
        num_avoided += world.num_avoided
    seconds = time.monotonic() - started
    print(
        f"{num} schedules, {num_events} events, {num_drivers} drivers, {num_quarantined} shards in quarantine,"
        f" {num_second} second attempts, {num_avoided} nodes avoided:"
        f" {broken} broken, {seconds:.0f} s"
    )
    return broken


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """A large run: what it runs on, and what it makes.

    Attributes:
        failures_an_hour: of each worker; half of them take the process alone.
        slow_share: part of the workers, which take `SLOW` times as long.
        workers_per_node: that are released together, when the last of them is done.
        follows_work: whether workers are released at the end, and shards that take long are attempted twice.
    """

    num_workers: int = 10_000
    num_shards: int = 1_000_000
    shard_seconds: float = 300.0
    failures_an_hour: float = 0.01
    load_seconds: float = 60.0
    slow_share: float = 0.0
    workers_per_node: int = 1
    follows_work: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """What a large run came to.

    Attributes:
        efficiency: time in sampling of the time of all workers, loading included, until the last shard is dispatched.
        whole_efficiency: time in sampling that led to a commit, of the time that nodes were held for.
        decisions_per_second: events and the decisions on them, on one core of this machine.
    """

    efficiency: float
    whole_efficiency: float
    decisions_per_second: float
    num_decisions: int
    num_failures: int
    num_second: int
    simulated_hours: float


class Nodes:
    """Nodes that are held from the first worker on them to the last, and how long in all, in seconds of workers."""

    def __init__(self, workers_per_node: int) -> None:
        self._size = workers_per_node
        self._free: list[int] = []
        self._nodes: dict[int, tuple[float, set[int]]] = {}
        self._node_of: dict[int, int] = {}
        self.held_seconds = 0.0

    def add(self, worker: int, now: float) -> None:
        """A worker starts, on a node that is held or on a new one."""
        if not self._free:
            node = len(self._node_of)
            self._nodes[node] = (now, set())
            self._free = [node] * self._size
        node = self._node_of[worker] = self._free.pop()
        self._nodes[node][1].add(worker)

    def remove(self, worker: int, now: float) -> None:
        """A worker ends, and with the last one its node."""
        node = self._node_of[worker]
        since, workers = self._nodes[node]
        workers.discard(worker)
        self._free.append(node)
        if not workers:
            self._free = [other for other in self._free if other != node]
            self.held_seconds += self._size * (now - since)


class LargeRun:
    """A large run: workers fail at a rate, and the driver takes its time for every decision, one after the other."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.draw = random.Random(0)
        self.heap: list[tuple[float, int, Any]] = []
        self.begun: dict[int, tuple[float, float]] = {}
        self.queues: dict[int, list[int]] = {}
        self.slowness: dict[int, float] = {}
        self.nodes = Nodes(fleet.workers_per_node)
        self.useful = self.now = 0.0
        self.num_failures = self.num_second = self.counter = 0

    def push(self, moment: float, event: Any) -> None:
        """Let an event happen."""
        self.counter += 1
        heapq.heappush(self.heap, (moment, self.counter, event))

    def begin(self, worker: int, moment: float) -> None:
        """A worker begins with the next shard of its queue."""
        if self.queues[worker]:
            seconds = self.fleet.shard_seconds * (0.8 + 0.4 * self.draw.random()) * self.slowness[worker]
            self.begun[worker] = (moment, seconds)
            self.push(moment + seconds, ShardDone(worker, self.queues[worker][0]))

    def remove(self, worker: int) -> None:
        """A worker is gone."""
        self.begun.pop(worker, None)
        del self.queues[worker]
        self.nodes.remove(worker, self.now)

    def obey(self, action: Action) -> None:
        """Carry out an action."""
        if isinstance(action, StartWorker):
            self.queues[action.worker] = []
            self.nodes.add(action.worker, self.now)
            self.slowness[action.worker] = SLOW if self.draw.random() < self.fleet.slow_share else 1.0
            self.push(self.now, WorkerPlaced(action.worker, "gpu"))
            self.push(self.now + self.fleet.load_seconds, WorkerReady(action.worker))
            life = self.draw.expovariate(self.fleet.failures_an_hour / 3600)
            self.push(self.now + life, WorkerLost(action.worker, self.draw.random() < 0.5, "spot"))
        elif isinstance(action, Assign):
            self.num_second += action.is_second
            self.queues[action.worker].append(action.shard)
            if len(self.queues[action.worker]) == 1:
                self.begin(action.worker, self.now)
        elif isinstance(action, StopWorker):
            self.remove(action.worker)

    def note(self, event: Any, moment: float) -> None:
        """An event happens."""
        if isinstance(event, WorkerLost):
            self.num_failures += 1
            self.remove(event.worker)
        elif isinstance(event, ShardDone):
            # Of a slow worker as much as another would have needed.
            self.useful += self.begun.pop(event.worker)[1] / self.slowness[event.worker]
            self.queues[event.worker].pop(0)
            self.begin(event.worker, moment)

    def play(self) -> Scale:
        """The run, from start to end."""
        fleet = self.fleet
        factor = SECOND_ATTEMPT_FACTOR if fleet.follows_work else math.inf
        limits = replace(LARGE_LIMITS, second_attempt_factor=factor)
        state, actions = scheduler.start(bytes(fleet.num_shards), fleet.num_workers, limits=limits)
        spent = free_at = efficiency = 0.0
        num_decisions = 0
        self.push(0.0, Tick(0.0))
        while True:
            for action in actions:
                if fleet.follows_work or not isinstance(action, StopWorker):
                    self.obey(action)
            if state.is_over:
                break
            moment, _, event = heapq.heappop(self.heap)
            if isinstance(event, Tick):
                self.push(moment + LARGE_LIMITS.check_seconds, Tick(moment + LARGE_LIMITS.check_seconds))
            elif event.worker not in self.queues:
                actions = []
                continue
            self.note(event, moment)
            # The driver receives it when it is done with what came before.
            begun_at = time.process_time()
            state, actions = scheduler.step(state, event)
            seconds = time.process_time() - begun_at
            self.now = free_at = max(free_at, moment) + seconds
            if not isinstance(event, Tick):
                spent += seconds
                num_decisions += 1
            if not state.num_pending and not efficiency:
                in_flight = sum(self.now - since for since, _ in self.begun.values())
                efficiency = (self.useful + in_flight) / (fleet.num_workers * self.now)
        for worker in list(self.queues):
            self.remove(worker)
        return Scale(
            efficiency=efficiency,
            whole_efficiency=self.useful / self.nodes.held_seconds,
            decisions_per_second=num_decisions / spent,
            num_decisions=num_decisions,
            num_failures=self.num_failures,
            num_second=self.num_second,
            simulated_hours=self.now / 3600,
        )


def main(arguments: list[str]) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    many = commands.add_parser("schedules", help="random schedules of accidents")
    many.add_argument("num", type=int)
    many.add_argument("--first", type=int, default=0, help="first seed")
    large = commands.add_parser("scale", help="a large run")
    default = Fleet()
    large.add_argument("--workers", type=int, default=default.num_workers)
    large.add_argument("--shards", type=int, default=default.num_shards)
    large.add_argument("--shard-seconds", type=float, default=default.shard_seconds)
    large.add_argument("--failures-an-hour", type=float, default=default.failures_an_hour)
    large.add_argument("--load-seconds", type=float, default=default.load_seconds)
    large.add_argument("--slow-share", type=float, default=default.slow_share)
    large.add_argument("--workers-per-node", type=int, default=default.workers_per_node)
    large.add_argument("--hold", action="store_true", help="hold all workers to the end, and attempt nothing twice")
    options = parser.parse_args(arguments)
    if options.command == "schedules":
        return int(schedules(options.num, options.first) > 0)
    fleet = Fleet(
        num_workers=options.workers,
        num_shards=options.shards,
        shard_seconds=options.shard_seconds,
        failures_an_hour=options.failures_an_hour,
        load_seconds=options.load_seconds,
        slow_share=options.slow_share,
        workers_per_node=options.workers_per_node,
        follows_work=not options.hold,
    )
    found = LargeRun(fleet).play()
    print(
        f"{fleet.num_workers} workers, {fleet.num_shards} shards of {fleet.shard_seconds:g} s, {found.num_failures}"
        f" failures and {found.num_second} second attempts in {found.simulated_hours:.2f} h: efficiency"
        f" {found.efficiency:.2%}, to the end of the run {found.whole_efficiency:.2%}; {found.num_decisions} decisions,"
        f" {found.decisions_per_second:,.0f} a second"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

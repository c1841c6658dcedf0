"""Workers of a fork server that report where they are, and the process of an actor, without Ray around it.

`python -m tests.forked ADDRESS FACTS` has the server's worker built, which writes its facts into a file, and has it
make the shards whose numbers it reads, a line each: `KILLS` and `HANGS` do not end well.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from engine.driver.executors.ray_actor import RayHost
from engine.errors import JobError
from engine.job.plan import Plan, ShardSpec
from engine.job.spec import JobSpec
from tests.sleepy import Faults, SleepyWorker, make_sleepy

KILLS, HANGS = 1, 2


class Reporter:
    """A `WorkerLike` of facts.

    Args:
        path: of the file for them.
        load: called first; what it imports is a fact, too.
    """

    def __init__(self, path: str, load: Callable[[], Any] | None) -> None:
        shared = set(sys.modules)
        if load:
            load()
        facts = {
            "process": os.getpid(),
            "parent": os.getppid(),
            "folder": str(Path.cwd()),
            "told": os.environ.get("TOLD"),
            "shared": sorted(shared),
            "own": sorted(set(sys.modules) - shared),
        }
        Path(path).write_text(json.dumps(facts), encoding="utf-8")

    def sample_shard(self, shard: ShardSpec, attempt: int, report: Any, batch_limit: int = 0) -> Callable[[], Any]:
        """Report two samples and return what was asked for; or do what the number says."""
        report(1)
        report(2, 0.5, 16)
        if shard.number == KILLS:
            os.kill(os.getpid(), signal.SIGKILL)
        if shard.number == HANGS:
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
            time.sleep(3600)
        return partial(_outcome, f"attempt {attempt}, limit {batch_limit}")


def _outcome(text: str) -> str:
    time.sleep(0.1)
    return text


def make_forked(job: JobSpec, plan: Plan, *, faults: Faults) -> SleepyWorker:
    """A sleepy worker, if this process is a fork of a server."""
    assert "fork_server" in Path(f"/proc/{os.getppid()}/cmdline").read_text(encoding="utf-8")
    return make_sleepy(job, plan, faults=faults)


def fail() -> None:
    """A `load` that fails by the user's fault."""
    raise JobError("models.clip: broken")


def act(address: str, facts: str, load: Callable[[], Any] | None = None) -> None:
    """The program."""
    host = RayHost(7, 1, 0, address)
    print(host.load(partial(Reporter, facts, load)), flush=True)
    for line in sys.stdin:
        host.run_shard(ShardSpec(number=int(line), request=0, start=0, stop=2), 3, 9)
        print(host.progress()[0], host.outcome(), flush=True)


if __name__ == "__main__":
    # What is pickled must have a module that the worker can import.
    from tests import forked

    forked.act(*sys.argv[1:3])

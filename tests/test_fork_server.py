"""The fork server: what its workers share, and that no process outlives the one that needs it.

Real processes, killed; `tests.forked` is that of an actor.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.driver.executors.fork_server import LIBRARIES, ForkServer
from engine.driver.executors.forked_host import request_worker
from tests.conftest import REPOSITORY
from tests.forked import HANGS, KILLS
from tests.sleepy import wait_until

DRIVER = (
    "import sys; from engine.driver.executors.fork_server import ForkServer as F; f = F([]); print(f.address); input()"
)
LOADING = "import sys; from tests import forked, test_fork_server as t; forked.act(*sys.argv[1:], t.make_batches)"
FAILING = "import sys; from tests import forked; forked.act(*sys.argv[1:], forked.fail)"
StartActor = Callable[..., "Actor"]


class Actor:
    """The process of an actor, and its worker's facts.

    Args:
        program: what it runs.
    """

    def __init__(self, address: str, facts: Path, *program: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, *(program or ("-m", "tests.forked")), address, str(facts)],
            cwd=REPOSITORY, env=os.environ | {"TOLD": str(facts)}, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        self.loaded = self.line()
        self.facts: dict[str, Any] = json.loads(facts.read_text(encoding="utf-8")) if facts.exists() else {}
        self.worker: int = self.facts.get("process", 0)

    def line(self) -> str:
        """What it prints next."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def begin(self, shard: int) -> None:
        """Have a shard made."""
        assert self.process.stdin is not None
        print(shard, file=self.process.stdin, flush=True)

    def has_worker(self) -> bool:
        """Whether the worker's process is there, also one that has ended and was not reaped."""
        return Path(f"/proc/{self.worker}").exists()


@pytest.fixture
def server() -> Iterator[ForkServer]:
    """A server that imports nothing more than itself."""
    started = ForkServer([])
    yield started
    started.close()


@pytest.fixture
def start(server: ForkServer, tmp_path: Path) -> Iterator[StartActor]:
    """Starts actors with workers."""
    actors: list[Actor] = []

    def start_one(*program: str) -> Actor:
        actors.append(Actor(server.address, tmp_path / f"{len(actors)}.json", *program))
        return actors[-1]

    yield start_one
    for actor in actors:
        actor.process.kill()
        actor.process.communicate()


def test_a_worker_is_in_the_place_of_its_actor(server: ForkServer, start: StartActor, tmp_path: Path) -> None:
    """It sees the actor's environment and folder; progress, outcomes and events come back, shard by shard."""
    actor = start()
    assert actor.loaded == "WorkerReady(worker=7)"
    assert (actor.facts["folder"], actor.facts["told"]) == (str(REPOSITORY), str(tmp_path / "0.json"))
    assert actor.worker != actor.process.pid != actor.facts["parent"]
    for shard in (3, 4):
        actor.begin(shard)
        event = f"ShardResult(worker=7, shard={shard}, outcome='attempt 3, limit 9')"
        assert actor.line() == f"({shard}, 2, 0.5, 16, None) {event}"


def test_a_worker_that_cannot_be_built_says_why(start: StartActor) -> None:
    """As in the actor's own process: in words, by the user's fault."""
    assert start("-c", FAILING).loaded == "UserFault(message='models.clip: broken', exit_code=2)"


def test_a_killed_worker_ends_its_actor_and_no_other(start: StartActor) -> None:
    """Also where later workers were forked while its connection was open: they must not keep it."""
    actor, other = start(), start()
    actor.begin(KILLS)
    assert actor.process.wait() == -signal.SIGKILL
    wait_until(lambda: not actor.has_worker(), "the worker is reaped")
    other.begin(3)
    assert "ShardResult" in other.line()
    assert start().facts["parent"] == other.facts["parent"]


def test_a_killed_actor_ends_its_worker_and_no_other(start: StartActor) -> None:
    """In the middle of a shard: nothing but a signal would end it. The connections of others do not hold it."""
    actor, other = start(), start()
    actor.begin(HANGS)
    actor.process.kill()
    wait_until(lambda: not actor.has_worker(), "the worker of a killed actor is gone")
    other.begin(3)
    assert "ShardResult" in other.line()


def test_a_server_that_is_gone_takes_workers_along_and_is_not_waited_for(server: ForkServer, start: StartActor) -> None:
    """The next worker is built without it."""
    actor = start()
    actor.begin(HANGS)
    os.kill(actor.facts["parent"], signal.SIGKILL)
    assert actor.process.wait() == -signal.SIGKILL
    assert request_worker(server.address, 0) is None
    wait_until(lambda: not actor.has_worker(), "the worker is gone")


def test_a_server_that_is_too_slow_is_not_waited_for(server: ForkServer, start: StartActor) -> None:
    """Its socket is there before it answers."""
    parent = start().facts["parent"]
    os.kill(parent, signal.SIGSTOP)
    assert request_worker(server.address, 0, seconds=0.1) is None
    os.kill(parent, signal.SIGCONT)
    assert start().facts["parent"] == parent


def test_a_killed_driver_leaves_neither_processes_nor_files(tmp_path: Path) -> None:
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER], cwd=REPOSITORY, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert driver.stdout is not None
    address = driver.stdout.readline().strip()
    actor = Actor(address, tmp_path / "facts.json")
    actor.begin(HANGS)
    driver.kill()
    driver.communicate()
    assert actor.process.wait() == -signal.SIGKILL
    wait_until(lambda: not actor.has_worker() and not Path(address).parent.exists(), "all is gone")
    actor.process.communicate()


def test_workers_share_what_they_import_and_some_is_never_imported(tmp_path: Path) -> None:
    """A worker of a digits job with models loaded and a batch made, of each method.

    What the server imported is not imported again, so nothing large is missing in its list; and what libraries import
    for uses that a worker has not is not there at all.
    """
    server = ForkServer()
    actor = Actor(server.address, tmp_path / "facts.json", "-c", LOADING)
    shared, own = set(actor.facts["shared"]), set(actor.facts["own"])
    actor.process.kill()
    actor.process.communicate()
    server.close()
    assert actor.loaded == "WorkerReady(worker=7)" and set(LIBRARIES) <= shared
    assert not {"boto3", "botocore", "scipy.stats", "sklearn", "ray", "timm"} & (shared | own)
    assert len(own) < 0.05 * len(shared), own


def make_batches() -> None:
    """Load the models of a small job and make a batch of each request."""
    from engine.generation.worker import load_generator
    from engine.job.parsing import parse_job
    from engine.job.plan import build_plan
    from engine.models.digests import model_digests
    from engine.models.labels import read_labels

    raw = {
        "name": "job",
        "models": {
            "diffusion": "zoo:digits/stable-diffusion",
            "clip": "zoo:digits/clip",
            "target": "zoo:digits/classifier",
            "transfer": ["zoo:digits/classifier-b"],
            "oracle": "zoo:digits/oracle",
        },
        "requests": [
            {"name": "a", "method": "boundary", "boundary": ["three", "eight"], "count": 1},
            {"name": "b", "method": "risky", "classes": ["three"], "count": 1},
            {"name": "c", "method": "prompt", "classes": ["three"], "count": 1},
        ],
        "sampling": {"num_inference_steps": 4, "guidance_scale": 2.0},
        "guidance": {"boundary": {"every": 1}, "risky": {"every": 1}},
        "output": {"uri": "runs/job"},
    }
    job = parse_job(raw)
    plan = build_plan(job, read_labels(job.models.target), model_digests(job))
    generator = load_generator(job, plan)
    for number in range(plan.num_shards):
        shard = plan.shard(number)
        [batch] = generator.batches(shard.request, list(plan.samples(shard)))
        assert [result.record["status"] for result in batch.results] == ["ok"]


def test_an_unused_server_is_closed_at_once(tmp_path: Path) -> None:
    """Also while it imports, twice, and it takes its folder away."""
    server = ForkServer()
    folder = Path(server.address).parent
    assert folder.is_dir() and folder.stat().st_mode & 0o077 == 0
    server.close()
    server.close()
    assert not folder.exists()

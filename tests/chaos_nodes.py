"""Machines of a cluster under fire: `python -m tools.chaos FOLDER --kind nodes [--store s3] [--scenario NAME]`.

The machines are those of `tests/ray_nodes.py`. They are killed, stopped, cut off from the network and replaced, alone
and two in the same second, as spot machines are; so are Ray's head, drivers and actors. The output is a folder that
all of them share, or an S3 that they reach over the network.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import EXIT_DRAINED, EXIT_INCOMPLETE, EXIT_OK, EXIT_OWNED
from tests.chaos_runs import GIVE_UP_SECONDS, KILLS_A_RUN, check, drive_command
from tests.ray_nodes import Machine, Machines, Program
from tests.sleepy import Gates, wait_until

S3_PORT = 9000
BUCKET = "bucket"
# More than a run has: whichever shards are begun wait at their gates.
ALL_SHARDS = range(200)
# A sample, where processes are killed at random: a run takes a while, and little of the processor.
SECONDS = 1.0
# What is killed at random, and how often; a pair are two machines in the same second.
VICTIMS = {"actor": 14, "machine": 4, "pair": 2, "driver": 4, "gcs": 1, "head": 1, "frozen": 1, "cut": 1}
# Of these the driver does not survive, or the cluster.
FATAL = ("driver", "gcs", "head")
# Accidents that kill nothing, for up to so many seconds: shorter and longer than Ray takes to give a machine up.
PASSING = ("frozen", "cut")
PASSING_SECONDS = 20.0
MAX_STARTS = 5


@dataclass
class Site:
    """A cluster and the outputs of its runs.

    Attributes:
        folder: for logs and gates.
        place: outputs are below it, a folder or an address.
        clean: a run without accidents.
    """

    machines: Machines
    folder: Path
    place: str
    clean: Path
    num_nodes: int = 3

    def ready(self, *, wait: bool = True) -> None:
        """Replace machines that were lost, or all of them where it was the head."""
        nodes = self.machines.nodes
        self.machines.kill_ended()
        if not nodes:
            self.machines.start_node()
            self.machines.wait_for_nodes()
        while len(nodes) < self.num_nodes:
            self.machines.start_node()
        if wait:
            self.machines.wait_for_nodes()

    def output(self, name: str) -> str:
        """Address of the output of a run."""
        return f"{self.place}/{name}"

    def log(self, name: str) -> str:
        """What its drivers have printed."""
        return (self.folder / f"{name}.log").read_text()

    def start(
        self, name: str, *, machine: Machine | None = None, gated: bool = False, seconds: float = 0.0, workers: int = 0
    ) -> Program:
        """A driver, on the machine of the head if none is named; gated, its workers wait in the middle of shards."""
        gates = self.folder / f"{name}.gates"
        gates.mkdir(exist_ok=True)
        faults = {"seconds": seconds, "gated": list(ALL_SHARDS) if gated else [], "gates": str(gates)}
        workers = workers or self.num_nodes
        command = drive_command(self.output(name), self.machines.address, retry=True, workers=workers, faults=faults)
        with (self.folder / f"{name}.log").open("a") as log:
            return self.machines.drive(machine or self.machines.head, command, stdout=log, stderr=log)

    def gates(self, name: str) -> Gates:
        """Where the workers of a run wait."""
        return Gates(self.folder / f"{name}.gates")

    def await_gates(self, name: str, num_shards: int = 0) -> None:
        """Wait until workers are in the middle of so many shards, else of one each."""
        num_shards = num_shards or self.num_nodes
        wait_until(lambda: len(self.gates(name).waiting()) >= num_shards, f"{num_shards} shards are begun in {name}")

    def await_log(self, name: str, text: str) -> None:
        """Wait until a driver has printed this."""
        wait_until(lambda: text in self.log(name), f"{name} says '{text}'")

    def end(self, name: str, driver: Program) -> None:
        """Open all gates; the driver completes the run, which is equal to the clean one."""
        self.gates(name).open(*ALL_SHARDS)
        code = driver.wait(GIVE_UP_SECONDS)
        assert code == EXIT_OK, f"{name}: ended with {code}, see {self.folder}"
        self.check(name)

    def check(self, name: str) -> None:
        """A run is whole and equal to the clean one; an S3 is read from its own network."""
        if "://" not in self.place:
            check(self.output(name), self.clean, name)
            return
        command = [sys.executable, "-m", "tests.chaos_runs", "check", self.output(name), str(self.clean)]
        log = self.folder / "check.log"
        with log.open("w") as opened:
            reader = self.machines.switch.start(command, self.machines.environment, stdout=opened, stderr=opened)
            assert reader.wait(GIVE_UP_SECONDS) == 0, f"{name}: {log.read_text()}"


@contextlib.contextmanager
def opened_site(folder: Path, clean: Path, *, store: str = "folder", num_nodes: int = 3) -> Iterator[Site]:
    """A cluster without machines yet, see `Site.ready`.

    Args:
        store: `folder` or `s3`.
    """
    # Sockets of Ray are below it, whose paths are limited.
    ray = Path("/tmp") / f"rf-nodes-{os.getpid()}"
    ray.mkdir(mode=0o700)
    try:
        with Machines(ray) as machines:
            place = str(folder)
            if store == "s3":
                place = f"s3://{BUCKET}/runs"
                machines.environment |= start_s3(machines.switch, folder)
            yield Site(machines, folder, place, clean, num_nodes)
    finally:
        shutil.rmtree(ray, ignore_errors=True)


def start_s3(switch: Machine, folder: Path) -> dict[str, str]:
    """Start an S3 on a machine; the environment in which it is found."""
    endpoint = f"http://{switch.address}:{S3_PORT}"
    environment = {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_CONFIG_FILE": os.devnull,
    }
    log = folder / "s3.log"
    with log.open("w") as opened:
        command = [sys.executable, "-m", "tests.chaos_nodes", switch.address]
        switch.start(command, environment, stdout=opened, stderr=subprocess.STDOUT)
    wait_until(lambda: "up" in log.read_text(), f"the S3 is up, see {log}")
    return environment


def serve_s3(address: str) -> None:
    """Serve an S3 with one bucket, until this process is ended."""
    from moto.server import ThreadedMotoServer

    from engine.data.stores.object_store import ObjectStore
    from engine.data.stores.opening import open_store

    ThreadedMotoServer(ip_address=address, port=S3_PORT, verbose=False).start()
    store = open_store(f"s3://{BUCKET}/unused")
    assert isinstance(store, ObjectStore)
    store.client.fs.call_s3("create_bucket", Bucket=BUCKET)
    print("up", flush=True)
    signal.pause()


def machine_killed(site: Site) -> None:
    """A machine is lost in the middle of a shard: no strike, and the run ends on the others."""
    driver = site.start("machine-killed", gated=True)
    site.await_gates("machine-killed")
    site.machines.kill(site.machines.nodes[-1])
    site.await_log("machine-killed", "node was lost")
    site.end("machine-killed", driver)
    assert "process died" not in site.log("machine-killed")


def spot_losses(site: Site) -> None:
    """All machines but the head's are lost in the same second; new ones that join later take their place."""
    driver = site.start("spot-losses", gated=True)
    site.await_gates("spot-losses")
    for machine in site.machines.nodes[1:]:
        site.machines.kill(machine)
    site.gates("spot-losses").forget()
    site.ready(wait=False)
    site.await_log("spot-losses", "node was lost")
    site.machines.wait_for_nodes()
    # The lost shards are made again first, on the new machines.
    site.await_gates("spot-losses", site.num_nodes - 1)
    site.end("spot-losses", driver)


def machine_frozen(site: Site) -> None:
    """A machine stands still until it is given up, and then goes on with the shard that another has by now."""
    driver = site.start("machine-frozen", gated=True)
    site.await_gates("machine-frozen")
    machine = site.machines.nodes[-1]
    machine.freeze()
    site.await_log("machine-frozen", "node was lost")
    site.gates("machine-frozen").open(*ALL_SHARDS)
    machine.thaw()
    site.end("machine-frozen", driver)
    site.machines.kill(machine)
    assert "process died" not in site.log("machine-frozen")


def machine_cut(site: Site) -> None:
    """A machine is cut off from the network until it is given up, and comes back.

    Its worker goes on meanwhile; where the output is a shared folder it commits a shard that another commits, too.
    """
    driver = site.start("machine-cut", gated=True)
    site.await_gates("machine-cut")
    machine = site.machines.nodes[-1]
    machine.cut()
    site.gates("machine-cut").open(*ALL_SHARDS)
    site.await_log("machine-cut", "node was lost")
    machine.mend()
    site.end("machine-cut", driver)
    site.machines.kill(machine)
    assert "process died" not in site.log("machine-cut")


def short_freeze(site: Site) -> None:
    """A machine stands still, and another is cut off, for less than Ray's patience: nothing is lost."""
    driver = site.start("short-freeze", gated=True)
    site.await_gates("short-freeze")
    frozen, cut = site.machines.nodes[-1], site.machines.nodes[-2 if site.num_nodes > 2 else -1]
    frozen.freeze()
    cut.cut()
    time.sleep(3.0)
    cut.mend()
    frozen.thaw()
    site.end("short-freeze", driver)
    assert "lost" not in site.log("short-freeze"), site.log("short-freeze")


def machine_added(site: Site) -> None:
    """A run that was given more workers than there is room for uses the machines that join."""
    for machine in site.machines.nodes[1:]:
        site.machines.kill(machine)
    driver = site.start("machine-added", gated=True)
    site.await_gates("machine-added", 1)
    site.ready(wait=False)
    site.await_gates("machine-added")
    site.end("machine-added", driver)


def head_lost(site: Site) -> None:
    """The head's machine is lost: a driver elsewhere ends with one line, and the run continues on another cluster."""
    driver = site.start("head-lost", machine=site.machines.nodes[-1], seconds=SECONDS)
    site.await_log("head-lost", "samples")
    site.machines.kill(site.machines.head)
    assert driver.wait(GIVE_UP_SECONDS) == EXIT_DRAINED
    [line] = [line for line in site.log("head-lost").splitlines() if line.startswith("error: ")]
    assert "was lost (its head at" in line and "the same command continues once there is a cluster" in line
    site.ready()
    site.end("head-lost", site.start("head-lost"))


def head_and_driver_lost(site: Site) -> None:
    """The head's machine is lost with its driver: another is refused as long as the lease lasts, then takes over."""
    site.start("head-driver", gated=True)
    site.await_gates("head-driver")
    site.machines.kill(site.machines.head)
    site.ready()
    site.gates("head-driver").open(*ALL_SHARDS)
    site.end("head-driver", await_lease(site, "head-driver"))


def two_drivers(site: Site) -> None:
    """A driver on another machine of the cluster is refused and names the first one, which completes its run."""
    first = site.start("two-drivers", gated=True)
    site.await_gates("two-drivers")
    second = site.start("two-drivers", machine=site.machines.nodes[-1])
    assert second.wait(GIVE_UP_SECONDS) == EXIT_OWNED
    assert f"on machine-{site.machines.head.number}" in site.log("two-drivers")
    site.end("two-drivers", first)


def head_cut(site: Site) -> None:
    """The machine of head and driver is cut off, from its workers and from a store on the network, and comes back."""
    driver = site.start("head-cut", seconds=SECONDS)
    site.await_log("head-cut", "samples")
    site.machines.head.cut()
    time.sleep(PASSING_SECONDS)
    site.machines.head.mend()
    code = driver.wait(GIVE_UP_SECONDS)
    assert code in (EXIT_OK, EXIT_DRAINED), f"head cut: {code}"
    # Ray has given up all machines but this one, or may do so yet.
    site.machines.kill_all()
    site.ready()
    site.end("head-cut", await_lease(site, "head-cut"))


def await_lease(site: Site, name: str, **options: Any) -> Program:
    """A driver that is not refused for the lease of one that was lost with its machine."""
    while True:
        before = len(site.log(name)) if (site.folder / f"{name}.log").exists() else 0
        driver = site.start(name, **options)
        while driver.poll() is None and "joining Ray" not in site.log(name)[before:]:
            time.sleep(0.1)
        if driver.poll() != EXIT_OWNED:
            return driver


SCENARIOS: tuple[Callable[[Site], None], ...] = (
    machine_killed,
    spot_losses,
    machine_frozen,
    machine_cut,
    short_freeze,
    machine_added,
    two_drivers,
    head_cut,
    head_lost,
    head_and_driver_lost,
)


def run_scenario(site: Site, scenario: Callable[[Site], None]) -> None:
    """Run one on a cluster that is whole."""
    site.ready()
    began = time.monotonic()
    scenario(site)
    print(f"{scenario.__name__}: whole and equal in {time.monotonic() - began:.0f} s", flush=True)


def num_killed(accidents: Counter[str]) -> int:
    """Machines, and processes of their own, that were killed; a pair are two."""
    return sum(num * (2 if what == "pair" else 1) for what, num in accidents.items() if what not in PASSING)


def kill_at_random(site: Site, num_kills: int, draw: random.Random) -> Counter[str]:
    """Kill parts of a cluster until so many are dead; every run is then completed and checked."""
    accidents: Counter[str] = Counter()
    number = 0
    while num_killed(accidents) < num_kills:
        name = f"killed-{number:03d}"
        number += 1
        enough = min(num_kills, num_killed(accidents) + KILLS_A_RUN)
        while num_killed(accidents) < enough:
            site.ready()
            driver = await_lease(site, name, seconds=SECONDS)
            if harass(site, driver, accidents, enough, draw, name) == EXIT_OK:
                break
        complete(site, name)
        site.check(name)
        print(f"{name}: whole and equal after {num_killed(accidents)} kills: {dict(accidents)}", flush=True)
    return accidents


def complete(site: Site, name: str) -> None:
    """Continue a run to its end; where a busy machine kept its store from answering, by the same command again."""
    for _ in range(MAX_STARTS):
        site.ready()
        code = await_lease(site, name).wait(GIVE_UP_SECONDS)
        if code != EXIT_DRAINED:
            break
    assert code in (EXIT_OK, EXIT_INCOMPLETE), f"{name}: ended with {code}"


def harass(
    site: Site, driver: Program, accidents: Counter[str], enough: int, draw: random.Random, name: str
) -> int | None:
    """Kill parts of a driver's cluster while its workers sample, until it ends; its exit code, if any."""
    num_seen = num_reports(site, name)
    while driver.poll() is None:
        if num_killed(accidents) >= enough:
            driver.kill()
            return None
        # Only while workers sample: where several in a row die as they load, a run rightly says that none starts.
        if num_reports(site, name) == num_seen:
            time.sleep(0.2)
            continue
        time.sleep(draw.random() * 1.5)
        what = draw.choices(list(VICTIMS), list(VICTIMS.values()))[0]
        if driver.poll() is None and hit(site, driver, what, draw):
            accidents[what] += 1
            num_seen = num_reports(site, name)
            if what in FATAL:
                break
            site.ready(wait=False)
    code = driver.wait(GIVE_UP_SECONDS)
    assert code in (EXIT_OK, EXIT_INCOMPLETE, EXIT_DRAINED, -signal.SIGKILL, 128 + signal.SIGKILL), f"{name}: {code}"
    assert "Traceback" not in site.log(name), f"{name}: a traceback in its log"
    return code


def num_reports(site: Site, name: str) -> int:
    """How often the drivers of a run have reported samples, once a second while there are any."""
    return site.log(name).count(" samples, ")


def hit(site: Site, driver: Program, what: str, draw: random.Random) -> bool:
    """One accident; False if there is nothing to hit."""
    others = site.machines.nodes[1:]
    if what == "driver":
        driver.kill()
    elif what == "head":
        site.machines.kill(site.machines.head)
    elif what in ("actor", "gcs"):
        name = {"actor": "ray::RayHost", "gcs": "gcs_server"}[what]
        pids = [pid for machine in site.machines.nodes for pid in machine.named(name)]
        if not pids:
            return False
        with contextlib.suppress(ProcessLookupError):
            os.kill(draw.choice(pids), signal.SIGKILL)
    elif what in PASSING:
        machine = draw.choice(others)
        begin, end = (machine.freeze, machine.thaw) if what == "frozen" else (machine.cut, machine.mend)
        begin()
        time.sleep(draw.random() * PASSING_SECONDS)
        end()
    else:
        for machine in draw.sample(others, 2 if what == "pair" else 1):
            site.machines.kill(machine)
    return True


if __name__ == "__main__":
    serve_s3(sys.argv[1])

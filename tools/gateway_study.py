"""Runs on a real S3 under fire: `python -m tools.gateway_study FOLDER --kills 20`.

Starts Ceph's RADOS Gateway in FOLDER (`tools/s3_gateway.py`), or uses the store that `AWS_ENDPOINT_URL` names. Workers
that sleep instead of sampling run on it while drivers and workers are killed, two drivers meet, and a proxy breaks one
request in ten: 500, 503, resets, lost and slow answers, bodies that break off. Every run is then whole, and its tars
are byte for byte those of a run in a folder. So are those of the quickstart with its real models.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from engine.data.run.commits import list_commits
from engine.data.run.shards import SHARDS
from engine.data.run.verify import verify
from engine.data.stores.base import Store
from engine.data.stores.object_store import ObjectStore
from engine.data.stores.opening import open_store
from engine.driver.executors.local import LocalExecutor
from engine.errors import EXIT_DRAINED, EXIT_OK, EXIT_OWNED
from tests.s3_proxy import Fault, Request, error_body, proxy_of
from tests.sleepy import run_sleepy, tars

REPOSITORY = Path(__file__).parents[1]
BUCKET = "riskforge-study"
COUNT = 4
NUM_SHARDS = 10
GIVE_UP_SECONDS = 300.0
# More than s3fs uploads in one request.
LARGE_BYTES = 101 * 2**20
SLOW_SECONDS = 3.0
FAULTS = (
    Fault(kind="status", status=500, body=error_body("InternalError")),
    Fault(kind="status", status=503, body=error_body("SlowDown")),
    Fault(kind="reset"),
    Fault(kind="close"),
    Fault(kind="lost"),
    Fault(kind="cut"),
    Fault(kind="slow", seconds=SLOW_SECONDS),
)
QUICKSTART = [
    "sampling.num_inference_steps=4", "requests.0.count=3", "requests.1.count=3", "requests.2.count=1",
    "requests.2.contexts=['']", "output.samples_per_shard=4", "guidance.boundary.every=2",
]  # fmt: skip


class Place:
    """Where the runs of a study are.

    Args:
        folder: for what is on this machine.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._numbers = itertools.count()
        run_sleepy(folder / "clean", COUNT, LocalExecutor(2))
        self._tars = tars(folder / "clean")

    def new(self, name: str) -> ObjectStore:
        """An address that nothing is at."""
        store = open_store(f"s3://{BUCKET}/{name}-{os.getpid()}-{next(self._numbers)}")
        assert isinstance(store, ObjectStore)
        return store

    def check(self, store: Store) -> None:
        """A run is complete, whole, and equal to one in a folder.

        Raises:
            AssertionError: it is not.
        """
        findings = [one for one in verify(store).findings if "_state/torn" not in one.text]
        assert not findings, findings
        assert {name: store.read(f"{SHARDS}/{name}") for name in self._tars} == self._tars, f"{store.uri}: other bytes"
        assert store.exists("_SUCCESS") and len(list_commits(store)) == NUM_SHARDS


def start(uri: str, kind: str = "local", **faults: Any) -> subprocess.Popen[str]:
    """A driver in a process of its own."""
    command = [sys.executable, "-m", "tests.sleepy", uri, str(COUNT), kind, json.dumps(faults)]
    return subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(uri: str, codes: Sequence[int] = (EXIT_OK,), kind: str = "local", **faults: Any) -> int:
    """Run a driver to its end; its exit code is one of these."""
    driver = start(uri, kind, **faults)
    _, errors = driver.communicate(timeout=GIVE_UP_SECONDS)
    assert driver.returncode in codes, f"{uri}: ended with {driver.returncode}: {errors[-2000:]}"
    return driver.returncode


def conditions(place: Place) -> str:
    """Of writers of different bytes one has the name, of small objects and of ones that are uploaded in parts."""
    names, stores = itertools.count(), [place.new("race") for _ in range(3)]
    stores = [ObjectStore("s3", BUCKET, stores[0].client.root.partition("/")[2]) for _ in stores]
    for size in (10, 10, 10, LARGE_BYTES):
        name, paths = f"object-{next(names)}", []
        for number in range(len(stores)):
            paths.append(place.folder / f"body-{number}")
            paths[-1].write_bytes(bytes([number]) * size)
        with ThreadPoolExecutor(len(stores)) as pool:
            won = list(pool.map(ObjectStore.publish, stores, [name] * len(stores), paths))
        assert sum(won) == 1, f"{name}: {won}"
        assert stores[0].fetch(name).read_bytes() == paths[won.index(True)].read_bytes(), f"{name}: bytes of another"
        assert not stores[won.index(False)].publish(name, paths[won.index(False)])
    honoured = stores[0]._conditional.are_parts_conditional
    for one in stores:
        one.remove_tree("")
    return f"{len(stores)} writers, objects up to {LARGE_BYTES // 2**20} MiB; uploads in parts are" + (
        " conditional" if honoured else " not conditional, so one request each"
    )


def killed_drivers(place: Place, num_kills: int, seed: int = 0) -> str:
    """SIGKILL at moments drawn at random, in the middle of uploads and of the close, until the run is complete."""
    draw, num_killed, num_runs = random.Random(seed), 0, 0
    while num_killed < num_kills:
        store, num_runs = place.new("killed"), num_runs + 1
        while num_killed < num_kills and not store.exists("_SUCCESS"):
            driver = start(store.uri, seconds=0.02)
            num_before = len(list_commits(store))
            while driver.poll() is None and len(list_commits(store)) == num_before < NUM_SHARDS:
                time.sleep(0.05)
            time.sleep(draw.random() * 2.0)
            num_killed += driver.poll() is None
            driver.send_signal(signal.SIGKILL)
            driver.communicate()
        finish(store.uri)
        place.check(store)
        store.remove_tree("")
    return f"{num_killed} drivers killed in {num_runs} runs"


def killed_workers(place: Place) -> str:
    """Workers of Ray that are killed by SIGKILL in the middle of their shards."""
    store, victims = place.new("workers"), (1, 4, 7)
    finish(store.uri, kind="ray", die_once=victims)
    place.check(store)
    return f"{len(victims)} workers killed"


def two_drivers(place: Place) -> str:
    """The second ends with exit code 4, the first one is then killed, and the third takes over at once."""
    store = place.new("two")
    first = start(store.uri, hang_once=[NUM_SHARDS - 1])
    while not list_commits(store):
        assert first.poll() is None, first.communicate()[1]
        time.sleep(0.05)
    finish(store.uri, (EXIT_OWNED,))
    first.send_signal(signal.SIGKILL)
    first.communicate()
    finish(store.uri)
    place.check(store)
    return "second refused, third took over"


def broken_network(place: Place, share: float = 0.1, seed: int = 0) -> str:
    """A share of all requests fails, each in one of the ways; the same command until it ends with 0."""
    draw, lock, broken = random.Random(seed), threading.Lock(), Counter[str]()
    seen: Counter[str] = Counter()

    def choose(request: Request) -> Fault | None:
        with lock:
            seen[request.operation] += 1
            if draw.random() >= share:
                return None
            # The answer to HEAD has no body that could break off.
            fault = draw.choice([one for one in FAULTS if request.operation != "HeadObject" or one.kind != "cut"])
            broken[str(fault.status) if fault.kind == "status" else fault.kind] += 1
            return fault

    store, num_drivers = place.new("broken"), 1
    with proxy_of(os.environ["AWS_ENDPOINT_URL"]) as proxy, environment({"AWS_ENDPOINT_URL": proxy.uri}):
        proxy.choose = choose
        while finish(store.uri, (EXIT_OK, EXIT_DRAINED)) != EXIT_OK:
            num_drivers += 1
    place.check(store)
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(broken.items()))
    return f"{broken.total()} of {seen.total()} requests broken ({kinds}); {num_drivers} driver(s)"


def real_models(place: Place) -> str:
    """The quickstart with the digits' models, in a folder and here; then an export of it to an address."""
    riskforge, job = str(Path(sys.executable).with_name("riskforge")), str(REPOSITORY / "jobs/quickstart.yaml")
    sets = [part for one in QUICKSTART for part in ("--set", one)]
    store, folder, exported = place.new("zoo"), place.folder / "zoo", place.new("export")
    for uri in (store.uri, str(folder)):
        subprocess.run([riskforge, "run", job, "--output", uri, "--executor", "local", *sets], check=True)
    names = [path.name for path in folder.glob(f"{SHARDS}/*.tar")]
    assert all(store.read(f"{SHARDS}/{name}") == (folder / SHARDS / name).read_bytes() for name in names)
    subprocess.run([riskforge, "verify", store.uri], check=True)
    subprocess.run([riskforge, "export", store.uri, "--output", exported.uri], check=True)
    subprocess.run([riskforge, "inspect", exported.uri], check=True, stdout=subprocess.DEVNULL)
    return f"{len(names)} shards of real models equal, an export to an address read again"


@contextlib.contextmanager
def environment(settings: dict[str, str]) -> Iterator[None]:
    """Settings of this process and those that it starts, for the time of a block."""
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            os.environ.update({} if value is None else {name: value})


def _gateway(command: str, folder: Path) -> str:
    """What `tools/s3_gateway.py` prints."""
    arguments = [sys.executable, "-m", "tools.s3_gateway", command, str(folder)]
    return subprocess.run(arguments, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, check=True).stdout


@contextlib.contextmanager
def bucket(folder: Path) -> Iterator[None]:
    """A store with an empty bucket, which the environment names."""
    with contextlib.ExitStack() as stack:
        if "AWS_ENDPOINT_URL" not in os.environ:
            settings = _gateway("start", folder / "gateway").removeprefix("export ").split()
            stack.callback(_gateway, "stop", folder / "gateway")
            stack.enter_context(environment(dict(one.split("=", 1) for one in settings)))
        store = open_store(f"s3://{BUCKET}/x")
        assert isinstance(store, ObjectStore)
        if not store.client.fs.exists(BUCKET):
            store.client.fs.call_s3("create_bucket", Bucket=BUCKET)
        yield


def main(arguments: list[str]) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="new, with a short path")
    parser.add_argument("--kills", type=int, default=20, help="of drivers")
    parser.add_argument("--share", type=float, default=0.1, help="of requests that break")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", metavar="SCENARIO", help="such as conditions or real-models; default: all")
    options = parser.parse_args(arguments)
    scenarios: dict[str, Callable[[Place], str]] = {
        "conditions": conditions,
        "two-drivers": two_drivers,
        "broken-network": lambda place: broken_network(place, options.share, options.seed),
        "killed-drivers": lambda place: killed_drivers(place, options.kills, options.seed),
        "killed-workers": killed_workers,
        "real-models": real_models,
    }
    if unknown := set(options.only or ()) - set(scenarios):
        parser.error(f"--only {min(unknown)}: is not one of {', '.join(scenarios)}")
    options.folder.mkdir(parents=True)
    with bucket(options.folder):
        place = Place(options.folder)
        for name in options.only or scenarios:
            started = time.monotonic()
            print(f"{name}: {scenarios[name](place)} ({time.monotonic() - started:.0f} s)", flush=True)
    shutil.rmtree(options.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Real runs under real fire: `python -m tools.chaos FOLDER --kills 60 --seed 0`.

Workers that sleep instead of sampling run on a Ray of their own, again and again, while actors, raylet, GCS and driver
are killed with SIGKILL at moments drawn from the seed. The run is then continued to its end, and must be what a run
without accidents makes: keys, metadata and tar bytes. With `--kind zoo` it is the quickstart with its real models, and
`verify --deep` scores its images again. Before the kills: a full disk, an output that cannot be written, torn files in
the place of shards, two drivers at once, and leases written by clocks that jumped. With `--kind nodes` machines of a
cluster are lost as well, see `tests/chaos_nodes.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from engine.data.run.commits import list_commits
from engine.data.run.verify import verify
from engine.data.stores.base import LEASES
from engine.data.stores.lease import hold, read_holder
from engine.data.stores.opening import open_store
from engine.errors import EXIT_OK, EXIT_OWNED, EXIT_USER
from tests.chaos_runs import GIVE_UP_SECONDS, KILLS_A_RUN, check, drive_command

VICTIMS = ("actor", "raylet", "gcs", "driver")
# Driver and cluster die of some kills; actors are killed more often, as the run survives it.
WEIGHTS = (5, 1, 1, 2)
SAMPLE_SECONDS = 0.05
DISK_BYTES = 600_000
# A shard of the first round.
HANG_AT = 5
QUICKSTART = Path(__file__).parents[1] / "jobs/quickstart.yaml"


def start(
    output: Path, kind: str = "ray", *, retry: bool = False, seconds: float = SAMPLE_SECONDS, hang_at: int = -1
) -> subprocess.Popen[str]:
    """A driver in a process of its own; one that hangs at a shard does not end before it is hit."""
    faults = {"seconds": seconds, "hang_once": [hang_at]}
    command = [sys.executable, *drive_command(output, kind, retry=retry, faults=faults)]
    if kind == "zoo":
        riskforge = str(Path(sys.executable).with_name("riskforge"))
        what = ["retry", str(output)] if retry else ["run", str(QUICKSTART), "--output", str(output)]
        command = [riskforge, *what, "--workers", "2"]
    with (output.parent / f"{output.name}.log").open("a") as log:
        return subprocess.Popen(command, text=True, stdout=log, stderr=log)


def finish(output: Path, kind: str = "local") -> int:
    """Make a run or continue it to its end; shards that were killed three times are given a fresh start."""
    retry = kind == "local" or bool(list(output.glob("_state/quarantine/*")))
    return start(output, kind, retry=retry, seconds=0.0).wait(GIVE_UP_SECONDS)


def await_file(driver: subprocess.Popen[str], output: Path, pattern: str) -> None:
    """Wait until a driver has made a file."""
    while not list(output.glob(pattern)):
        assert driver.poll() is None, f"{output.name}: ended with {driver.returncode} before there is {pattern}"
        time.sleep(0.02)


def processes(driver: int) -> dict[str, list[int]]:
    """Processes of a driver's cluster by what they are."""
    listing = subprocess.run(["ps", "-ww", "-eo", "pid,ppid,args"], capture_output=True, text=True, check=True).stdout
    children: dict[int, list[tuple[int, str]]] = {}
    for line in listing.splitlines()[1:]:
        number, parent, arguments = line.split(None, 2)
        children.setdefault(int(parent), []).append((int(number), arguments))
    found: dict[str, list[int]] = {name: [] for name in VICTIMS} | {"driver": [driver]}
    waiting = [driver]
    while waiting:
        for pid, arguments in children.get(waiting.pop(), []):
            waiting.append(pid)
            program = arguments.split()[0]
            if "gcs_server" in program:
                found["gcs"].append(pid)
            elif program.endswith("raylet"):
                found["raylet"].append(pid)
            elif arguments.startswith("ray::RayHost"):
                found["actor"].append(pid)
    return found


def clear_cluster(pids: dict[str, list[int]], driver: subprocess.Popen[str]) -> None:
    """End what is left of a driver that was hit, by the numbers of its own processes."""
    driver.kill()
    driver.wait()
    for pid in [pid for group in pids.values() for pid in group]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def kill_at_random(folder: Path, clean: Path, num_kills: int, draw: random.Random, kind: str = "ray") -> Counter[str]:
    """Kill processes of runs until so many are dead; every run is then finished and checked."""
    killed: Counter[str] = Counter()
    number = 0
    while killed.total() < num_kills:
        output = folder / f"killed-{number:03d}"
        number += 1
        enough = min(num_kills, killed.total() + KILLS_A_RUN)
        while killed.total() < enough and not (output / "_SUCCESS").exists():
            driver = start(output, kind, retry=bool(list(output.glob("_state/quarantine/*"))))
            if kind == "local":
                killed += kill_driver(driver, output, draw)
            else:
                killed += harass(driver, output, enough - killed.total(), draw)
        code = finish(output, "zoo" if kind == "zoo" else "local")
        assert code in (EXIT_OK, 3), f"{output.name}: ended with {code}"
        check(output, clean, output.name, deep=kind == "zoo")
        print(f"{output.name}: whole and equal after {dict(killed)}", flush=True)
        shutil.rmtree(output)
    return killed


def kill_driver(driver: subprocess.Popen[str], output: Path, draw: random.Random) -> Counter[str]:
    """Kill a driver whose workers are threads of it, at a moment drawn at random once it commits."""
    num_before = len(list(output.glob("_state/commits/*")))
    while driver.poll() is None and len(list(output.glob("_state/commits/*"))) == num_before:
        time.sleep(0.02)
    time.sleep(draw.random() * 1.5)
    is_alive = driver.poll() is None
    driver.kill()
    driver.wait()
    return Counter({"driver": int(is_alive)})


def harass(driver: subprocess.Popen[str], output: Path, num_kills: int, draw: random.Random) -> Counter[str]:
    """Kill processes of one driver, at moments drawn at random once its first actor lives, until it has ended."""
    killed: Counter[str] = Counter()
    last = processes(driver.pid)
    give_up = time.monotonic() + GIVE_UP_SECONDS
    while driver.poll() is None and killed.total() < num_kills and time.monotonic() < give_up:
        last = processes(driver.pid)
        if not last["actor"]:
            time.sleep(0.2)
            continue
        time.sleep(draw.random() * 1.5)
        victim = draw.choices(VICTIMS, WEIGHTS)[0]
        last = processes(driver.pid)
        if not last[victim]:
            continue
        with contextlib.suppress(ProcessLookupError):
            os.kill(draw.choice(last[victim]), signal.SIGKILL)
            killed[victim] += 1
        if victim != "actor":
            break
    # A run without raylet or GCS ends by itself, after Ray's own time limits; the next driver need not wait for that.
    time.sleep(1.0)
    clear_cluster(last, driver)
    return killed


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A file system of a few hundred kilobytes."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def full_disk(folder: Path, clean: Path) -> None:
    """The disk is full in the middle: the run says so; with room again, it continues to equal bytes."""
    with small_disk(folder / "disk") as disk:
        output = disk / "run"
        code = start(output, "local", seconds=0.0).wait(GIVE_UP_SECONDS)
        assert code == EXIT_USER and "the disk is full" in (disk / "run.log").read_text(), f"full disk: {code}"
        assert not verify(open_store(str(output))).damage, "full disk: what is committed is damaged"
        (disk / "run.log").unlink()
        subprocess.run(["mount", "-o", "remount,size=50m", str(disk)], check=True)
        assert finish(output) == EXIT_OK
        check(output, clean, "full disk")


def read_only(folder: Path, clean: Path) -> None:
    """An output on a file system that is mounted for reading."""
    with small_disk(folder / "sealed") as disk:
        (disk / "run").mkdir()
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        command = [sys.executable, *drive_command(disk / "run", "local")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == EXIT_USER and "read-only" in done.stderr, f"read only: {done.stderr}"
        assert "Traceback" not in done.stderr


def torn_files(folder: Path, clean: Path) -> None:
    """Torn, foreign and empty files in the places of shards before they are made."""
    output = folder / "torn"
    driver = start(output, "local", seconds=3600.0)
    await_file(driver, output, "_state/plan/000000.json")
    driver.kill()
    driver.wait()
    (output / "shards").mkdir(exist_ok=True)
    whole = (clean / "shards/sleepy-000005.tar").read_bytes()
    plants = {"000007.tar": whole[:3000], "000008.tar": b"", "000009.parquet": b"torn", "000010.tar": whole}
    for name, data in plants.items():
        (output / f"shards/sleepy-{name}").write_bytes(data)
    assert finish(output) == EXIT_OK
    check(output, clean, "torn files")


def two_drivers(folder: Path, clean: Path) -> None:
    """The second is refused with the name of the first, which is then killed; the third takes over at once."""
    output = folder / "two"
    first = start(output, "local", seconds=0.0, hang_at=HANG_AT)
    await_file(first, output, "shards/*.tar")
    assert start(output, "local").wait(GIVE_UP_SECONDS) == EXIT_OWNED
    assert f"process {first.pid} on " in (folder / "two.log").read_text()
    first.kill()
    first.wait()
    assert finish(output) == EXIT_OK
    check(output, clean, "two drivers")


def frozen_driver(folder: Path, clean: Path) -> None:
    """A driver that is frozen while its lease is taken: both are at work for a while, and the bytes are right."""
    output = folder / "frozen"
    first = start(output, "local", seconds=0.0, hang_at=HANG_AT)
    await_file(first, output, "shards/*.tar")
    os.kill(first.pid, signal.SIGSTOP)
    # As if it ran on another machine, where its lock is not seen and its clock is an hour late.
    shutil.rmtree(output / "_state/locks")
    store = open_store(str(output))
    holder = read_holder(store)
    assert holder is not None
    old = dataclasses.replace(holder, host="elsewhere", boot="", expires=time.time() - 3600, length_seconds=2.0)
    [lease] = store.list(LEASES)
    store.replace(lease, json.dumps(dataclasses.asdict(old)).encode())
    second = start(output, "local", seconds=0.1)
    while store.exists(lease):
        time.sleep(0.05)
    os.kill(first.pid, signal.SIGCONT)
    assert second.wait(GIVE_UP_SECONDS) == EXIT_OK
    assert first.wait(GIVE_UP_SECONDS) == EXIT_OWNED
    check(output, clean, "frozen driver")


def jumping_clock(folder: Path, clean: Path) -> None:
    """Leases from the future and from long ago: the run neither waits for days nor is refused for ever."""
    output = folder / "clock"
    assert finish(output) == EXIT_OK
    store = open_store(str(output))
    for moment in (1e6, -1e6):
        holder = read_holder(store)
        assert holder is not None
        jumped = dataclasses.replace(
            holder, host="elsewhere", boot="", expires=time.time() + moment, length_seconds=2.0, is_released=False
        )
        store.replace(store.list(LEASES)[-1], json.dumps(dataclasses.asdict(jumped)).encode())
        with hold(store):
            pass
    check(output, clean, "jumping clock")


SCENARIOS: tuple[Callable[[Path, Path], None], ...] = (
    torn_files,
    two_drivers,
    frozen_driver,
    jumping_clock,
    full_disk,
    read_only,
)


def main(arguments: list[str]) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--kind",
        choices=("ray", "local", "zoo", "nodes"),
        default="ray",
        help="local: no Ray, drivers alone are killed; zoo: real models on Ray, kills alone; nodes: several machines",
    )
    parser.add_argument("--store", choices=("folder", "s3"), default="folder", help="where runs of --kind nodes are")
    parser.add_argument("--scenario", action="append", metavar="NAME", help="these of --kind nodes alone; none: none")
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    clean = options.folder.resolve() / "clean"
    assert finish(clean, "zoo" if options.kind == "zoo" else "local") == EXIT_OK
    print(f"clean: {len(list_commits(open_store(str(clean))))} shards", flush=True)
    attack = attack_nodes if options.kind == "nodes" else attack_processes
    attack(clean, options)
    return 0


def attack_processes(clean: Path, options: argparse.Namespace) -> None:
    """Scenarios, and kills at random, on this machine."""
    for scenario in SCENARIOS if options.kind != "zoo" else ():
        scenario(options.folder, clean)
        print(f"{scenario.__name__}: whole and equal", flush=True)
    killed = kill_at_random(options.folder, clean, options.kills, random.Random(options.seed), options.kind)
    print(f"{killed.total()} killed: {', '.join(f'{num} {name}' for name, num in killed.items())}; all whole and equal")


def attack_nodes(clean: Path, options: argparse.Namespace) -> None:
    """The same on the machines of a cluster."""
    from tests import chaos_nodes

    names = {scenario.__name__: scenario for scenario in chaos_nodes.SCENARIOS}
    with chaos_nodes.opened_site(clean.parent, clean, store=options.store) as site:
        for name in options.scenario or names:
            if name != "none":
                chaos_nodes.run_scenario(site, names[name])
        accidents = chaos_nodes.kill_at_random(site, options.kills, random.Random(options.seed))
    print(f"{chaos_nodes.num_killed(accidents)} killed: {dict(accidents)}; all whole and equal")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

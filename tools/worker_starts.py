"""What starts of workers cost: `python -m tools.worker_starts --workers 2`.

Actors without Ray around them have workers built that load the models of a small job on digits and make a batch of each
of three requests: each in its own process, and forked from a server. CPU seconds and memory are those of all processes
when the workers are ready.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from engine.driver.executors.fork_server import ForkServer
from tests.test_fork_server import LOADING


class Cost(NamedTuple):
    """What a process has used: CPU seconds, and MiB of memory that is its own and that it has a share of."""

    cpu_seconds: float
    own_mib: float
    proportional_mib: float


def main(arguments: list[str]) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    num_workers = parser.parse_args(arguments).workers
    measure("alone", "", num_workers)
    server = ForkServer()
    try:
        measure("forked", server.address, num_workers)
    finally:
        server.close()
    return 0


def measure(name: str, address: str, num_workers: int) -> None:
    """Start workers, print their costs, and end them."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, f"{number}.json") for number in range(num_workers)]
        actors = [_start(address, path) for path in paths]
        for actor in actors:
            assert actor.stdout is not None
            print(actor.stdout.readline().strip())
        facts = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    processes = {"actor": [actor.pid for actor in actors]}
    if address:
        processes |= {"worker": [row["process"] for row in facts], "server": [facts[0]["parent"]]}
    costs = {kind: [_cost(number) for number in numbers] for kind, numbers in processes.items()}
    for kind, of_kind in costs.items():
        for cost in of_kind:
            print(f"{name:8} {kind:8} {cost.cpu_seconds:6.1f} CPU s {cost.own_mib:6.0f} MiB of its own")
    every = [cost for of_kind in costs.values() for cost in of_kind]
    seconds, memory = sum(cost.cpu_seconds for cost in every), sum(cost.proportional_mib for cost in every)
    print(f"{name:8} {'all':8} {seconds:6.1f} CPU s {memory:6.0f} MiB")
    for actor in actors:
        actor.kill()
        actor.communicate()


def _start(address: str, path: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", LOADING, address, str(path)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _cost(process: int) -> Cost:
    """What a process has used so far, as Linux counts it."""
    user, system = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[11:13]
    rows = [line.split() for line in Path(f"/proc/{process}/smaps_rollup").read_text(encoding="utf-8").splitlines()[1:]]
    mib = {name.rstrip(":"): int(size) / 1024 for name, size, _ in rows}
    return Cost(
        (int(user) + int(system)) / os.sysconf("SC_CLK_TCK"), mib["Private_Dirty"] + mib["Private_Clean"], mib["Pss"]
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

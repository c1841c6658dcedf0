"""Runs that are killed, and what they are compared with; a driver of its own: `python -m tests.chaos_runs drive ...`.

For `tools/chaos.py` and `tests/chaos_nodes.py`.
"""

from __future__ import annotations

import io
import json
import os
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

import engine.driver.run
from engine.data.run.file_names import METADATA
from engine.data.run.shards import SHARDS
from engine.data.run.verify import verify
from engine.data.stores.base import Store
from engine.data.stores.lease import hold
from engine.data.stores.opening import open_store
from engine.driver.executors.base import Executor
from engine.driver.progress import PlainDisplay
from engine.driver.run import run_job
from engine.driver.scheduling.messages import SchedulerLimits
from engine.errors import EXIT_DRAINED, RiskforgeError
from engine.generation.rescorer import rescore
from engine.job.columns import RUN_COLUMNS
from tests.sleepy import Faults, make_job, make_sleepy

RULE = {"accept": {"is_error": True}, "max_attempts": "8x"}
COUNT = 6
# Then a run is finished and compared, and the next one begins.
KILLS_A_RUN = 12
GIVE_UP_SECONDS = 300.0
# On machines that are lost for good: length of a lease, and how long the head of a cluster may be away.
LOST_SECONDS = 8.0


def drive(output: str, kind: str, options: dict[str, Any]) -> int:
    """A driver: what `riskforge run` does, with workers that sleep in threads, on a Ray of its own, or at an address.

    Args:
        options: see `start`; besides `faults` of the workers, and `workers`, their number.
    """
    from engine.driver.executors import ray_cluster
    from engine.driver.executors.local import LocalExecutor
    from engine.driver.executors.ray import RayExecutor

    workers = options.get("workers", 2)
    if is_address := ":" in kind:
        # Machines that are lost for good, of a test that need not wait for them.
        ray_cluster.HEAD_LOST_SECONDS = LOST_SECONDS
        engine.driver.run.hold = partial(hold, length_seconds=LOST_SECONDS)  # type: ignore[assignment]
    ray = RayExecutor(address=kind if is_address else None, num_workers=workers, device="cpu")
    executor: Executor = LocalExecutor(workers) if kind == "local" else ray
    try:
        return run_job(
            make_job(output, COUNT, request=RULE),
            executor=executor,
            resume="auto",
            confirmed=False,
            display=PlainDisplay(sys.stderr, every_seconds=1.0),
            make_worker=partial(make_sleepy, faults=Faults(**options.get("faults", {}))),
            retry=options.get("retry", False),
            # A shard in quarantine would have the next round plan others in its place.
            limits=SchedulerLimits(max_strikes=KILLS_A_RUN + 1) if is_address else None,
        ).exit_code
    except RiskforgeError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return EXIT_DRAINED


def drive_command(output: Path | str, kind: str, **options: Any) -> list[str]:
    """What starts such a driver, after the name of Python."""
    return ["-m", "tests.chaos_runs", "drive", str(output), kind, json.dumps(options)]


def content(store: Store) -> tuple[dict[str, bytes], list[dict[str, Any]]]:
    """What a run made: its tars, and the rows of its metadata without what depends on the run."""
    import pyarrow.parquet as pq

    tars = {name: store.read(name) for name in store.list(SHARDS) if name.endswith(".tar")}
    rows = (
        pq.read_table(io.BytesIO(store.read(METADATA)))
        .drop_columns([column.name for column in RUN_COLUMNS if column.name != "sha256"])
        .to_pylist()
    )
    return tars, rows


def check(output: Path | str, clean: Path, what: str, *, deep: bool = False) -> None:
    """A run is whole, and equal to the clean one.

    Args:
        output: a folder or an address.
        deep: score a sample of its images again, too.

    Raises:
        AssertionError: with the name of the scenario.
    """
    store = open_store(str(output))
    findings = [*verify(store).findings, *(rescore(store) if deep else [])]
    unexpected = [one for one in findings if "_state/torn" not in one.text]
    assert not unexpected, f"{what}: {unexpected}"
    assert content(store) == content(open_store(str(clean))), f"{what}: other keys, metadata or bytes"


def main(arguments: list[str]) -> int:
    """`drive OUTPUT KIND OPTIONS` or `check OUTPUT CLEAN`."""
    if arguments[0] == "check":
        check(arguments[1], Path(arguments[2]), arguments[1])
        return 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    return drive(arguments[1], arguments[2], json.loads(arguments[3]))


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stderr.flush()
    # Threads that still sleep are not waited for.
    os._exit(code)

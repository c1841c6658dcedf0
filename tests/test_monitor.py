"""What workers do, from the events of a run to the lines of its status: states, rates, limits, files that were bent."""

from __future__ import annotations

import copy
import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from engine.data.stores.lease import hold
from engine.data.stores.opening import open_store
from engine.driver import monitor
from engine.driver.executors.local import LocalExecutor
from engine.driver.executors.worker_output import MAX_LINE_CHARS, MAX_TAIL_BYTES, output_files, read_tails
from engine.driver.monitor import MAX_MACHINES, MAX_ROWS, WORKERS, Monitor, RunCounts
from engine.driver.progress import Tally
from engine.driver.scheduling.messages import ShardProgress, WorkerPlaced
from engine.driver.status import read_status, status_lines
from engine.driver.worker_logs import MAX_LOGS, WorkerLogs
from engine.driver.worker_status import MAX_FILE_BYTES, NUM_SLOWEST, read_workers, worker_lines
from engine.driver.workers import (
    ACCEPTED_SECONDS,
    HANGS,
    IDLE,
    LOADING,
    SAMPLING,
    WAITING,
    WRITING,
    Rates,
    RateValues,
    WorkerTable,
)
from engine.generation.usage import BatchUsage
from tests.run_cases import open_case
from tests.sleepy import Faults, Gates, Recorder, run_sleepy, wait_until


def test_a_worker_goes_through_its_states() -> None:
    """With a second shard queued behind the first, as the scheduler assigns them."""
    table, states = WorkerTable(), []

    def note(shard: int | None) -> None:
        states.append(table.rows[3].state)
        assert table.rows[3].shard == shard

    table.start(3, 1.0)
    note(None)
    table.place(WorkerPlaced(3, "gpu", machine="host"), 2.0)
    note(None)
    table.ready(3, 3.0)
    note(None)
    table.assign(3, 7, 4.0)
    table.assign(3, 8, 5.0)
    note(7)
    table.progress(ShardProgress(3, 7, 2, 0.5, usage=BatchUsage(2)))
    assert (table.rows[3].num_done, table.rows[3].since, table.rows[3].sample_seconds) == (2, 4.0, 0.25)
    table.sampled(3, 7, 6.0)
    note(8)
    assert table.num_in_flight == 2 and table.rows[3].num_done == 0
    table.commit(3, 7, 4, 7.0)
    note(8)
    assert (table.rows[3].since, table.num_in_flight) == (6.0, 1)
    table.sampled(3, 8, 8.0)
    note(8)
    table.commit(3, 8, 4, 9.0)
    note(None)
    assert states == [WAITING, LOADING, IDLE, SAMPLING, SAMPLING, SAMPLING, WRITING, IDLE]
    assert (table.rows[3].num_samples, table.rows[3].num_shards, table.machines[3]) == (8, 2, "host")
    table.stop(3)
    table.progress(ShardProgress(3, 8, 1))
    assert not table.rows


def test_a_shard_that_another_worker_has_committed_is_nobodys() -> None:
    """Two may attempt it at the end of a run."""
    table = WorkerTable()
    for worker in (0, 1):
        table.start(worker, 0.0)
        table.ready(worker, 0.0)
        table.assign(worker, 5, 1.0)
    table.commit(1, 5, 4, 2.0)
    assert [row.state for row in table.rows.values()] == [IDLE, IDLE] and table.num_in_flight == 0
    assert [row.num_samples for row in table.rows.values()] == [0, 4]


def test_rates_are_those_of_the_last_minutes() -> None:
    """A run that was quick for an hour and is slow now; accepted samples come with commits, every few minutes."""
    rates = Rates()
    assert rates.values(0.0, 0, 0) == RateValues()
    for second in range(3600):
        rates.observe(float(second), 10 * second, 5 * second)
    done, accepted = 10 * 3599, 5 * 3599
    for second in range(3600, 3660):
        done += 1
        rates.observe(float(second), done, accepted)
    found = rates.values(3660.0, done, accepted)
    assert found.now == pytest.approx(1.0, rel=0.2) and found.mean == pytest.approx(done / 3660)
    assert found.accepted == pytest.approx(5 * (ACCEPTED_SECONDS - 60) / ACCEPTED_SECONDS, rel=0.05)
    # Samples of a shard that failed are not done any more.
    assert rates.values(3660.0, 0, accepted).now == 0.0


@pytest.fixture
def watched(tmp_path: Path) -> tuple[Monitor, RunCounts]:
    """A monitor of a run of some shards, with no worker yet."""
    store, plan, _ = open_case(tmp_path / "run")
    made = Monitor(store, "token", LocalExecutor(1), Tally(plan, {}))
    return made, RunCounts(plan=plan, num_committed=0, num_quarantined=0, sampling_share=None)


def fill(made: Monitor, num_workers: int, num_machines: int) -> None:
    """Have workers on machines with long names, each slower than the one before; some have been lost."""
    for number in range(num_workers):
        made.table.start(number, time.time() - 100_000)
        made.table.place(WorkerPlaced(number, "", machine=f"ip-10-0-{number % num_machines}.\x1b[31m{'x' * 60}"), 1e9)
        made.table.ready(number, time.time() - 100_000)
        made.table.assign(number, 10**8 + number, time.time() - 99_999)
        usage = BatchUsage(64, 10**9, 5 * 10**9, 8 * 10**10)
        made.table.progress(ShardProgress(number, 10**8 + number, 255, 1000.0 + number, usage=usage))
    for number in range(20):
        made.fault(number, "hangs: " + "no heartbeat " * 40, kind=HANGS, log=f"_state/logs/000000-{number:06d}.txt")


def written(made: Monitor, counts: RunCounts) -> dict[str, Any]:
    """What a status reads of it."""
    made.report(counts)
    wait_until(lambda: made._store.exists(WORKERS), "it is written")
    found = read_workers(made._store, "token")
    assert found is not None
    return found


@pytest.mark.parametrize(("num_workers", "num_machines"), [(45, 2), (100, 100), (5000, 500)])
def test_many_workers_are_a_short_file_and_few_narrow_lines(
    watched: tuple[Monitor, RunCounts], num_workers: int, num_machines: int
) -> None:
    """By machine, and the slowest of them; nothing in a name steers the terminal."""
    made, counts = watched
    fill(made, num_workers, num_machines)
    found = written(made, counts)
    rates = {"samples_per_second": 1234.5, "mean_samples_per_second": 98.7654, "accepted_per_second": 0.01234}
    found |= {"rates": rates, "remaining_seconds": 1e6}
    assert len(made._store.read(WORKERS)) < MAX_FILE_BYTES
    assert found["num_workers"] == num_workers - 20 == sum(found["states"].values())
    assert len(found["workers"]) <= MAX_ROWS and len(found["machines"]) <= MAX_MACHINES
    assert found["workers"][-1]["worker"] == num_workers - 1, "the slowest"
    lines = list(worker_lines(found))
    assert len(lines) < 40 and all(len(line) <= 100 and line.isprintable() for line in lines), lines
    assert lines[0] == "1234 samples/s now, 98.8 on average, 0.0123 accepted/s, 11 d 13 h left for the planned shards"
    start = next(place for place, line in enumerate(lines) if line.startswith("the slowest"))
    shown = [int(line.split()[0]) for line in lines[start + 2 :][:NUM_SLOWEST]]
    assert shown == [*range(num_workers - 1, 19, -1)][:NUM_SLOWEST]
    assert "20 workers replaced: 20 hangs; the latest:" in lines
    assert made._store.exists(WORKERS)
    made.close(counts)
    assert not made._store.exists(WORKERS)


def paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where the values of a document are, of each list those of its first element."""
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value[:1]) if isinstance(value, list) else ()
    return found + [inner for key, below in items for inner in paths(below, (*path, key))]


ODD: tuple[Any, ...] = (None, True, -1, 2**60, 1e300, "x" * 10_000, "\x1b[2J", [], {}, [[]], {"a": 1}, [None] * 1000)


def test_a_bent_file_is_no_harm(watched: tuple[Monitor, RunCounts]) -> None:
    """Any value in the place of any other: the file says nothing then, or what it says is short and safe."""
    made, counts = watched
    fill(made, 22, 2)
    written(made, counts)
    wait_until(lambda: not made._writer._thread.is_alive(), "nothing is written any more")  # type: ignore[union-attr]
    store, file = made._store, Path(made._store.address(WORKERS))
    sound = json.loads(file.read_text())
    for path in paths(sound):
        for odd in ODD:
            bent = copy.deepcopy(sound)
            place = bent
            for key in path[:-1]:
                place = place[key]
            place[path[-1]] = odd
            file.write_text(json.dumps(bent))
            if found := read_workers(store, "token"):
                lines = list(worker_lines(found))
                assert all(len(line) <= 300 and line.isprintable() for line in lines), (path, odd)
                json.dumps(found, allow_nan=False)
    for data in (b"", b"{", b"[]", b"null", b'{"version": 1}', b"\xff", b"x" * (MAX_FILE_BYTES + 1), b"[" * 100_000):
        file.write_bytes(data)
        assert read_workers(store, "token") is None
    file.write_text(json.dumps(sound))
    assert read_workers(store, "token") and read_workers(store, "of another driver") is None
    store.remove(WORKERS)
    assert read_workers(store, "token") is None, "as in an old run"


def test_the_status_of_a_run_has_its_workers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """While a driver is at work, from another process's view; a worker that raised has its traceback in a file."""
    monkeypatch.setattr(monitor, "WRITE_SECONDS", 0.05)
    gates, output = Gates(tmp_path), tmp_path / "run"
    faults = Faults(gated=(2,), gates=str(tmp_path), error=(0,))
    thread = threading.Thread(
        target=lambda: run_sleepy(output, 1, LocalExecutor(1), faults=faults, display=Recorder()), daemon=True
    )
    thread.start()
    wait_until(lambda: 2 in gates.waiting() and any(output.glob("_state/quarantine/0*")), "shard 2 is in flight")
    wait_until(lambda: (read_workers_of(output) or {}).get("shards", {}).get("in_flight") == 1, "it is in the file")
    found = read_status(open_store(str(output)))
    assert found.workers and found.workers["num_faults"] == {"shard_raised": 3}
    [worker] = found.workers["workers"]
    assert (worker["state"], worker["shard"]) == (SAMPLING, 2)
    assert found.workers["shards"] == {"committed": 1, "in_flight": 1, "waiting": 0, "quarantined": 1}
    log = found.workers["faults"][-1]["log"]
    assert all(part in (output / log).read_text() for part in ("Traceback", "ZeroDivisionError: shard 0 is cursed"))
    text = "\n".join(status_lines(found))
    assert "1 worker: 1 sampling; shards: 1 in flight, 0 waiting" in text and f"    {log}" in text
    gates.open(2)
    thread.join(60)
    assert read_status(open_store(str(output))).workers is None and not (output / WORKERS).exists()


def read_workers_of(output: Path) -> dict[str, Any] | None:
    """What its status has of workers."""
    return read_status(open_store(str(output))).workers


def test_what_a_dead_driver_has_left_is_not_shown(watched: tuple[Monitor, RunCounts]) -> None:
    """It was killed, and another one has just begun."""
    made, counts = watched
    fill(made, 21, 1)
    written(made, counts)
    with hold(made._store):
        assert read_status(made._store).workers is None


def test_the_last_output_of_a_process_is_short_and_without_passwords(tmp_path: Path) -> None:
    """Of a file that has grown for days; Ray's own lines are left out, and so are files that are gone."""
    path = tmp_path / "worker.err"
    lines = [":job_id:01000000", "x" * 10_000, "s3://me:secret@bucket is slow", "", "the last"]
    path.write_text("early\n" * 10_000 + "\n".join(lines))
    text = read_tails([str(tmp_path / "none"), str(path)])
    assert text.startswith(f"the end of {path}:\n") and text.endswith("\ns3://***@bucket is slow\nthe last")
    assert len(text) <= MAX_TAIL_BYTES + 200 and ":job_id" not in text
    assert max(map(len, text.split("\n"))) <= MAX_LINE_CHARS
    assert read_tails([]) == "" and isinstance(output_files(), tuple)


def test_logs_are_limited(tmp_path: Path) -> None:
    """A driver whose workers die by the hundred does not fill a bucket; another driver writes its own."""
    logs = WorkerLogs(open_store(str(tmp_path)), 3)
    assert logs._num_left == MAX_LOGS
    logs._num_left = 2
    names = [logs.write(number, "died\x07\n" + "long " * 100_000) for number in range(4)]
    assert names == ["_state/logs/000003-000000.txt", "_state/logs/000003-000001.txt", "", ""]
    text = (tmp_path / names[0]).read_text()
    assert text.startswith("died\\x07\nlong") and len(text) < 70_000

"""Status of a run that is in progress: rate and remaining time from its journal."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

import engine
from engine.data.stores.journal import Journal
from engine.data.stores.lease import hold
from engine.data.stores.opening import open_store
from engine.driver import status
from engine.driver.executors.local import LocalExecutor
from engine.driver.status import MAX_COMMITS, RequestStatus, read_status, status_lines
from tests.corpus_cases import make_run
from tests.sleepy import run_sleepy


@pytest.fixture
def store(tmp_path):
    """A run of five shards, one of which is missing."""
    run_sleepy(tmp_path, 2, LocalExecutor(1))
    for path in [*tmp_path.glob("_state/commits/000004.*"), tmp_path / "_SUCCESS"]:
        path.unlink()
    return open_store(str(tmp_path))


def write_commits(monkeypatch, journal: Journal, times: list[float]) -> None:
    """Events of commits of four samples at these times, and then it is a hundred seconds after 1000."""
    for moment in times:
        monkeypatch.setattr("engine.data.stores.journal.time", SimpleNamespace(time=lambda moment=moment: moment))
        journal.note("committed", shard=0, worker=0, samples=4, accepted=4, failed=0)
    monkeypatch.setattr(status, "time", SimpleNamespace(time=lambda: 1100.0))


def test_the_rate_is_that_of_the_latest_commits(monkeypatch, store):
    """From the first of them until now: its own samples were made before. The rest of the plan takes as long."""
    with hold(store) as lease:
        write_commits(monkeypatch, Journal(store, lease.number), [1000.0, 1010.0, 1020.0])
        found = read_status(store)
        assert (found.state, found.num_committed, found.num_shards) == ("running", 4, 5)
        assert found.samples_per_second == pytest.approx(8 / 100)
        assert found.eta_seconds == pytest.approx(4 / (8 / 100))
        assert "0.08 samples/s, 50 s left for the planned shards" in status_lines(found)
        assert found.last_event["time"] == 1020.0
    # Nobody is at work any more: there is no rate.
    found = read_status(store)
    assert (found.state, found.samples_per_second, found.eta_seconds) == ("stopped", None, None)


def test_old_commits_do_not_count(monkeypatch, store):
    """A run that was slow in the beginning, or waited for machines."""
    with hold(store) as lease:
        write_commits(monkeypatch, Journal(store, lease.number), [1.0, *[1000.0] * MAX_COMMITS])
        assert read_status(store).samples_per_second == pytest.approx(4 * (MAX_COMMITS - 1) / 100)


def test_one_commit_is_no_rate(monkeypatch, store):
    """There is nothing to measure between."""
    with hold(store) as lease:
        write_commits(monkeypatch, Journal(store, lease.number), [1000.0])
        assert read_status(store).samples_per_second is None


def test_a_run_in_progress_is_not_searched_for_lost_files(store, tmp_path):
    """Its files come and go; without a driver, a missing one is damage."""
    next(tmp_path.glob("shards/*000000.tar")).unlink()
    with hold(store):
        found = read_status(store)
        assert found.state == "running" and not found.lost
    found = read_status(store)
    assert found.state == "damaged" and found.lost and any("000000" in line for line in status_lines(found))


def test_a_marked_run_with_a_torn_file_is_stopped(tmp_path):
    """The same command writes the file again."""
    run_sleepy(tmp_path, 1, LocalExecutor(1))
    store = open_store(str(tmp_path))
    assert read_status(store).state == "complete"
    (tmp_path / "metadata.parquet").write_bytes(b"torn")
    found = read_status(store)
    assert found.is_torn and found.state == "stopped"
    assert any("missing or torn" in line for line in status_lines(found))


def test_requests_are_counted(store):
    """Planned samples of all shards, attempts of the committed ones."""
    [request] = read_status(store).requests
    assert request == RequestStatus(
        name="all", planned=20, attempted=16, accepted=16, failed=0, wanted=None, missing=None
    )


def test_a_finished_run_has_its_errors_and_its_pin(call, tmp_path):
    """Accepted of wanted, errors and valid failures as the filters count them, and the pinned night."""
    old, new = (make_run(tmp_path / name, seed=seed) for name, seed in (("old", 0), ("new", 1)))
    assert call("report", str(new))[0] == 0
    assert read_status(open_store(str(new))).pinned is None
    assert call("compare", str(old), "--pin", str(tmp_path / "pin.json"))[0] == 0
    assert call("compare", str(new), "--baseline", str(tmp_path / "pin.json"))[0] == 0
    found = read_status(open_store(str(new)))
    for request in found.requests:
        rows = engine.open_run(str(new)).filter(f"request == '{request.name}' and scored")
        counted = [len(rows)] + [len(rows.filter(name)) for name in ("target_errs", "valid_failure")]
        outcome = request.outcome
        assert outcome and [outcome.num_scored, outcome.num_errors, outcome.num_valid_failures] == counted
        assert f"  target errs on {counted[1]} of {counted[0]} (" in call("status", str(new))[1]
    fields = json.loads(call("status", str(new), "--json")[1])
    assert fields["pinned"]["baseline"] == str(tmp_path / "pin.json") and fields["requests"][0]["outcome"]
    lines = call("status", str(new))[1].splitlines()
    assert any(line.startswith(f"against the baseline {tmp_path}/pin.json (") for line in lines)
    (new / "comparison.json").write_text("{")
    assert "baseline: " in call("status", str(new))[1]

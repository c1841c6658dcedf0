"""The lease: who holds it, who may take it over, what a refused driver reports; jumping clocks and frozen drivers."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from engine.data.stores import journal as journals
from engine.data.stores import lease as leases
from engine.data.stores.base import LEASES
from engine.data.stores.lease import Holder, hold, is_alive, read_holder
from engine.data.stores.opening import open_store
from engine.errors import EXIT_OWNED, OwnedError
from tests.conftest import REPOSITORY
from tests.sleepy import GATE_SECONDS, wait_until

ELSEWHERE = Holder(
    token="other",
    host="node-7",
    boot="b",
    process=4711,
    process_start="1",
    since=0.0,
    expires=0.0,
    length_seconds=60.0,
)


def plant(store, **changes) -> Holder:
    """The lease of a driver on another machine."""
    holder = dataclasses.replace(ELSEWHERE, **changes)
    store.replace(f"{LEASES}/000003.json", json.dumps(dataclasses.asdict(holder)).encode())
    return holder


def test_a_refused_driver_reports_the_holder_and_when_the_output_is_available(tmp_path):
    """Exit code 4; nothing is waited for while the lease stands."""
    store = open_store(str(tmp_path))
    before, left = time.time(), 55
    plant(store, expires=before + left)
    with pytest.raises(OwnedError, match="process 4711 on node-7, since ") as raised:
        hold(store, wait=pytest.fail).__enter__()
    [seconds] = re.findall(r"the output is available in (\d+) s", str(raised.value))
    assert left - (time.time() - before) - 1 <= int(seconds) <= left
    assert raised.value.exit_code == EXIT_OWNED
    assert read_holder(store).token == "other"


def test_an_expired_lease_is_watched_and_then_taken(tmp_path):
    """For longer than its holder takes to renew it; the next number is ours, and the old file is gone."""
    store, waits, notices = open_store(str(tmp_path)), [], []
    plant(store, expires=time.time() - 1)
    with hold(store, wait=waits.append, notice=notices.append) as lease:
        assert lease.number == 4 and waits == [30.0] and "node-7" in notices[0]
        assert is_alive(read_holder(store)) and store.list(LEASES) == [f"{LEASES}/000004.json"]
    assert read_holder(store).is_released and not is_alive(read_holder(store))
    with hold(store, wait=pytest.fail) as lease:
        assert lease.number == 5


def test_the_end_does_not_wait_for_a_broken_network(tmp_path, monkeypatch):
    """Neither for the lease nor for the journal; where the network comes back, both are written after all."""
    store, recovered = open_store(str(tmp_path)), threading.Event()
    with hold(store, length_seconds=0.2):
        replace = store.replace
        monkeypatch.setattr(store, "replace", lambda *what: recovered.wait(GATE_SECONDS) and replace(*what))
        monkeypatch.setattr(store, "flush", lambda **_: recovered.wait(GATE_SECONDS))
        monkeypatch.setattr(leases, "RELEASE_SECONDS", 0.1)
        monkeypatch.setattr(journals, "END_SECONDS", 0.1)
        journals.Journal(store, 0).keep(is_end=True)
    assert not recovered.is_set() and not read_holder(store).is_released
    recovered.set()
    wait_until(lambda: read_holder(store).is_released, "the lease is released")


def test_no_error_ends_the_renewing(tmp_path, monkeypatch):
    """A running driver that does not renew its lease could count as dead."""
    store, renew, failed = open_store(str(tmp_path)), leases.Lease.renew, []

    def fail_once(lease) -> None:
        if not failed:
            failed.append(True)
            raise RuntimeError("Loop is not running")
        renew(lease)

    monkeypatch.setattr(leases.Lease, "renew", fail_once)
    with hold(store, length_seconds=0.2):
        wait_until(lambda: failed and read_holder(store).num_renewals, "the lease is renewed")


@pytest.mark.parametrize("ahead", [-1e6, 1e6], ids=["clock-forward", "clock-back"])
def test_a_clock_that_jumped_does_not_make_a_living_driver_dead(tmp_path, ahead):
    """By the clock the lease ran out long ago, or ends in days; it is renewed while it is watched."""
    store = open_store(str(tmp_path))
    holder = plant(store, expires=time.time() + ahead)

    def renewed(seconds: float) -> None:
        plant(store, expires=holder.expires + seconds, num_renewals=1)

    with pytest.raises(OwnedError, match="node-7"):
        hold(store, wait=renewed).__enter__()
    with hold(store, wait=lambda seconds: None) as lease:
        assert lease.number == 4


def test_who_lost_the_lease_finds_out(tmp_path):
    """A driver that was frozen, and another took over: it stops, and leaves the other's lease alone."""
    store = open_store(str(tmp_path))
    with hold(store, length_seconds=0.2) as lease:
        plant(store, expires=time.time() + 60)
        with pytest.raises(OwnedError, match=r"was taken over by process 4711 on node-7"):
            wait_until(lambda: lease.check(), "the keeper of the lease has noticed")
    assert read_holder(store).token == "other"


def test_one_of_two_drivers_gets_an_available_output(monkeypatch, tmp_path):
    """Without locks, as on some network file systems: the file of the number is created by one."""
    store = open_store(str(tmp_path))
    monkeypatch.setattr(leases, "_latest", lambda store: None)
    first, second = (leases._take(store, leases._new_holder(60), print, time.sleep) for _ in range(1)), None
    assert next(first).number == 0
    monkeypatch.undo()
    with pytest.raises(OwnedError):
        second = leases._take(store, leases._new_holder(60), print, pytest.fail)
    assert second is None


def test_a_driver_of_this_machine_that_was_killed_is_known_to_be_dead(tmp_path):
    """Its place is taken at once, though its lease stands; while it lives, frozen or not, it is not."""
    program = (
        "import sys, time; from engine.data.stores.opening import open_store\n"
        "from engine.data.stores.lease import hold\n"
        "with hold(open_store(sys.argv[1])) as lease:\n    print(lease.number, flush=True); time.sleep(3600)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "0\n"
    os.kill(process.pid, signal.SIGSTOP)
    store = open_store(str(tmp_path))
    with pytest.raises(OwnedError, match=f"process {process.pid} on "):
        hold(store, wait=pytest.fail).__enter__()
    process.kill()
    assert process.wait() and is_alive(dataclasses.replace(read_holder(store), boot=""))
    with hold(store, wait=pytest.fail) as lease:
        assert lease.number == 1
    assert Path(tmp_path, LEASES).is_dir()

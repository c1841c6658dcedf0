"""A Ray of our own: closed to other users and machines. And the loss of a cluster: one sentence, exit code 75."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from engine.driver.executors import ray_cluster
from engine.driver.executors.local import LocalExecutor
from engine.driver.executors.ray import RayExecutor
from engine.driver.executors.ray_cluster import ClusterMonitor, prepare_environment
from engine.errors import EXIT_DRAINED, EXIT_OK, ClusterLostError
from tests.conftest import REPOSITORY
from tests.sleepy import run_sleepy, wait_until

# Ray tolerates a head that is away for a while; a test need not.
PROGRAM = """
import os, sys
from engine.driver.executors import ray_cluster
from tests import sleepy
ray_cluster.HEAD_LOST_SECONDS = 3.0
code = sleepy.main(sys.argv[1], 1, "ray", sleepy.Faults(hang_once=(1, 2)))
sys.stderr.flush()
os._exit(code)
"""


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A run on a Ray of its own that has committed something, and has two shards in flight for an hour."""
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "run")]
    with subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True) as process:
        commits = tmp_path / "run/_state/commits"
        wait_until(lambda: any(commits.glob("*")) or process.poll() is not None, "something is committed")
        assert process.poll() is None, process.communicate()[1]
        yield process
        process.kill()


def processes(driver: subprocess.Popen[str]) -> list[psutil.Process]:
    """The driver and all that it started."""
    own = psutil.Process(driver.pid)
    return [own, *own.children(recursive=True)]


def named(driver: subprocess.Popen[str], name: str) -> psutil.Process:
    """The process of Ray that has this name."""
    return next(one for one in processes(driver) if one.name() == name)


def folder_of(driver: subprocess.Popen[str]) -> Path:
    """The folder that was made for Ray, from the arguments of its raylet."""
    socket_path = next(one for one in named(driver, "raylet").cmdline() if one.startswith("--raylet_socket_name="))
    return Path(*Path(socket_path.partition("=")[2]).parts[:3])


@pytest.mark.slow
def test_a_ray_of_our_own_is_closed_to_others(driver: subprocess.Popen[str], tmp_path: Path) -> None:
    """Nobody else can enter its folder, in which Ray opens everything to everybody, and nothing listens to the network.

    Then its raylet is killed: the run ends in one sentence, leaves nothing, and the same command continues.
    """
    folder = folder_of(driver)
    about = folder.stat()
    assert stat.S_IMODE(about.st_mode) == 0o700 and about.st_uid == os.getuid()
    sockets = [path for path in folder.rglob("*") if path.is_socket()]
    assert len(sockets) >= 2 and all(len(os.fsencode(path)) <= 107 for path in sockets)
    listening = [
        connection.laddr.ip
        for process in processes(driver)
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN or (connection.type == socket.SOCK_DGRAM and not connection.raddr)
    ]
    assert len(listening) >= 5, "the driver, its head, the raylet and the workers"
    assert {address.removeprefix("::ffff:") for address in listening} <= {"127.0.0.1", "::1"}

    check_lost(driver, "raylet", "its raylet on this machine")
    assert not folder.exists()
    assert run_sleepy(tmp_path / "run", 1, LocalExecutor(2)).exit_code == EXIT_OK


@pytest.mark.slow
def test_a_lost_head_ends_the_run_in_one_sentence(driver: subprocess.Popen[str]) -> None:
    """Workers go on without it, Ray waits a minute, and would then end the process with a text of its own."""
    check_lost(driver, "gcs_server", "its head")


def check_lost(driver: subprocess.Popen[str], name: str, what: str) -> None:
    """Kill a process of Ray: the driver ends with 75 and one line about it."""
    named(driver, name).kill()
    _, text = driver.communicate(timeout=60)
    assert driver.returncode == EXIT_DRAINED, text
    [line] = [line for line in text.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: Ray on this machine was lost ({what} at 127.0.0.1:")
    assert line.endswith("what is committed is kept, and the same command continues")
    assert "Traceback" not in text and "GCS" not in text


def test_what_does_not_accept_connections_for_long_is_lost() -> None:
    """One that comes back in time is not; the head has more time than this machine's part."""
    with socket.create_server(("127.0.0.1", 0)) as head, socket.create_server(("127.0.0.1", 0)) as node:
        addresses = [f"127.0.0.1:{one.getsockname()[1]}" for one in (head, node)]
        watch = ClusterMonitor({addresses[0]: ("its head", 30.0), addresses[1]: ("its raylet", 4.0)})
        now = time.monotonic()
        assert watch.answers() and not watch.find_lost(now)
    assert not watch.answers()
    with socket.create_server(("127.0.0.1", int(addresses[0].rpartition(":")[2]))):
        assert watch.answers(), "whatever this machine's part does"
    assert not watch.find_lost(now + 3.9)
    with socket.create_server(("127.0.0.1", int(addresses[1].rpartition(":")[2]))):
        assert not watch.find_lost(now + 20.0)
    assert not watch.find_lost(now + 23.9)
    assert watch.find_lost(now + 24.1) == f"its raylet at {addresses[1]} does not answer"
    assert ClusterMonitor({addresses[0]: ("its head", -1.0)}).find_lost(now).startswith("its head at")


def test_a_cluster_of_our_own_has_a_token_and_the_loopback_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values of the user are kept; that of another cluster is not made up."""
    names = ("RAY_AUTH_TOKEN", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER")
    monkeypatch.setattr(os, "environ", {name: value for name, value in os.environ.items() if name not in names})
    prepare_environment(is_own=False)
    assert not set(names) & os.environ.keys()
    prepare_environment(is_own=True)
    token = os.environ["RAY_AUTH_TOKEN"]
    assert len(token) == 64 and os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] == "0"
    prepare_environment(is_own=True)
    assert os.environ["RAY_AUTH_TOKEN"] == token


def test_a_cluster_that_was_closed_meanwhile_is_not_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """Importing Ray takes seconds, in which a run may end."""
    monkeypatch.setattr(os, "environ", dict(os.environ))
    cluster = ray_cluster.RayCluster(None, 1)
    monkeypatch.setattr(cluster, "_start", lambda quiet: pytest.fail("nothing should be started"))
    cluster.close()
    assert cluster._connect() is False


def lost_executor() -> RayExecutor:
    """One that has joined a cluster which is gone."""
    executor = RayExecutor(address="127.0.0.1:1", num_workers=1, device="cpu")
    executor._cluster._monitor = ClusterMonitor({"127.0.0.1:1": ("its head", 0.0)})
    return executor


def test_calls_that_would_hang_without_the_head_end_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """While workers are listed, started or waited for: Ray itself would wait for a minute, and end the process."""
    monkeypatch.setattr(ray_cluster, "WATCH_SECONDS", 0.05)
    for call in (lambda one: one.poll(0), lambda one: one.start_worker(0), lambda one: one._cluster.nodes()):
        executor = lost_executor()
        watching = threading.Thread(target=executor._cluster._watch)
        watching.start()
        watching.join()
        with pytest.raises(
            ClusterLostError, match=r"^the Ray cluster at '127.0.0.1:1' was lost \(its head at"
        ) as caught:
            call(executor)
        assert caught.value.exit_code == EXIT_DRAINED


def test_a_driver_that_does_not_come_back_from_ray_is_ended() -> None:
    """The call that hangs is in Ray, where no exception reaches it."""
    program = (
        "import time; from engine.driver.executors import ray_cluster\n"
        "from tests.test_ray_cluster import lost_executor\n"
        "ray_cluster.WATCH_SECONDS = ray_cluster.LEAVE_SECONDS = 0.1\n"
        "executor = lost_executor(); executor._cluster._connect = lambda: True\n"
        "executor.begin(); time.sleep(60)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert done.returncode == EXIT_DRAINED
    [line] = done.stderr.splitlines()
    assert line.startswith("error: the Ray cluster at '127.0.0.1:1' was lost (its head at 127.0.0.1:1 does not answer)")

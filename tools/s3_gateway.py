"""Ceph's RADOS Gateway on this machine, a real S3 to test with: `python -m tools.s3_gateway start FOLDER`.

A monitor, an OSD that keeps everything in memory, and the gateway, on free ports of 127.0.0.1, with their files in
FOLDER, which is new. After about 15 seconds it answers; `start` prints the settings that a client needs, as `env` does,
and `stop` ends the processes and removes the folder:

    apt-get install --no-install-recommends ceph-mon ceph-osd ceph-common radosgw     # Debian 12: 16.2.15
    python -m tools.s3_gateway start /tmp/gateway
    eval "$(python -m tools.s3_gateway env /tmp/gateway)"
    python -m tools.s3_gateway stop /tmp/gateway
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable
from pathlib import Path

PROGRAMS = ("ceph-mon", "ceph-osd", "ceph", "ceph-authtool", "monmaptool", "radosgw", "radosgw-admin")
PACKAGES = "ceph-mon ceph-osd ceph-common radosgw"
START_SECONDS = 180.0
STOP_SECONDS = 10.0
MEMORY_BYTES = 4 * 2**30

SETTINGS = """\
[global]
fsid = {cluster}
mon host = [v1:127.0.0.1:{monitor}]
public addr = 127.0.0.1
cluster addr = 127.0.0.1
ms bind msgr2 = false
auth cluster required = none
auth service required = none
auth client required = none
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8
osd pool default pgp num = 8
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
osd objectstore = memstore
memstore device bytes = {memory}
mon allow pool size one = true
mon max pg per osd = 2000
keyring = {folder}/keyring
log file = {folder}/log/$name.log
pid file = {folder}/run/$name.pid
admin socket = {folder}/run/$name.asok
run dir = {folder}/run
crash dir = {folder}/run
[mon]
mon data = {folder}/mon
[mon.a]
host = localhost
[osd]
osd data = {folder}/osd
osd memory target = 1073741824
[client.gateway]
rgw frontends = beast endpoint=127.0.0.1:{gateway}
rgw thread pool size = 32
"""


def missing_programs() -> list[str]:
    """Programs of Ceph that are not installed."""
    return [name for name in PROGRAMS if shutil.which(name) is None]


class Gateway:
    """A gateway with its files in a folder.

    Args:
        folder: as short as the path of a socket has to be.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()

    def start(self) -> None:
        """Make the cluster and wait until the gateway answers and has a user.

        Raises:
            RuntimeError: a program is missing, the folder exists, or something does not start.
        """
        if missing := missing_programs():
            raise RuntimeError(f"{', '.join(missing)}: not installed; apt-get install {PACKAGES}")
        if self.folder.exists():
            raise RuntimeError(f"{self.folder}: is there; stop it first, or choose another folder")
        for name in ("mon", "osd", "log", "run"):
            (self.folder / name).mkdir(parents=True)
        self.folder.chmod(0o700)
        try:
            self._start()
        except BaseException:
            self._end()
            raise

    def _start(self) -> None:
        ports = dict(zip(("monitor", "gateway"), free_ports(2), strict=True))
        cluster = str(uuid.uuid4())
        settings = SETTINGS.format(folder=self.folder, cluster=cluster, memory=MEMORY_BYTES, **ports)
        (self.folder / "ceph.conf").write_text(settings)
        keys = {"endpoint": f"http://127.0.0.1:{ports['gateway']}", "key": secrets.token_hex(10)}
        (self.folder / "client.json").write_text(json.dumps(keys | {"secret": secrets.token_hex(20)}))
        self._start_monitor(cluster, ports["monitor"])
        self._start_storage()
        self._spawn("radosgw", "radosgw", "-n", "client.gateway", "-f")
        self._wait("the gateway answers", lambda: is_answering(keys["endpoint"]))
        client = self._client()
        user = ["user", "create", "--uid=test", "--display-name=test"]
        self._run("radosgw-admin", *user, f"--access-key={client['key']}", f"--secret-key={client['secret']}")

    def stop(self) -> None:
        """End its processes, the gateway first, and remove the folder.

        Raises:
            RuntimeError: the folder is not that of a gateway.
        """
        if not (self.folder / "ceph.conf").is_file():
            raise RuntimeError(f"{self.folder}: no gateway was started there")
        self._end()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _end(self) -> None:
        pids = [pid for name in ("radosgw", "osd", "mon") if (pid := self._pid(name))]
        for pid in pids:
            os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + STOP_SECONDS
        while any(map(is_running, pids)) and time.monotonic() < deadline:
            time.sleep(0.1)
        for pid in filter(is_running, pids):
            os.kill(pid, signal.SIGKILL)

    def environment(self) -> dict[str, str]:
        """The settings of a client."""
        client = self._client()
        return {
            "AWS_ENDPOINT_URL": client["endpoint"],
            "AWS_ACCESS_KEY_ID": client["key"],
            "AWS_SECRET_ACCESS_KEY": client["secret"],
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def _client(self) -> dict[str, str]:
        return dict(json.loads((self.folder / "client.json").read_text()))

    def _start_monitor(self, cluster: str, port: int) -> None:
        keyring, monmap = str(self.folder / "keyring"), str(self.folder / "monmap")
        allow = [part for kind in ("mon", "osd", "mgr") for part in ("--cap", kind, "allow *")]
        self._run("ceph-authtool", "--create-keyring", keyring, "--gen-key", "-n", "mon.", "--cap", "mon", "allow *")
        self._run("ceph-authtool", keyring, "--gen-key", "-n", "client.admin", *allow)
        self._run("monmaptool", "--create", "--fsid", cluster, "--addv", "a", f"[v1:127.0.0.1:{port}]", monmap)
        self._run("ceph-mon", "--mkfs", "-i", "a", "--monmap", monmap, "--keyring", keyring)
        shutil.copyfile(keyring, self.folder / "mon/keyring")
        self._spawn("mon", "ceph-mon", "-i", "a", "-f")
        self._wait("the monitor answers", lambda: self._asks("-s") is not None)

    def _start_storage(self) -> None:
        name = str(uuid.uuid4())
        # A store in memory would make up a name of its own.
        (self.folder / "osd/fs_fsid").write_text(f"{name}\n")
        number = (self._asks("osd", "new", name) or "0").strip()
        self._run("ceph-osd", "-i", number, "--mkfs", "--osd-uuid", name)
        self._spawn("osd", "ceph-osd", "-i", number, "-f")
        self._wait("the OSD is up", lambda: "1 up" in (self._asks("osd", "stat") or ""))

    def _asks(self, *question: str) -> str | None:
        """The answer of the cluster; None where there is none yet."""
        command = ["ceph", "-c", str(self.folder / "ceph.conf"), *question]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
        except subprocess.TimeoutExpired:
            return None
        return done.stdout if done.returncode == 0 else None

    def _run(self, program: str, *arguments: str) -> None:
        command = [program, "-c", str(self.folder / "ceph.conf"), *arguments]
        if program in ("ceph-authtool", "monmaptool"):
            command = [program, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=START_SECONDS, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: ended with {done.returncode}: {done.stderr.strip()[-500:]}")

    def _spawn(self, name: str, program: str, *arguments: str) -> None:
        """Start a process that outlives this one."""
        with (self.folder / f"log/{name}.out").open("w") as log:
            process = subprocess.Popen(
                [program, "-c", str(self.folder / "ceph.conf"), *arguments],
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        (self.folder / f"{name}.pid").write_text(str(process.pid))

    def _pid(self, name: str) -> int | None:
        """A process of this gateway; None where it has ended, and its number is perhaps that of another process."""
        try:
            pid = int((self.folder / f"{name}.pid").read_text())
            return pid if str(self.folder) in Path(f"/proc/{pid}/cmdline").read_text() else None
        except (OSError, ValueError):
            return None

    def _wait(self, what: str, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not condition():
            if time.monotonic() > deadline:
                raise RuntimeError(f"waited {START_SECONDS:g} s in vain: {what}; see {self.folder}/log")
            time.sleep(0.5)


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nobody listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [one.getsockname()[1] for one in sockets]


def is_answering(endpoint: str) -> bool:
    """Whether something answers HTTP there."""
    try:
        urllib.request.urlopen(endpoint, timeout=5).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


def is_running(pid: int) -> bool:
    """Whether a process has not ended; one that its parent has not waited for has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def main(arguments: list[str]) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("start", "stop", "env"))
    parser.add_argument("folder", type=Path)
    options = parser.parse_args(arguments)
    gateway = Gateway(options.folder)
    try:
        if options.command == "start":
            gateway.start()
        if options.command == "stop":
            gateway.stop()
        else:
            print("export " + " ".join(f"{name}={value}" for name, value in gateway.environment().items()))
    except (RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

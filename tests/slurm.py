"""A Slurm of several nodes on this machine, from Debian's packages (slurmctld, slurmd, slurm-client, munge), as root.

It has configuration, keys, sockets and state in a folder of its own, and disturbs no Slurm that is there.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
from pathlib import Path
from typing import IO, Any, Self

from tests.sleepy import wait_until

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol", "scancel", "sinfo", "squeue")
CONFIGURATION = """
ClusterName=riskforge
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
AuthInfo=socket={folder}/munge.socket
SlurmUser=root
FirstJobId={first_job}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
KillWait=10
MessageTimeout=60
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def is_installed() -> bool:
    """Whether such a Slurm can be started here."""
    return os.geteuid() == 0 and all(map(shutil.which, PROGRAMS))


def free_port() -> int:
    """A port that nothing listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class Slurm:
    """The daemons, while the context is entered.

    Args:
        folder: empty; its path is short, as sockets are below it.
        num_nodes: of two cores each, all of them this machine.
    """

    def __init__(self, folder: Path, num_nodes: int) -> None:
        self._folder = folder
        self._names = [f"n{number}" for number in range(num_nodes)]
        self._daemons: list[subprocess.Popen[bytes]] = []
        self._log: IO[bytes] | None = None
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}

    def __enter__(self) -> Self:
        folder = self._folder
        (folder / "state").mkdir()
        (folder / "munge.key").write_bytes(secrets.token_bytes(128))
        (folder / "munge.key").chmod(0o600)
        host = socket.gethostname()
        nodes = "\n".join(
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={free_port()} CPUs=2 State=UNKNOWN"
            for name in self._names
        )
        places = {"host": host, "folder": folder, "nodes": nodes, "controller_port": free_port()}
        # Ports and folders of a job go by its number.
        text = CONFIGURATION.format(**places, first_job=1000 + secrets.randbelow(100_000))
        (folder / "slurm.conf").write_text(text)
        self._log = (folder / "daemons.log").open("ab")
        files = [f"--{name}={folder}/munge.{end}" for name, end in (("socket", "socket"), ("key-file", "key"))]
        files += [f"--{name}={folder}/munge.{name}" for name in ("pid-file", "log-file", "seed-file")]
        self._start("munged", "--foreground", "--force", *files)
        wait_until((folder / "munge.socket").exists, "munge is up")
        self._start("slurmctld", "-D")
        for name in self._names:
            self._start("slurmd", "-D", "-N", name)
        wait_until(lambda: self.call("sinfo", "-h", "-o", "%T").split() == ["idle"], "the nodes are up")
        return self

    def __exit__(self, *_: Any) -> None:
        # Jobs would outlive the daemons.
        self.call("scancel", "--user=root")
        wait_until(lambda: self.call("squeue", "-h") == "", "the jobs are ended")
        for process in reversed(self._daemons):
            process.terminate()
        for process in self._daemons:
            process.wait(timeout=30)
        assert self._log is not None
        self._log.close()

    def _start(self, *command: str) -> None:
        self._daemons.append(
            subprocess.Popen(command, env=self.environment, stdout=self._log, stderr=subprocess.STDOUT)
        )

    def call(self, *command: str, **environment: str) -> str:
        """What one of Slurm's commands prints; empty if it fails."""
        result = subprocess.run(command, env=self.environment | environment, capture_output=True, text=True)
        return result.stdout.strip() if result.returncode == 0 else ""

    def submit(self, *arguments: str, **environment: str) -> str:
        """Call sbatch; the number of the job."""
        command = ["sbatch", "--parsable", *arguments]
        result = subprocess.run(command, env=self.environment | environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return result.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """What Slurm knows of a job."""
        words = self.call("scontrol", "show", "job", number, "-o").split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, number: str, *states: str, seconds: float = 180.0) -> dict[str, str]:
        """Wait until a job has one of these states; what Slurm knows of it then."""
        wait_until(lambda: self.job(number).get("JobState") in states, f"job {number} is {states}", seconds)
        return self.job(number)

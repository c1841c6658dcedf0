"""`deploy/slurm.sh` on a real Slurm of two nodes, where its packages are installed.

    apt-get install --no-install-recommends slurmctld slurmd slurm-client munge
    uv run pytest -n 0 -m slow tests/test_slurm.py

It starts Ray four times, for a minute of CPU time; `.ci/run` skips it. `docs/clusters.md` has when it was last run.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from tests import slurm
from tests.conftest import REPOSITORY
from tests.sleepy import wait_until
from tests.slurm import Slurm

SCRIPT = str(REPOSITORY / "deploy/slurm.sh")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not slurm.is_installed(), reason="Slurm is not installed, or this is not root"),
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Slurm]:
    """Two nodes, and a short path."""
    with tempfile.TemporaryDirectory(prefix="sl-") as folder, Slurm(Path(folder), 2) as started:
        yield started


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """A run of many short shards."""
    raw = {
        "name": "slurm",
        "models": {name: f"zoo:digits/{part}" for name, part in MODELS.items()},
        "requests": [{"name": "plain", "method": "prompt", "classes": "all", "count": 8}],
        "sampling": {"num_inference_steps": 20, "guidance_scale": 3.0},
        "output": {"uri": "unused", "samples_per_shard": 8},
        "runtime": {"device": "cpu"},
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(raw))
    return tmp_path / "job.yaml"


MODELS = {"diffusion": "stable-diffusion", "clip": "clip", "target": "classifier"}


def submit(cluster: Slurm, job: Path, *options: str) -> str:
    """Submit the script with these options of sbatch."""
    return cluster.submit(
        *options, "--output", str(job.with_name("log")), "--chdir", str(job.parent), SCRIPT, str(job),
        "--output", str(job.with_name("run")), "--workers", "2",
        PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}", RISKFORGE_HEAD_IP="127.0.0.1",
    )  # fmt: skip


def commits(job: Path) -> set[Path]:
    """The commit records of its run."""
    return set(job.parent.glob("run/_state/commits/*"))


def folders(number: str) -> list[Path]:
    """What a job has left of Ray's folders."""
    return list(Path("/tmp").glob(f"rf-{number}-*"))


def test_a_run_on_two_nodes_drains_is_requeued_and_completes(cluster: Slurm, job: Path) -> None:
    """The signal is the one that `--signal` asks for before the time limit, to the script alone. Both nodes work."""
    number = submit(cluster, job, "--nodes=2", "--cpus-per-task=1")
    wait_until(lambda: len(commits(job)) >= 2, "something is committed", seconds=240)
    cluster.call("scancel", "--batch", "--signal=TERM", number)
    wait_until(lambda: cluster.job(number)["Restarts"] == "1", "it is requeued")
    before = {path.name: path.stat().st_mtime_ns for path in commits(job)}
    assert 2 <= len(before) < 10 and not folders(number)
    # Slurm waits two minutes before a job starts again.
    cluster.call("scontrol", "update", f"JobId={number}", "StartTime=now")
    about = cluster.wait(number, "COMPLETED", "FAILED", seconds=240)
    assert (about["JobState"], about["ExitCode"]) == ("COMPLETED", "0:0"), job.with_name("log").read_text()
    assert (job.parent / "run/_SUCCESS").is_file() and not folders(number)
    assert before.items() <= {path.name: path.stat().st_mtime_ns for path in commits(job)}.items()
    workers = pq.read_table(job.parent / "run/metadata.parquet", columns=["worker"])["worker"]
    assert len(set(workers.to_pylist())) >= 2


def test_a_run_on_one_node_passes_its_exit_code_on(cluster: Slurm, job: Path) -> None:
    """And is not requeued, as the same job would fail again."""
    job.write_text(job.read_text().replace("zoo:digits/clip", "zoo:digits/nothing"))
    number = submit(cluster, job, "--nodes=1", "--cpus-per-task=1")
    about = cluster.wait(number, "COMPLETED", "FAILED")
    assert (about["JobState"], about["ExitCode"], about["Restarts"]) == ("FAILED", "2:0", "0")
    assert "models.clip" in job.with_name("log").read_text() and not folders(number)


def test_a_cancelled_run_is_not_requeued(cluster: Slurm, job: Path) -> None:
    """Although it ends with 75. What was committed stays; Slurm kills what has not ended after its `KillWait`."""
    number = submit(cluster, job, "--nodes=1", "--cpus-per-task=2")
    wait_until(lambda: commits(job), "something is committed", seconds=240)
    cluster.call("scancel", number)
    about = cluster.wait(number, "CANCELLED")
    for folder in folders(number):
        shutil.rmtree(folder)
    assert about["Restarts"] == "0" and cluster.job(number)["JobState"] == "CANCELLED"

"""Jobs that are submitted to a cluster whose machines Ray's autoscaler starts: nodes here, by a provider of Ray's own.

    RISKFORGE_LAUNCHES=1 uv run pytest -n 0 -m slow tests/test_submit.py

Takes Ray's head with dashboard and job server, two further nodes and four drivers: a minute of CPU time, which is why
`.ci/run` leaves it out. `docs/clusters.md` has when it was last run.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.conftest import REPOSITORY
from tests.sleepy import wait_until
from tests.slurm import free_port

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("RISKFORGE_LAUNCHES" not in os.environ, reason="RISKFORGE_LAUNCHES is not set"),
]
PROGRAMS = Path(sys.executable).parent
HEAD_NODE = "f" * 51 + "00000"
JOB = {
    "name": "submitted",
    "models": {
        "diffusion": "zoo:digits/stable-diffusion", "clip": "zoo:digits/clip", "target": "zoo:digits/classifier",
    },
    "requests": [{"name": "plain", "method": "prompt", "classes": ["one", "two"], "count": 4}],
    "sampling": {"num_inference_steps": 4},
    "output": {"uri": "runs/submitted", "samples_per_shard": 2},
    "runtime": {"device": "cpu"},
}  # fmt: skip


def provider_config(port: int) -> dict[str, Any]:
    """`cluster.yaml`, with Ray's provider for one machine, whose nodes have one core: two workers need two of them."""
    raw = yaml.safe_load((REPOSITORY / "deploy/cluster.yaml").read_text())
    worker = raw["available_node_types"]["gpu-spot"]
    head: dict[str, Any] = {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}
    worker |= {"node_config": {}, "resources": {"CPU": 1, "object_store_memory": 100_000_000}}
    lists = ["initialization_commands", "cluster_synced_files"]
    lists += [f"{which}setup_commands" for which in ("", "head_", "worker_")]
    lists += [f"{which}_start_ray_commands" for which in ("head", "worker")]
    return (
        {key: raw[key] for key in ("cluster_name", "max_workers", "upscaling_speed", "idle_timeout_minutes")}
        | {"provider": {"type": "fake_multinode", "gcs_address": f"127.0.0.1:{port}", "head_node_id": HEAD_NODE}}
        | {"available_node_types": {"ray.head.default": head, "gpu-spot": worker}, "head_node_type": "ray.head.default"}
        | {"auth": {}, "docker": {}, "file_mounts": {}}
        | {name: [] for name in lists}
    )


@pytest.fixture(scope="module")
def environment() -> Iterator[dict[str, str]]:
    """Of a client of a cluster without workers; all of it listens on the loopback address and asks for a token."""
    port, dashboard = free_port(), free_port()
    values = os.environ | {
        "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}", "RAY_worker_register_timeout_seconds": "600",
        "RAY_worker_niceness": "0", "PATH": f"{PROGRAMS}:{os.environ['PATH']}",
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="rs-", ignore_cleanup_errors=True) as folder:
        (Path(folder) / "cluster.yaml").write_text(yaml.safe_dump(provider_config(port)))
        command = [
            str(PROGRAMS / "ray"), "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={port}",
            f"--dashboard-port={dashboard}", f"--temp-dir={folder}/r", f"--autoscaling-config={folder}/cluster.yaml",
            f"--ray-client-server-port={free_port()}", f"--dashboard-agent-listen-port={free_port()}", "--num-cpus=0",
            "--min-worker-port=0", "--max-worker-port=0", "--object-store-memory=100000000", "--disable-usage-stats",
        ]  # fmt: skip
        with (Path(folder) / "log").open("wb") as log:
            head = subprocess.Popen(command, env=values, stdout=log, stderr=subprocess.STDOUT)
        try:
            started = Path(folder) / "r/ray_current_cluster"
            wait_until(lambda: started.exists() or head.poll() is not None, "the head is up")
            assert head.poll() is None, (Path(folder) / "log").read_text()
            yield values
        finally:
            end_all(head)


def end_all(head: subprocess.Popen[bytes]) -> None:
    """End the head and all that it started; the nodes of the provider are children of its monitor."""
    processes = psutil.Process(head.pid).children(recursive=True)
    head.kill()
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(processes, timeout=30)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder that is submitted."""
    (tmp_path / "work").mkdir()
    (tmp_path / "work/job.yaml").write_text(yaml.safe_dump(JOB))
    return tmp_path / "work"


def submit(environment: dict[str, str], folder: Path, program: list[str], *arguments: str) -> tuple[int, str]:
    """Submit `riskforge run` in this folder; exit code and output."""
    command = [*program, "--working-dir", str(folder), "--", "riskforge", "run", *arguments, "--address", "auto"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    return result.returncode, result.stdout + result.stderr


RAY = [str(PROGRAMS / "ray"), "job", "submit"]
OURS = [sys.executable, str(REPOSITORY / "deploy/submit.py")]


def test_machines_are_started_for_a_submitted_run(environment: dict[str, str], folder: Path, tmp_path: Path) -> None:
    """Two workers on two nodes that were not there; the output is where it was asked for, and complete."""
    code, text = submit(environment, folder, RAY, "job.yaml", "--workers", "2", "--output", str(tmp_path / "run"))
    assert code == 0, text
    assert (tmp_path / "run/_SUCCESS").is_file()
    assert json.loads((tmp_path / "run/manifest.json").read_text())["counts"]["samples"]["ok"] == 8
    shutil.rmtree(tmp_path / "run")


@pytest.mark.parametrize(("program", "code"), [(RAY, 1), (OURS, 2)], ids=["ray", "submit.py"])
def test_the_exit_code_of_a_submitted_run(
    environment: dict[str, str], folder: Path, program: list[str], code: int
) -> None:
    """A relative output would be lost with the submitted folder: 2, which Ray's client turns into 1, and names."""
    actual, text = submit(environment, folder, program, "job.yaml")
    assert actual == code, text
    assert "is in the working folder of a submitted job" in text and "exit code 2" in text

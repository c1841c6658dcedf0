"""The short form of `tools/chaos.py`: real processes, killed and refused; what is made is what a calm run makes.

And two machines with a Ray each: what the tests of executors cannot see, whose nodes share an address and a folder.
"""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.data.run.shards import read_rows
from engine.data.run.verify import verify
from engine.data.stores.opening import open_store
from engine.errors import EXIT_OK
from tests import chaos_nodes, ray_nodes
from tests.sleepy import tars
from tools import chaos

JOB = """\
name: digits
models: {diffusion: "zoo:digits/stable-diffusion", clip: "zoo:digits/clip", target: "zoo:digits/classifier"}
requests:
  - {name: between, method: boundary, boundary: [three, eight], count: 8}
sampling: {num_inference_steps: 2}
output: {uri: unused, samples_per_shard: 2}
runtime: {device: cpu}
"""


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """A run without accidents."""
    output = tmp_path_factory.mktemp("chaos") / "clean"
    assert chaos.finish(output) == EXIT_OK
    return output


@pytest.mark.parametrize("scenario", [chaos.torn_files, chaos.two_drivers, chaos.jumping_clock])
def test_a_scenario(scenario, clean, tmp_path):
    """Each ends with a whole run that is equal to the clean one."""
    scenario(tmp_path, clean)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk is for root")
@pytest.mark.parametrize("scenario", [chaos.full_disk, chaos.read_only])
def test_a_disk(scenario, clean, tmp_path):
    """A disk that is full, or sealed."""
    try:
        with chaos.small_disk(tmp_path / "probe"):
            pass
    except (OSError, chaos.subprocess.CalledProcessError):
        pytest.skip("mounting is not allowed here")
    scenario(tmp_path, clean)


@pytest.mark.slow
def test_kills_at_random(clean, tmp_path):
    """SIGKILL of drivers, sixty times in `tools/chaos.py`; actors and nodes are killed in `test_executors`."""
    assert chaos.kill_at_random(tmp_path, clean, 3, random.Random(1), "local").total() >= 3


@pytest.fixture(scope="module")
def two_machines(clean: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[chaos_nodes.Site]:
    """The head of a cluster and another machine, with patience for what other tests take of the processor."""
    if why := ray_nodes.missing():
        pytest.skip(why)
    with chaos_nodes.opened_site(tmp_path_factory.mktemp("nodes"), clean, num_nodes=2) as site:
        site.machines.environment["RAY_health_check_failure_threshold"] = "15"
        yield site


@pytest.mark.slow
def test_a_machine_is_lost_while_another_joins(two_machines: chaos_nodes.Site) -> None:
    """As a spot machine is, in the middle of a shard: no strike, the new one is used, and the bytes are the same."""
    chaos_nodes.run_scenario(two_machines, chaos_nodes.spot_losses)


@pytest.mark.slow
def test_two_machines_make_the_bytes_of_one(two_machines: chaos_nodes.Site) -> None:
    """Real models, each machine with a worker of its own; against threads of one process."""
    two_machines.ready()
    folder, machines = two_machines.folder, two_machines.machines
    (folder / "job.yaml").write_text(JOB)
    command = ["-m", "engine.cli", "run", str(folder / "job.yaml"), "--workers", "2", "--output"]
    with (folder / "digits.log").open("w") as log:
        far = [*command, str(folder / "far"), "--address", machines.address]
        driver = machines.drive(machines.head, far, stdout=log, stderr=log)
        near = machines.switch.start(
            [sys.executable, *command, str(folder / "near"), "--executor", "local"], stdout=log, stderr=log
        )
        assert [near.wait(300), driver.wait(300)] == [EXIT_OK, EXIT_OK], (folder / "digits.log").read_text()
    assert len(tars(folder / "far")) == 4 and tars(folder / "far") == tars(folder / "near")
    assert not verify(open_store(str(folder / "far"))).findings
    assert json.loads((folder / "far/manifest.json").read_text())["hardware"]["nodes"] == 2
    rows = [row for path in (folder / "far/shards").glob("*.parquet") for row in read_rows(path)]
    # A worker's name is that of its machine and process.
    assert {row["worker"].rpartition("-")[0] for row in rows} == {f"machine-{one.number}" for one in machines.nodes}

"""The short form of `tools/chaos.py`: real processes, killed and refused; what is made is what a calm run makes."""

from __future__ import annotations

import os
import random

import pytest

from engine.errors import EXIT_OK
from tools import chaos


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

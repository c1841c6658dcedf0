"""Shared by all tests: quiet libraries, one numerical thread, the zoo loaded once."""

from __future__ import annotations

import os
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from xdist.scheduler import LoadFileScheduling

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# The models are tiny, and several processes work at a time. Read when torch is loaded.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Nothing is kept between sessions of tests.
os.environ["RISKFORGE_CACHE"] = ""
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
# Ray would kill actors where others have filled the machine's memory.
os.environ.setdefault("RAY_memory_monitor_refresh_ms", "0")

# Nothing here outlives its machine, and what a killed process wrote is there without it: a run asks for it forty times,
# and disks take up to 100 ms each time. A descriptor that is none fails as before.
os.fsync = os.fstat  # type: ignore[assignment]

REPOSITORY = Path(__file__).parent.parent

# Fixtures of an S3 and of a Hugging Face Hub in the process.
pytest_plugins = ["tests.s3_cases", "tests.hub_server"]

# What a property says does not depend on how busy the machine is, nor on the luck of a draw: the same examples every
# time, however long they take. `--hypothesis-profile default` draws others.
settings.register_profile(
    "suite", deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("suite")


# Files that take longest of those without slow tests.
LONG = ("row_shapes", "synchronisation", "starts", "twins", "tars", "curated_runs", "recipes", "validity", "unclip",
        "generator_training", "loop", "zoo", "quotas", "verify", "real_shapes", "factory_cache")  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests go first, then other long ones: left for the end, they would keep a single process busy."""
    num_slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    long = {Path(__file__).with_name(f"test_{name}.py") for name in LONG}
    items.sort(key=lambda item: -(num_slow[item.path] or 0.5 * (item.path in long)))


# Each of these starts Ray many times. Two Rays that start at once on two cores are late for each other's limits.
RAY_FILES = frozenset({"executors", "distributed_pass", "ray_cluster", "heartbeat", "run"})


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadFileScheduling:
    """A file of tests in one process, and those that start Ray one after another in the same one."""
    return OneRayScheduling(config, log)


class OneRayScheduling(LoadFileScheduling):
    """`--dist loadfile` but for `RAY_FILES`."""

    def _split_scope(self, nodeid: str) -> str:
        path = super()._split_scope(nodeid)
        return "ray" if Path(path).stem.removeprefix("test_") in RAY_FILES else path


@pytest.fixture(scope="session")
def hardware():
    """A CPU with default settings."""
    from engine.job.spec import RuntimeSpec
    from engine.models.hardware import choose_hardware

    return choose_hardware(RuntimeSpec(device="cpu"))


@pytest.fixture(scope="session")
def diffusion(hardware):
    """The digits Stable Diffusion pipeline, as the engine loads it."""
    from engine.models.diffusion import load_pipeline
    from engine.models.library_logging import quiet_libraries

    quiet_libraries()
    return load_pipeline("zoo:digits/stable-diffusion", hardware)


@pytest.fixture(scope="session")
def classifier():
    """The digits target classifier."""
    from engine.models.classifier import Classifier

    return Classifier.load("zoo:digits/classifier")


@pytest.fixture
def copy_of(tmp_path):
    """A folder of which everything may be changed: configurations are copied, weights are links."""

    def link(source: str, target: str) -> str:
        if source.endswith(".safetensors"):
            Path(target).symlink_to(source)
        else:
            shutil.copy(source, target)
        return target

    return lambda folder, name="copy": Path(shutil.copytree(folder, tmp_path / name, copy_function=link))


@pytest.fixture(scope="module")
def cluster():
    """A Ray of one node with two cores; starting it takes seconds."""
    from engine.driver.executors.ray_cluster import prepare_environment

    prepare_environment(is_own=True)
    from ray.cluster_utils import Cluster

    # Without two of its services, of an autoscaler and of logs, that nothing here asks for.
    few = {"num_cpus": 2, "include_dashboard": False, "no_monitor": True, "include_log_monitor": False}
    started = Cluster(initialize_head=True, head_node_args=few)
    yield started
    started.shutdown()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Headless Chromium with a profile of its own."""
    from tests.browser import Browser

    with Browser(tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.fixture
def call(monkeypatch, capsys):
    """Runs the command line in this process; gives exit code, stdout and stderr."""

    from engine import cli

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["riskforge", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return (end.value.code or 0, *capsys.readouterr())

    return run

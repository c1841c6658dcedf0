"""Shared by all tests: quiet libraries, one numerical thread, the zoo loaded once."""

from __future__ import annotations

import os
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# The models are tiny, and several processes work at a time. Read when torch is loaded.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Nothing is kept between sessions of tests.
os.environ["RISKFORGE_CACHE"] = ""
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
# Ray would kill actors where others have filled the machine's memory.
os.environ.setdefault("RAY_memory_monitor_refresh_ms", "0")

REPOSITORY = Path(__file__).parent.parent

# Fixtures of an S3 in the process.
pytest_plugins = ["tests.s3_cases"]

# What a property says does not depend on how busy the machine is, nor on the luck of a draw: the same examples every
# time, however long they take. `--hypothesis-profile default` draws others.
settings.register_profile(
    "suite", deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("suite")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests go first: left for the end, one of them would keep a single process busy."""
    num_slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -num_slow[item.path])


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

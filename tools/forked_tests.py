"""Runs tests of a copy of the repository again and again without importing the libraries anew.

A server is a process in the copy that has imported torch, transformers and other libraries, but nothing of the copy.
For each request it forks: the child imports `engine` and `tests` as they are at that moment and runs pytest. Code of
an earlier state of the copy can therefore not be left in memory, and compiled files are compared by content.
`TestServer` starts this file as a program, which reads requests as lines of JSON and answers each with a line.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

# Of the tests of one mutation.
TIMEOUT_SECONDS = 80.0
# pytest's exit codes where all tests passed, and where none was selected; and that of tests that were stopped.
PASSED, NONE_SELECTED, TIMED_OUT = 0, 5, 124
# What tests and the engine import that is neither of them. Anything else is imported by the child.
LIBRARIES = (
    "pytest", "hypothesis.strategies", "numpy", "scipy.stats", "scipy.special", "PIL.Image", "yaml",
    "pydantic.main", "pandas", "fsspec", "rich.console", "typer", "pytest_timeout", "_hypothesis_pytestplugin",
    "pyarrow.parquet", "pyarrow.compute", "torch", "torch.utils.data", "torchvision.transforms.v2", "safetensors.torch",
    "huggingface_hub", "transformers.models.clip.modeling_clip", "transformers.models.clip.image_processing_clip",
    "transformers.models.clip.tokenization_clip", "transformers.models.auto.modeling_auto",
    "transformers.models.resnet.modeling_resnet", "timm", "webdataset",
    "diffusers.models.autoencoders.autoencoder_kl", "diffusers.models.unets.unet_2d_condition",
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
    "diffusers.pipelines.unclip.text_proj", "diffusers.schedulers.scheduling_ddim",
)  # fmt: skip
# As in tests/conftest.py, but read when a library is imported.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_memory_monitor_refresh_ms": "0", "PYTHONDONTWRITEBYTECODE": "1",
    # Looking for plugins takes longer than most tests; those that the tests need are named.
    "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
}  # fmt: skip
# In place of those of pyproject.toml, which distribute tests among processes.
OPTIONS = ("-o", "addopts=--strict-markers", "-p", "pytest_timeout", "-p", "_hypothesis_pytestplugin",
           "-p", "no:cacheprovider", "-q")  # fmt: skip
PR_SET_CHILD_SUBREAPER = 36


class TestsEnd(NamedTuple):
    """How tests ended.

    Attributes:
        code: exit code of pytest, or `TIMED_OUT`.
        failed: ids of the tests that failed, or of the files that could not be imported.
    """

    code: int
    failed: list[str]


class TestServer:
    """A process that runs tests in a copy of the repository, each time in a fork of its own.

    Args:
        root: the copy.
        libraries: what it imports before any test.
    """

    # Not a class of tests.
    __test__ = False

    def __init__(self, root: Path, libraries: Sequence[str] = LIBRARIES) -> None:
        compile_by_content(root)
        self._process = subprocess.Popen(
            [sys.executable, __file__, *libraries], cwd=root, env=os.environ | ENVIRONMENT | {"PYTHONPATH": str(root)},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def run(self, arguments: Sequence[str], seconds: float = TIMEOUT_SECONDS) -> TestsEnd:
        """Run pytest.

        Args:
            arguments: of pytest.
            seconds: time limit.

        Raises:
            RuntimeError: the server has ended.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps({"arguments": list(arguments), "seconds": seconds}) + "\n")
        self._process.stdin.flush()
        if not (answer := self._process.stdout.readline()):
            raise RuntimeError(f"the process that runs the tests ended with {self._process.wait()}")
        return TestsEnd(*json.loads(answer))

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def compile_by_content(root: Path) -> None:
    """Compile the code of a copy so that a changed file is never taken for its compiled form.

    Python compares compiled files by time in whole seconds otherwise: a mutation could run as the code before it.
    """
    subprocess.run(
        [sys.executable, "-m", "compileall", "-q", "--invalidation-mode", "checked-hash", "engine", "tests", "tools"],
        cwd=root, check=False, capture_output=True,
    )  # fmt: skip


def serve(libraries: Sequence[str]) -> None:
    """Answer requests until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for name in libraries:
        # A library that this machine lacks is merely not preloaded.
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    assert not {"engine", "tests"} & sys.modules.keys()
    # A collection in a child would otherwise write into, and so copy, all of this memory.
    gc.collect()
    gc.freeze()
    # Processes that tests leave behind become children of this one, which ends them.
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    for line in sys.stdin:
        print(json.dumps(_fork_and_run(**json.loads(line))), file=answers, flush=True)


def _fork_and_run(arguments: list[str], seconds: float) -> TestsEnd:
    """Run pytest in a fork; end it at its time limit, and all that it started after it."""
    with tempfile.NamedTemporaryFile() as report:
        if not (child := os.fork()):
            _run_pytest(arguments, report.name)
        try:
            code = _wait(child, time.monotonic() + seconds)
        finally:
            _end_descendants()
        return TestsEnd(code, Path(report.name).read_text(encoding="utf-8").splitlines())


def _run_pytest(arguments: list[str], report: str) -> None:
    """The child, which never returns; its input and output are empty."""
    code = 1
    try:
        os.setsid()
        # A shell starts background commands with interrupts ignored, which children inherit.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        nothing = os.open(os.devnull, os.O_RDWR)
        for number in range(3):
            os.dup2(nothing, number)
        import pytest

        code = int(pytest.main([*OPTIONS, *arguments], plugins=[_Recorder(report)]))
    finally:
        os._exit(code)


class _Recorder:
    """A plugin of pytest: writes the ids of failed tests into a file, a line each."""

    def __init__(self, path: str) -> None:
        self._path = path

    def pytest_runtest_logreport(self, report: Any) -> None:
        """After each phase of a test."""
        self._record(report)

    def pytest_collectreport(self, report: Any) -> None:
        """After the import of a file."""
        self._record(report)

    def _record(self, report: Any) -> None:
        if report.failed:
            with Path(self._path).open("a", encoding="utf-8") as file:
                file.write(f"{report.nodeid}\n")


def _wait(child: int, deadline: float) -> int:
    """Exit code of a child; `TIMED_OUT` beyond the deadline. A child ended by a signal counts as failed."""
    while time.monotonic() < deadline:
        # Of any child: tests that wait until a process is gone would wait for one that nobody reaps.
        ended, status = os.waitpid(-1, os.WNOHANG)
        if ended == child:
            return os.WEXITSTATUS(status) if os.WIFEXITED(status) else 1
        if not ended:
            time.sleep(0.02)
    return TIMED_OUT


def _end_descendants() -> None:
    """Kill and reap everything below this process, also what tests started in sessions of their own."""
    while children := _children():
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        for child in children:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(child, 0)


def _children() -> list[int]:
    """Processes whose parent is this one: descendants become such when theirs has ended."""
    return [int(word) for word in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]


if __name__ == "__main__":
    serve(sys.argv[1:])

"""Commands in processes that are forked from one that has imported the libraries, which a new interpreter takes seconds
for.

All else is as a shell has it: folder, environment, streams, signals, exit code. Of the environment, what libraries read
when they are imported (`OMP_NUM_THREADS`) is that of the tests. The command line itself, the way from the shell to the
end of the process, is tested with real interpreters in `tests/test_cli.py`.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from multiprocessing import reduction
from pathlib import Path
from typing import Any

REPOSITORY = str(Path(__file__).parent.parent)
# A fork of the test's own process, which has Arrow's and torch's threads, now and then waits for ever for a lock that
# one of them held; this server of forks has no threads.
FORKS = multiprocessing.get_context("forkserver")
# Not pyarrow, whose allocator starts a thread.
LIBRARIES = [
    "torch", "pydantic", "typer", "rich.table", "yaml", "PIL.Image", "numpy",
    "diffusers.models.autoencoders.autoencoder_kl", "diffusers.models.unets.unet_2d_condition",
    "diffusers.schedulers.scheduling_ddim", "transformers.models.auto.modeling_auto",
    "transformers.models.clip.modeling_clip", "transformers.models.clip.tokenization_clip",
]  # fmt: skip
FORKS.set_forkserver_preload(LIBRARIES)
# The code of this repository is imported by each command, from where its environment says: it may be a changed copy.
OWN = ("engine", "tests", "tools")


class Command:
    """A process like `subprocess.Popen`, whose standard output is kept and whose errors can be read meanwhile.

    Args:
        main: called in the process, with its arguments in `sys.argv`; it can be pickled.
        arguments: `sys.argv`.
        folder: the one it works in.
        environment: the whole of it.
    """

    def __init__(
        self, main: Callable[[], object], arguments: Sequence[object], folder: Path, environment: Mapping[str, str]
    ) -> None:
        reading, writing = os.pipe()
        self.stderr = os.fdopen(reading, encoding="utf-8")
        self._errors = ""
        # Read when the process has ended.
        self._output = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = FORKS.Process(
            target=_become, args=(main, [str(one) for one in arguments], str(folder), dict(environment),
                                  _Descriptor(self._output.fileno()), _Descriptor(writing)),
        )  # fmt: skip
        self._process.start()
        os.close(writing)

    @property
    def pid(self) -> int:
        """Its number."""
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """Its exit code, -9 of a killed one; None before the end."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """As of `Popen`."""
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """As of `Popen`."""
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("command", timeout or 0.0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """As of `Popen`."""
        os.kill(self.pid, number)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it has written, at its end."""
        if not self.stderr.closed:
            self._errors = self.stderr.read()
            self.stderr.close()
        self.wait(timeout)
        self._output.seek(0)
        return self._output.read().decode(), self._errors

    def __enter__(self) -> Command:
        return self

    def __exit__(self, *_: object) -> None:
        self.communicate()
        self._output.close()


class _Descriptor:
    """An open file that the process gets."""

    def __init__(self, number: int) -> None:
        self._number = number

    def __reduce__(self) -> Any:
        return _detach, (reduction.DupFd(self._number),)


def _detach(duplicate: Any) -> int:
    return int(duplicate.detach())


def _become(
    main: Callable[[], object], arguments: list[str], folder: str, environment: dict[str, str], output: int, errors: int
) -> None:
    """In the process: be the program."""
    for number, descriptor in ((1, output), (2, errors)):
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdin = Path(os.devnull).open(encoding="utf-8")  # noqa: SIM115
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", closefd=False, buffering=1)  # noqa: SIM115
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv[:] = arguments
    own = [one for one in environment.get("PYTHONPATH", "").split(os.pathsep) if one]
    # Not what a test has put there: what is installed, and this repository, which is.
    installed = [one for one in sys.path if one == REPOSITORY or one.startswith((sys.prefix, sys.base_prefix))]
    sys.path[:] = [*own, *installed]
    for name in [name for name in sys.modules if name.partition(".")[0] in OWN]:
        del sys.modules[name]
    try:
        main()
    finally:
        sys.stdout.flush()
        # A fork ends without it.
        atexit._run_exitfuncs()


def console() -> None:
    """The command line."""
    from engine.cli import console

    console()


def module(name: str) -> None:
    """`python -m NAME`."""
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def script(path: str) -> None:
    """`python PATH`."""
    sys.path.insert(0, str(Path(path).resolve().parent))
    runpy.run_path(path, run_name="__main__")


def start(*arguments: object, folder: Path, **environment: str) -> Command:
    """`riskforge ARGUMENTS`, with more in the environment than the tests have."""
    return Command(console, ["riskforge", *arguments], folder, os.environ | environment)


def run(
    *arguments: object, folder: Path, main: Callable[[], object] = console, **environment: str
) -> subprocess.CompletedProcess[str]:
    """The same, finished; or another program."""
    command = ["riskforge", *map(str, arguments)]
    with Command(main, command, folder, os.environ | environment) as process:
        output, errors = process.communicate()
    assert process.returncode is not None
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def python(*arguments: object, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python ARGUMENTS`, for `-m NAME ...` and `PATH ...`."""
    first, *rest = map(str, arguments)
    main = partial(module, rest.pop(0)) if first == "-m" else partial(script, first)
    return run(*rest, folder=folder, main=main, **environment)

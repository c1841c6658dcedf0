"""Everything that a GPU is needed for, by one command, on a machine that need not reach any network.

    python3 tools/gpu_session.py --wheels wheels --output runs/gpu --cifar10-data DIR

Torch, transformers, accelerate and pyarrow are taken from the Python that runs this; what it lacks is installed from a
folder of wheels into an environment of its own. Then: `tests/gpu`, `tools/bench_sampling.py` at three sizes and, where
data are given, `tools/zoo/train_cifar10.py`. Every step has a time limit and a log; one that fails does not stop the
others; one that is done is not done again by the same command. Ends with a table, and with 1 if a step failed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
KILL_SECONDS = 10.0
LIMIT_SECONDS = {"gpu": 120.0, "tests": 900.0, "digits": 400.0, "sd1": 900.0, "sd21-unclip": 600.0, "cifar10": 1800.0}
PROFILED = ("kldb-polyak", "kldb-polyak-unet", "risky-paper")
TIMED_OUT = "ran out of time"


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One command of the session.

    Attributes:
        limit_seconds: after which it is ended.
    """

    name: str
    command: tuple[str, ...]
    limit_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of a step.

    Attributes:
        state: `done`, `done before`, `failed (exit code N)` or `ran out of time`.
    """

    name: str
    state: str
    seconds: float

    @property
    def is_good(self) -> bool:
        """Whether nothing is left to do."""
        return self.state.startswith("done")


def run_steps(steps: Sequence[Step], output: Path) -> list[Outcome]:
    """Run steps one after the other, whatever becomes of each.

    Side effects: in `output`, NAME.log of every step, NAME.done of those that succeeded, and summary.json after each.
    """
    output.mkdir(parents=True, exist_ok=True)
    outcomes: list[Outcome] = []
    for step in steps:
        if (output / f"{step.name}.done").is_file():
            outcomes.append(Outcome(name=step.name, state="done before", seconds=0.0))
        else:
            print(f"{step.name}: {' '.join(step.command)}", file=sys.stderr, flush=True)
            outcomes.append(run_step(step, output))
            print(f"{step.name}: {outcomes[-1].state}, {outcomes[-1].seconds:.0f} s", file=sys.stderr, flush=True)
        (output / "summary.json").write_text(json.dumps([asdict(one) for one in outcomes], indent=1) + "\n")
    return outcomes


def run_step(step: Step, output: Path) -> Outcome:
    """Run one step to its end or its limit; its marker is written last."""
    started = time.monotonic()
    with (output / f"{step.name}.log").open("ab") as log:
        # A session of its own, so that what it has started ends with it.
        process = subprocess.Popen(
            step.command, cwd=REPOSITORY, env=environment(), stdout=log, stderr=log, start_new_session=True
        )
        try:
            code = process.wait(step.limit_seconds)
            state = "done" if code == 0 else f"failed (exit code {code})"
        except subprocess.TimeoutExpired:
            state = TIMED_OUT
        finally:
            _end(process)
    seconds = time.monotonic() - started
    if state == "done":
        (output / f"{step.name}.done").touch()
    return Outcome(name=step.name, state=state, seconds=seconds)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a step's processes, those too that outlived it: first asked, then forced."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        try:
            process.wait(KILL_SECONDS)
        except subprocess.TimeoutExpired:
            continue


def environment() -> dict[str, str]:
    """Of every step: the engine from this repository, no model hub."""
    before = os.environ.get("PYTHONPATH", "")
    path = os.pathsep.join([str(REPOSITORY), *([before] if before else [])])
    return os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}


def make_environment(folder: Path, wheels: Path | None) -> Path:
    """An environment over this Python's packages, with wheels installed before them; returns its Python.

    Raises:
        subprocess.CalledProcessError: it cannot be made, or a wheel does not fit.
    """
    python = folder / "bin" / "python"
    if not (folder / "complete").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", "--system-site-packages", "--without-pip", folder], check=True)
        own = _packages(python)
        # Where this Python is itself of an environment, that one's packages are not the system's.
        own.joinpath("parent.pth").write_text("\n".join({sysconfig.get_path(name) for name in ("purelib", "platlib")}))
        found = sorted(map(str, wheels.glob("*.whl"))) if wheels else []
        if found:
            pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-index", "--no-deps"]
            subprocess.run([*pip, *found], check=True)
        (folder / "complete").touch()
    return python


def _packages(python: Path) -> Path:
    """The folder of an environment's own packages."""
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    return Path(subprocess.run([python, "-c", ask], check=True, capture_output=True, text=True).stdout.strip())


def session_steps(python: str, options: argparse.Namespace) -> list[Step]:
    """The steps, in the order of their worth."""
    output, tools = options.output.resolve(), REPOSITORY / "tools"
    limits = LIMIT_SECONDS | options.limit
    # Without a GPU the tests would skip themselves and pass.
    look = "import torch; print(torch.__version__, torch.cuda.get_device_name())"
    steps = [
        Step(name="gpu", command=(python, "-c", look), limit_seconds=limits["gpu"]),
        Step(
            name="tests",
            # In one process: they share the GPU, and measure its memory.
            command=(
                *(python, "-m", "pytest", "-o", "addopts=", "-q", "-rs"),
                *("tests/gpu", f"--junitxml={output / 'tests.xml'}"),
            ),
            limit_seconds=limits["tests"],
        ),
    ]
    for size in ("digits", "sd1", "sd21-unclip"):
        bench = (python, str(tools / "bench_sampling.py"), "--size", size, "--output", str(output / "bench"))
        # The benchmark stops by itself a little before, with what it has.
        enough = ("--max-seconds", f"{limits[size] * 0.7:g}", "--profile", "prompt", "prompt-unclip", *PROFILED)
        few = () if size == "digits" else ("--num-samples", "8", "--check-samples", "4", "--repeats", "2")
        steps.append(Step(name=size, command=(*bench, *enough, *few), limit_seconds=limits[size]))
    if options.cifar10_data:
        train = (python, str(tools / "zoo" / "train_cifar10.py"), "--data", str(options.cifar10_data.resolve()))
        places = ("--output", str(output / "cifar10"), "--build-folder", str(output / "cifar10-build"))
        steps.append(Step(name="cifar10", command=(*train, *places), limit_seconds=limits["cifar10"]))
    return [step for step in steps if not options.only or step.name in options.only]


def summary(outcomes: Sequence[Outcome]) -> str:
    """A Markdown table."""
    rows = [f"| {one.name} | {one.state} | {one.seconds:.0f} |" for one in outcomes]
    return "\n".join(["| step | state | seconds |", "|---|---|---|", *rows])


def _limit(text: str) -> tuple[str, float]:
    name, _, seconds = text.partition("=")
    return name, float(seconds)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of logs, markers and results")
    parser.add_argument("--wheels", type=Path, help="folder of wheels that this Python lacks")
    parser.add_argument("--environment", type=Path, help="default: OUTPUT/environment")
    parser.add_argument("--cifar10-data", type=Path, help="train the photographs of engine/zoo/cifar10 from these")
    parser.add_argument("--only", nargs="+", default=[], metavar="STEP")
    parser.add_argument("--limit", type=_limit, nargs="+", default=[], metavar="STEP=SECONDS")
    parser.add_argument("--archive", type=Path, help="pack all results, but not the environment, into this .tar.gz")
    options = parser.parse_args(arguments)
    options.limit = dict(options.limit)
    return options


def main() -> int:
    """Command line."""
    options = parse()
    python = make_environment(options.environment or options.output / "environment", options.wheels)
    outcomes = run_steps(session_steps(str(python.absolute()), options), options.output)
    if options.archive:
        subprocess.run(
            ["tar", "-czf", options.archive.resolve(), "--exclude=./environment", "--exclude=./cifar10-build", "."],
            cwd=options.output,
            check=True,
        )
    print(summary(outcomes))
    return 0 if all(one.is_good for one in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())

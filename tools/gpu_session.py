"""Everything that a GPU is needed for, step by step, on a machine that need not reach any network.

    python3 tools/gpu_session.py --list
    python3 tools/gpu_session.py --wheels wheels --output runs/gpu --budget 570 --archive runs/gpu.tar.gz
    python3 tools/gpu_session.py --only decoder sharing --output runs/gpu
    python3 tools/gpu_session.py --first cifar10 --cifar10-data DIR --output runs/gpu

Torch, transformers, accelerate and pyarrow are taken from the Python that runs this; what it lacks is installed from a
folder of wheels into an environment of its own. What decides most in the shortest time comes first: the steps of the
first ten minutes, up to `sharing`, say whether the engine is right there and what it costs; the others take longer and
say it more exactly. Where a GPU is there to train the zoo's photographs, `--first cifar10` puts that before everything
else.

Every step has a time limit, a log, a file of figures that is complete after every figure, and a marker when it is done,
so that the same command goes on where it ended; one that fails does not stop the others. `--budget` ends the session
in time to pack its results. `summary.json` has states and figures. On another machine an archive that was unpacked into
`--output` (`cat ARCHIVE* | tar -xz -C OUTPUT`) counts as done there. Ends with a table, and with 1 if a step failed.

`--device cpu --size tiny` runs the same steps in minutes without a GPU, to see that they would run.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
KILL_SECONDS = 10.0
# In their order; those up to `sharing` take 570 s at most.
LIMIT_SECONDS = {
    "versions": 40.0,
    "decoder": 90.0,
    "precision": 110.0,
    "run": 90.0,
    "benchmark": 150.0,
    "sharing": 90.0,
    "compile": 240.0,
    "counterfactuals": 300.0,
    "tests": 900.0,
    "goals": 500.0,
    "digits": 400.0,
    "sd21-unclip": 600.0,
    "cifar10": 1800.0,
}
# Steps that are programs of their own, with their modules.
PROGRAMS = {
    "versions": "versions",
    "decoder": "decoder",
    "run": "runs",
    "sharing": "sharing",
    "compile": "compiling",
    "counterfactuals": "counterfactuals",
}
# Of the benchmark: what the goals speak of, with the full decoder and with the tiny one.
GOAL_ARMS = (
    *("prompt", "kldb-polyak-unet-every-2nd@decoder-bf16", "risk-polyak@decoder-bf16"),
    *("kldb-polyak-unet-every-2nd@tiny", "risk-polyak@tiny"),
)
OTHER_ARMS = ("prompt@compile-on", "kldb-polyak-unet-every-2nd", "risk-polyak", "*@decoder-fp32")
TIMED_OUT = "ran out of time"
NO_TIME = "not started: the budget is spent"
# Less is not worth a start.
LEAST_SECONDS = 10.0
# A part of an archive, and how many there may be.
PART_BYTES, MAX_PARTS = 16 * 2**20, 4
# What is not packed: installed, random or summed up in figures; and what of the rest is left out where it is too much.
NOT_PACKED, FIRST_LEFT_OUT = ("environment", "models", "runs"), "cifar10-build"


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
        state: `done`, `done before`, `failed (exit code N)`, `ran out of time`, or that there was none for it.
        figures: what it found, also where it did not come to its end.
    """

    name: str
    state: str
    seconds: float
    figures: dict[str, Any] = field(default_factory=dict)

    @property
    def is_good(self) -> bool:
        """Whether nothing is left to do."""
        return self.state.startswith("done")


def run_steps(steps: Sequence[Step], output: Path, budget_seconds: float = float("inf")) -> list[Outcome]:
    """Run steps one after the other, whatever becomes of each.

    Args:
        budget_seconds: for all of them together.

    Side effects: in `output`, NAME.log of every step, NAME.done of those that succeeded, and summary.json after each.
    """
    output.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + budget_seconds
    outcomes: list[Outcome] = []
    for step in steps:
        outcomes.append(_outcome(step, output, deadline - time.monotonic()))
        print(_line(outcomes[-1], output), file=sys.stderr, flush=True)
        (output / "summary.json").write_text(json.dumps([asdict(one) for one in outcomes], indent=1) + "\n")
    return outcomes


def _line(outcome: Outcome, output: Path) -> str:
    """An outcome in words, with the log of a step that did not come to a good end."""
    log = output / f"{outcome.name}.log"
    where = "" if outcome.is_good or not log.is_file() else f"; its log: {log}"
    return f"{outcome.name}: {outcome.state}, {outcome.seconds:.0f} s{where}"


def _outcome(step: Step, output: Path, seconds_left: float) -> Outcome:
    """Run a step that is not done, as long as there is time."""
    state, seconds = "done before", 0.0
    if not (output / f"{step.name}.done").is_file():
        limit = min(step.limit_seconds, seconds_left - KILL_SECONDS)
        if limit < min(LEAST_SECONDS, step.limit_seconds):
            state = NO_TIME
        else:
            print(f"{step.name}: {' '.join(step.command)}", file=sys.stderr, flush=True)
            state, seconds = run_step(replace(step, limit_seconds=limit), output)
    return Outcome(name=step.name, state=state, seconds=seconds, figures=_figures(output / f"{step.name}.json"))


def _figures(path: Path) -> dict[str, Any]:
    """What a step has written; empty where it has not."""
    try:
        return dict(json.loads(path.read_text())) if path.is_file() else {}
    except ValueError as error:
        # It was ended while it wrote.
        return {"unreadable": str(error).partition(":")[0]}


def run_step(step: Step, output: Path) -> tuple[str, float]:
    """Run one step to its end or its limit; its marker is written last. Returns its state and seconds."""
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
    if state == "done":
        (output / f"{step.name}.done").touch()
    return state, time.monotonic() - started


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
    """Of every step."""
    return os.environ | own_variables()


def own_variables() -> dict[str, str]:
    """What a step's environment has besides: engine and tools from this repository, no model hub."""
    before = os.environ.get("PYTHONPATH", "")
    path = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tools"), *([before] if before else [])])
    return {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}


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
    """The steps in their order."""
    commands = {
        **{name: _program(module, name, options) for name, module in PROGRAMS.items()},
        "precision": _tests("precision", options, "tests/gpu/test_gpu_precision.py"),
        "tests": _tests("tests", options, "tests/gpu", "--ignore=tests/gpu/test_gpu_precision.py"),
        "benchmark": _benchmark(options, "benchmark", 8, 2, GOAL_ARMS, GOAL_ARMS[:3]),
        "goals": _benchmark(options, "goals", 32, 5, (*GOAL_ARMS, *OTHER_ARMS)),
        "digits": _benchmark(options, "digits", 32, 3, ("*",), ("prompt", "kldb-polyak", "risky-paper")),
        "sd21-unclip": _benchmark(options, "sd21-unclip", 8, 2, ("*",), ("prompt-unclip", "risky-paper")),
        "cifar10": _training(options),
    }
    names = [*options.first, *[name for name in LIMIT_SECONDS if name not in options.first]]
    limits = LIMIT_SECONDS | options.limit
    return [
        Step(name=name, command=(python, *commands[name]), limit_seconds=limits[name])
        for name in names
        if commands[name] and (not options.only or name in options.only)
    ]


def _program(module: str, name: str, options: argparse.Namespace) -> tuple[str, ...]:
    output = options.output.resolve()
    given = ("--device", options.device, "--size", options.size, "--models", str(output / "models" / options.size))
    return ("-m", f"gpu_steps.{module}", *given, "--output", str(output / f"{name}.json"))


def _tests(name: str, options: argparse.Namespace, *which: str) -> tuple[str, ...]:
    # In one process: they share the GPU, and measure its memory.
    results = options.output.resolve() / f"{name}.xml"
    return ("-m", "pytest", "-o", "addopts=", "-q", "-rs", *which, f"--junitxml={results}")


def _benchmark(
    options: argparse.Namespace,
    name: str,
    batch: int,
    repeats: int,
    arms: Sequence[str],
    profiled: Sequence[str] = (),
) -> tuple[str, ...]:
    """One batch a repetition.

    Args:
        batch: its samples.
        arms: patterns of their names; profiled: of those whose time is taken apart.
    """
    output, seconds = options.output.resolve(), (LIMIT_SECONDS | options.limit)[name]
    size = name if name in ("digits", "sd21-unclip") else options.size
    if options.size == "tiny":
        size, batch, repeats = "tiny" if size != "digits" else size, 2, 1
    place = ("--device", options.device, "--models", str(output / "models" / size), "--output", str(output))
    # The benchmark stops by itself a little before its limit, with what it has.
    amount = ("--num-samples", batch, "--batch-size", batch, "--check-samples", 4, "--repeats", repeats)
    several = ("--processes", 1, "--max-seconds", f"{seconds * 0.7:g}", "--name", name)
    profile = ("--profile", *profiled) if profiled else ()
    script = str(REPOSITORY / "tools" / "bench_sampling.py")
    return (script, "--size", size, *place, *map(str, amount + several), "--only", *arms, *profile)


def _training(options: argparse.Namespace) -> tuple[str, ...]:
    """The training of the photographs' zoo; empty without data."""
    if not options.cifar10_data:
        return ()
    output, data = options.output.resolve(), options.cifar10_data.resolve()
    few: tuple[str, ...] = ("--max-steps", "2") if options.size == "tiny" else ()
    few += ("--size", "gpu" if options.device == "cuda" else "cpu", "--threads", str(os.cpu_count() or 1))
    places = ("--output", str(output / "cifar10"), "--build-folder", str(output / "cifar10-build"))
    return (str(REPOSITORY / "tools" / "zoo" / "train_cifar10.py"), "--data", str(data), *places, *few)


def pack(output: Path, archive: Path) -> list[Path]:
    """Pack the results into an archive, in parts where it is large; returns their paths.

    Models, images and installed packages are left out; checkpoints of a training, where they are too much.

    Raises:
        ValueError: the results are too large.
    """
    for left_out in (NOT_PACKED, (*NOT_PACKED, FIRST_LEFT_OUT)):
        excluded = [f"--exclude=./{name}" for name in left_out]
        packed = subprocess.run(["tar", "-cz", *excluded, "."], cwd=output, check=True, stdout=subprocess.PIPE).stdout
        if len(packed) <= MAX_PARTS * PART_BYTES:
            return _write_parts(packed, archive)
    raise ValueError(f"{output}: the results take {len(packed) / 2**20:.0f} MiB packed; nothing was written")


def _write_parts(packed: bytes, archive: Path) -> list[Path]:
    """One file where it is small enough; else ARCHIVE.0, ARCHIVE.1, ..."""
    starts = range(0, len(packed), PART_BYTES)
    paths = [archive] if len(starts) == 1 else [Path(f"{archive}.{number}") for number in range(len(starts))]
    archive.parent.mkdir(parents=True, exist_ok=True)
    for path, start in zip(paths, starts, strict=True):
        path.write_bytes(packed[start : start + PART_BYTES])
    return paths


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
    steps: dict[str, Any] = {"nargs": "+", "default": [], "choices": tuple(LIMIT_SECONDS), "metavar": "STEP"}
    parser.add_argument("--list", action="store_true", help="print the steps with limits and commands, and run none")
    parser.add_argument("--output", type=Path, default=Path("runs/gpu"), help="folder of logs, markers and results")
    parser.add_argument("--only", **steps, help="run these steps")
    parser.add_argument("--first", **steps, help="run these steps before the others")
    parser.add_argument("--limit", type=_limit, nargs="+", default=[], metavar="STEP=SECONDS")
    parser.add_argument("--budget", type=float, default=float("inf"), metavar="SECONDS", help="of the whole session")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--size", choices=("sd1", "tiny"), default="sd1", help="of the models with random weights")
    parser.add_argument("--wheels", type=Path, help="folder of wheels that this Python lacks")
    parser.add_argument("--environment", type=Path, help="default: OUTPUT/environment")
    parser.add_argument("--cifar10-data", type=Path, help="train the photographs of engine/zoo/cifar10 from these")
    archive = f"pack results into this .tar.gz, in parts of {PART_BYTES >> 20} MiB where it is larger"
    parser.add_argument("--archive", type=Path, help=archive)
    options = parser.parse_args(arguments)
    options.limit = dict(options.limit)
    if unknown := set(options.limit) - set(LIMIT_SECONDS):
        parser.error(f"--limit: no step is called {', '.join(sorted(unknown))}; see --list")
    if options.only == ["cifar10"] and not options.cifar10_data:
        parser.error("--only cifar10: name its data in --cifar10-data")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    started, options = time.monotonic(), parse(arguments)
    if options.list:
        print("environment: " + shlex.join(f"{name}={value}" for name, value in own_variables().items()))
        for step in session_steps("python", options):
            print(f"{step.name}: {step.limit_seconds:g} s: {shlex.join(step.command)}")
        return 0
    python = make_environment(options.environment or options.output / "environment", options.wheels)
    spent = time.monotonic() - started
    outcomes = run_steps(session_steps(str(python.absolute()), options), options.output, options.budget - spent)
    if options.archive:
        print(f"packed: {', '.join(map(str, pack(options.output, options.archive)))}", file=sys.stderr)
    print(summary(outcomes))
    return 0 if all(one.is_good for one in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())

"""What the steps share: their command line, their file of figures, the models, and the engine's commands."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from engine.errors import JobError, first_line
from engine.models.library_logging import quiet_libraries

RISKFORGE = (sys.executable, "-c", "from engine.cli import console; console()")
# What ends an attempt and not the step: other attempts are still worth their time.
FAILURES = (RuntimeError, NotImplementedError, ImportError, OSError, ValueError, JobError)
OUTPUT_LINES = 40


class Figures:
    """The results of a step, in a file that is complete after every figure: a step may run out of time.

    Args:
        path: of the file; its folder is made.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path, self._known = path, dict[str, Any]()

    def note(self, name: str, value: Any) -> None:
        """Add a figure, and print it."""
        self._known[name] = value
        staged = self._path.with_suffix(".part")
        staged.write_text(json.dumps(self._known, indent=1) + "\n")
        staged.replace(self._path)
        print(f"{name}: {json.dumps(value)}", flush=True)


class PeakMemory:
    """The most that was allocated on a GPU since this was made, above what was there before; 0 on a CPU."""

    def __init__(self, device: str) -> None:
        self._on_gpu = device == "cuda"
        if self._on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self._before = torch.cuda.memory_allocated() if self._on_gpu else 0

    def gib(self) -> float:
        """The peak so far."""
        peak = torch.cuda.max_memory_allocated() if self._on_gpu else 0
        return rounded((peak - self._before) / 2**30)


def rounded(value: float) -> float:
    """Four significant digits."""
    return float(f"{value:.4g}")


def attempt(make: Callable[[], Any]) -> Any:
    """What a call returns, or in words what it raised."""
    try:
        return make()
    except FAILURES as error:
        return f"{type(error).__name__}: {first_line(error)}"


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that every step has."""
    quiet_libraries()
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    made.add_argument("--size", choices=("tiny", "sd1"), default="sd1", help="of the models with random weights")
    made.add_argument("--models", type=Path, required=True, help="folder of these models; made where it lacks them")
    made.add_argument("--output", type=Path, required=True, help="file of figures")
    return made


def riskforge(*arguments: str | Path) -> dict[str, Any]:
    """Run a command of the engine; returns `exit_code`, `seconds`, and the last lines of its `output`."""
    started = time.monotonic()
    command = [*RISKFORGE, *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    print(done.stdout, flush=True)
    lines = done.stdout.splitlines()[-OUTPUT_LINES:]
    return {"exit_code": done.returncode, "seconds": round(time.monotonic() - started, 1), "output": lines}


def write_job(folder: Path, raw: dict[str, Any]) -> Path:
    """Write a job next to its run; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "job.yaml"
    path.write_text(json.dumps(raw, indent=1))
    return path


def summary_of(run: Path) -> dict[str, Any]:
    """What a run says of itself: samples by status, batch sizes by request in their order, and what was forced."""
    import pyarrow.parquet as pq

    columns = ["request", "status", "batch_size", "worker", "nonfinite_gradients", "zero_gradients", "guided_steps"]
    rows = pq.read_table(run / "metadata.parquet", columns=columns).to_pylist()
    manifest = json.loads((run / "manifest.json").read_text())
    sizes: dict[str, list[int]] = {}
    statuses = [row["status"] for row in rows]
    unmoved = [row for row in rows if row["guided_steps"] and row["zero_gradients"] == row["guided_steps"]]
    for row in rows:
        sizes.setdefault(f"{row['request']} on {row['worker']}", []).append(row["batch_size"])
    return {
        "samples": len(rows),
        "statuses": {status: statuses.count(status) for status in sorted(set(statuses))},
        "batch_sizes": {name: list(dict.fromkeys(found)) for name, found in sorted(sizes.items())},
        "nonfinite_gradients": sum(row["nonfinite_gradients"] or 0 for row in rows),
        "unmoved_samples": len(unmoved),
        "notices": manifest.get("notices", []),
        "timing": manifest["timing"],
        "hardware": manifest["hardware"],
    }


def exit_code(failures: Sequence[str]) -> int:
    """Report what is wrong; 1 if anything is."""
    for failure in failures:
        print(f"WRONG: {failure}", flush=True)
    return 1 if failures else 0

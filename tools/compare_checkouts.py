"""Check that two checkouts behave in the same way: `python tools/compare_checkouts.py BEFORE AFTER`.

For every job of BEFORE that a CPU finishes in minutes, both checkouts prepare its artefacts and run it, each command in
a process of its own with one thread. Plans, digests, tar bytes, artefacts, Arrow schemas and deterministic columns must
be equal. Then each checkout works on a copy of the run that BEFORE made: it is opened, verified, resumed, exported,
rescored, damaged, repaired and resumed again, and the results must be equal too. Exit code 0: everything is equal;
1: something differs, and the first difference of each kind is named; 2: BEFORE itself fails, or nothing is to compare.

`--keep FOLDER` keeps the files. Results of BEFORE that are there are reused as long as code, libraries, job and
commands are the same, so that AFTER can be compared repeatedly in half the time. Help texts, messages, dataset cards
and reports are not compared: their wording may change.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import yaml
from checkouts.facts import Comparison, Facts, compare_facts, file_digest, folder_facts, stable_json
from checkouts.steps import Job, Step, UnusableError, choose_jobs
from rich import box
from rich.console import Console
from rich.table import Table

OWN_RUN, OLD_RUN = "own run", "run of BEFORE"
EXIT_DIFFERENT, EXIT_UNUSABLE, EXIT_TIMEOUT = 1, 2, 124
COMMAND_SECONDS = 3600
# What affects output bytes, apart from the code of a checkout.
LIBRARIES = ("torch", "diffusers", "transformers", "scikit-learn", "numpy", "pillow", "pyarrow")

# The installed command, from the checkout in the first argument and from nowhere else.
PROGRAM = """
import importlib, pathlib, sys
_, checkout, module, name, *arguments = sys.argv
main = importlib.import_module(module)
assert pathlib.Path(main.__file__).is_relative_to(checkout), f"{main.__file__} is not in {checkout}"
sys.argv = ["riskforge", *arguments]
getattr(main, name)()
"""


def main(arguments: list[str] | None = None) -> int:
    """Compare what the command line names; returns the exit code."""
    options = parse(arguments)
    try:
        jobs, left_out = choose_jobs(options.before, options.jobs, whole=options.whole, runs_only=options.runs_only)
        with ExitStack() as stack:
            folder = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="checkouts-")))
            pool = stack.enter_context(ThreadPoolExecutor(options.parallel))
            compared = list(pool.map(lambda job: compare_job(job, options.before, options.after, folder), jobs))
    except UnusableError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_UNUSABLE
    return show([row for rows in compared for row in rows], left_out)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options, with absolute paths."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("before", type=Path, help="checkout that is the reference")
    parser.add_argument("after", type=Path, help="checkout that must behave in the same way")
    parser.add_argument("--jobs", nargs="+", metavar="NAME", help="only these; default: all that can be compared")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep the files, and reuse the results of BEFORE")
    parser.add_argument("--whole", action="store_true", help="run large jobs at their full size")
    parser.add_argument("--runs-only", action="store_true", help="do not open the runs of BEFORE with AFTER")
    parser.add_argument("--parallel", type=int, default=1, metavar="N", help="jobs at a time; default: 1")
    options = parser.parse_args(arguments)
    options.before, options.after = options.before.resolve(), options.after.resolve()
    options.keep = options.keep and options.keep.resolve()
    return options


def compare_job(job: Job, before: Path, after: Path, folder: Path) -> list[Comparison]:
    """Compare two checkouts on a job, in a folder that may hold the results of BEFORE.

    Raises:
        UnusableError: a command of BEFORE fails.
    """
    home = folder / job.name
    home.mkdir(parents=True, exist_ok=True)
    (home / "job.yaml").write_text(job.text, encoding="utf-8")
    expected = reference_facts(job, before, home)
    rows = list(compare_facts(job.name, expected, observe(job, "after", after, home)))
    num_different = sum(row.num_different for row in rows)
    log(job.name, "after", f"{num_different} of {sum(row.num_compared for row in rows)} facts differ")
    return rows


def reference_facts(job: Job, checkout: Path, home: Path) -> Facts:
    """The facts of BEFORE: stored ones where nothing has changed, else new ones."""
    stored = home / "before.json"
    steps = [(step.name, step.arguments, step.program) for step in (*job.own_run, *job.old_run)]
    key = {"python": sys.version, "code": code_digest(checkout), "job": job.text, "steps": repr(steps)}
    key |= {name: importlib.metadata.version(name) for name in LIBRARIES}
    if stored.exists():
        content = json.loads(stored.read_text(encoding="utf-8"))
        if content["key"] == key:
            log(job.name, "before", "results are reused")
            return content["facts"]
    stored.unlink(missing_ok=True)
    facts = observe(job, "before", checkout, home)
    stored.write_text(json.dumps({"key": key, "facts": facts}, indent=1), encoding="utf-8")
    return facts


def code_digest(checkout: Path) -> str:
    """SHA-256 over the package of a checkout, including the models of the zoo, and over its jobs."""
    digest = hashlib.sha256()
    for path in sorted([*(checkout / "engine").rglob("*"), *(checkout / "jobs").rglob("*")]):
        if path.is_file() and "__pycache__" not in path.parts:
            digest.update(f"{path.relative_to(checkout)}\0{file_digest(path)}\n".encode())
    return digest.hexdigest()


def observe(job: Job, side: str, checkout: Path, home: Path) -> Facts:
    """Run the job with a checkout (`side` is `before` or `after`), then work on a copy of the run of BEFORE.

    Raises:
        UnusableError: a command of BEFORE fails.
    """
    shutil.rmtree(home / side, ignore_errors=True)
    own, copy = home / side / "own", home / side / "old"
    own.mkdir(parents=True)
    facts: Facts = {OWN_RUN: {}}
    job_file = checkout / "jobs" / f"{job.name}.yaml"
    if job_file.exists():
        facts[OWN_RUN]["job file"] = {job.name: repr(yaml.safe_load(job_file.read_text(encoding="utf-8")))}
    follow(job.own_run, job.name, side, OWN_RUN, checkout, own, facts)
    if job.old_run:
        shutil.copytree(home / "before" / "own", copy)
        follow(job.old_run, job.name, side, OLD_RUN, checkout, copy, facts)
    return facts


def follow(steps: Iterable[Step], job: str, side: str, phase: str, checkout: Path, folder: Path, facts: Facts) -> None:
    """Execute the steps of a phase in a folder and add the facts; AFTER stops at the first command that fails.

    Raises:
        UnusableError: a command of BEFORE fails.
    """
    kinds = facts.setdefault(phase, {})
    for step in steps:
        if step.change is not None:
            step.change(folder)
            continue
        started = time.monotonic()
        code, output, last_line = call(checkout, step, folder)
        log(job, side, f"{phase}: {step.name}: exit code {code}, {time.monotonic() - started:.0f} s")
        kinds.setdefault("exit codes", {})[step.name] = str(code)
        if code not in step.codes:
            if side == "before":
                raise UnusableError(f"{job}: `{step.name}` ends with exit code {code} in BEFORE: {last_line}")
            log(job, side, f"failed: {last_line}")
            return
        if step.has_json:
            kinds.setdefault("--json", {})[step.name] = stable_json(output, folder)
        for kind, name, fact in folder_facts(folder / step.folder, folder) if step.folder else ():
            kinds.setdefault(kind, {})[f"{step.name}: {name}"] = fact


def call(checkout: Path, step: Step, folder: Path) -> tuple[int, str, str]:
    """Run a command of a checkout; returns its exit code, standard output, and the last line of standard error."""
    project = tomllib.loads((checkout / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    command = [PROGRAM, str(checkout), *project["scripts"]["riskforge"].split(":"), *step.arguments]
    environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    try:
        done = subprocess.run(
            [sys.executable, "-c", *([step.program] if step.program else command)],
            cwd=folder, env=environment, capture_output=True, text=True, timeout=COMMAND_SECONDS, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return EXIT_TIMEOUT, "", f"not finished after {COMMAND_SECONDS} s"
    (folder / f"{step.name.replace(' ', '-')}.log").write_text(done.stdout + done.stderr, encoding="utf-8")
    return done.returncode, done.stdout, (done.stderr.strip().splitlines() or [""])[-1]


def show(rows: list[Comparison], left_out: dict[str, str]) -> int:
    """Print the table, the jobs that were left out, and the first difference of each kind; returns the exit code."""
    table = Table(box=box.SIMPLE_HEAD)
    for head in ("job", "of", "compared", "number", "result"):
        table.add_column(head, justify="right" if head == "number" else "left")
    for row in rows:
        result = f"{row.num_different} DIFFERENT" if row.num_different else "equal"
        table.add_row(row.job, row.phase, row.kind, str(row.num_compared), result)
    Console(soft_wrap=True).print(table)
    for name, reason in left_out.items():
        print(f"left out: {name}: {reason}")
    different = [row for row in rows if row.num_different]
    for row in different:
        print(f"different: {row.job}, {row.phase}, {row.kind}: {row.first}")
    if different:
        return EXIT_DIFFERENT
    print(f"equal: {sum(row.num_compared for row in rows)} facts of {len({row.job for row in rows})} jobs")
    return 0


def log(job: str, side: str, text: str) -> None:
    """Print a line of progress."""
    print(f"{time.strftime('%H:%M:%S')} {job:<20} {side:<6} {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())

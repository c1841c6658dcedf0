"""The jobs that are compared, and the commands for each."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

# Overrides that make a large job small, but keep every request; `--whole` leaves them out. Quotas have shards of their
# own for every class, and a batch on a CPU costs the same however few samples it has.
SMALLER: dict[str, dict[str, Any]] = {
    "augment-digits": {
        "requests.0.count": 2, "requests.1.classes": "[three, eight]", "requests.1.count": 2,
        "requests.1.contexts": "['', red ink, small]", "requests.2.classes": "[three, eight]", "requests.2.count": 12,
        "output.samples_per_shard": 16,
    },
    "counterfactuals-digits": {
        f"requests.{number}.{key}": value
        for number in range(2)
        for key, value in {"classes": "[three, eight]", "count": 3, "start.strength": "[0, 0.3, 1]"}.items()
    },
    "nightly-stress": {
        "requests.0.count": 1, "requests.0.contexts": "['', red ink, small]", "requests.1.classes": "[three]",
        # More than the first round of 16 attempts gives: a second round grows the plan.
        "requests.1.count": 14, "output.samples_per_shard": 16,
    },
    "quickstart-cifar10": {f"requests.{number}.count": 8 for number in range(4)},
    "riskydiff-digits": {f"requests.{number}.count": 1 for number in range(10)},
    "riskydiff-mixtures": {f"requests.{number}.count": 1 for number in range(6)},
}  # fmt: skip
# Artefacts that a job's comments ask for: arguments of `prepare`, the last one is the folder.
ARTEFACTS: dict[str, list[tuple[str, ...]]] = {
    "riskydiff-mixtures": [
        ("--data", "digits:validation", "--components", str(number), "--output", f"runs/mixtures-{number}")
        for number in (1, 3, 6)
    ]
}
# Instead of today's date in requests that are `fresh`: both checkouts must draw the same noise.
FRESH_DATE = "2026-11-21"
ZOO = "zoo:"
# Of the sets of images that need no file.
NAMED = "digits:"
# The job file, as seen from the working folders.
JOB = "../../job.yaml"

# Opens a run from Python, by the public names (docs/reading.md).
OPENING = """
import hashlib, json, engine
corpus = engine.open_run("run")
samples, hard = corpus.to_torch(), corpus.filter("risk > 0.1 and class_name not in ['three']")
images = [(hashlib.sha256(image.numpy().tobytes()).hexdigest(), label) for image, label, _ in samples]
derived = corpus.to_table(["key", "target_errs", "oracle_agrees", "valid_failure"]).to_pylist()
print(json.dumps([len(corpus), len(hard), len(hard.samples), list(corpus.columns), corpus.labels, images, derived]))
"""


class UnusableError(Exception):
    """The checkout BEFORE or the command line cannot be used for a comparison."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A command of `riskforge`, or a program, or with `change` a modification of the files.

    Attributes:
        name: unique in its phase.
        arguments: of `riskforge`; the working folder holds the run as `run`.
        program: Python code instead of `riskforge`.
        folder: its content is compared afterwards.
        codes: exit codes that BEFORE may end with.
        has_json: whether standard output is JSON that is compared.
    """

    name: str
    arguments: tuple[str, ...] = ()
    program: str = ""
    folder: str = ""
    codes: tuple[int, ...] = (0,)
    has_json: bool = False
    change: Callable[[Path], None] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A job file of BEFORE, the steps that make its run, and those that work on the run of BEFORE."""

    name: str
    text: str
    own_run: tuple[Step, ...]
    old_run: tuple[Step, ...]


def choose_jobs(
    checkout: Path, names: list[str] | None, *, whole: bool, runs_only: bool
) -> tuple[list[Job], dict[str, str]]:
    """The jobs to compare, and the reason why others are left out.

    Args:
        names: only these; None for all.
        whole: run large jobs at their full size.
        runs_only: without the steps that work on the run of BEFORE.

    Raises:
        UnusableError: there is no such job, or nothing to compare.
    """
    paths = {path.stem: path for path in sorted((checkout / "jobs").glob("*.yaml"))}
    if unknown := set(names or ()) - paths.keys():
        raise UnusableError(f"--jobs: {', '.join(sorted(unknown))}: not in {checkout / 'jobs'}")
    jobs, left_out = [], {}
    for name in [name for name in paths if names is None or name in names]:
        text = paths[name].read_text(encoding="utf-8")
        if reason := exclusion_reason(yaml.safe_load(text)):
            left_out[name] = reason
        else:
            jobs.append(plan_steps(name, text, whole=whole, runs_only=runs_only))
    if not jobs:
        reasons = [f"{name}: {reason}" for name, reason in left_out.items()]
        raise UnusableError("; ".join(["nothing to compare", *reasons]))
    return jobs, left_out


def exclusion_reason(raw: dict[str, Any]) -> str:
    """Why a job is no run, or cannot run on a CPU without a network; empty where it can."""
    if "study" in raw:
        return "is a study"
    if raw.get("runtime", {}).get("device") == "cuda":
        return "needs a GPU"
    models = {**raw["models"], "safety_checker": None, "requests": [one.get("diffusion") for one in raw["requests"]]}
    groups = [group if isinstance(group, list) else [group] for group in models.values()]
    addresses = [address for group in groups for address in group if address]
    if others := [address for address in addresses if not address.startswith(ZOO)]:
        return f"needs models that are not in the zoo: {', '.join(others)}"
    starts = {one["start"]["images"] for one in raw["requests"] if "start" in one}
    unnamed = sorted(images for images in starts if not images.startswith(NAMED))
    return f"starts from images that are not in the repository: {', '.join(unnamed)}" if unnamed else ""


def plan_steps(name: str, text: str, *, whole: bool, runs_only: bool) -> Job:
    """The steps for a job, from the text of its file."""
    raw = yaml.safe_load(text)
    overrides = {} if whole else dict(SMALLER.get(name, {}))
    fresh = [number for number, request in enumerate(raw["requests"]) if request.get("fresh") is True]
    overrides |= {f"requests.{number}.fresh": FRESH_DATE for number in fresh}
    job = (JOB, *(part for key, value in overrides.items() for part in ("--set", f"{key}={value}")))
    run = ("run", *job, "--executor", "local", "--workers", "1", "--output", "run")
    own_run = (
        *prepare_steps(name),
        Step(name="plan", arguments=("plan", *job, "--json"), has_json=True),
        # Exit code 3: a quota is not filled.
        Step(name="run", arguments=run, folder="run", codes=(0, 3)),
    )
    models = raw["models"]
    other_target = (models.get("transfer") or [models.get("oracle") or models["target"]])[0]
    old_run = () if runs_only else tuple(old_run_steps(run, other_target))
    return Job(name=name, text=text, own_run=own_run, old_run=old_run)


def prepare_steps(name: str) -> Iterator[Step]:
    """The steps that make the artefacts of a job."""
    for number, options in enumerate(ARTEFACTS.get(name, ())):
        arguments = ("prepare", JOB, "--executor", "local", *options)
        yield Step(name=f"prepare {number}", arguments=arguments, folder=options[-1])


def old_run_steps(run: tuple[str, ...], target: str) -> Iterator[Step]:
    """The steps on a run that exists already; `run` is the command that made it, `target` another classifier."""
    yield Step(name="status", arguments=("status", "run", "--json"), has_json=True)
    yield Step(name="open", program=OPENING, has_json=True)
    yield Step(name="inspect", arguments=("inspect", "run", "--json"), has_json=True)
    yield Step(name="verify", arguments=("verify", "run", "--deep", "--json"), has_json=True)
    yield Step(name="resume", arguments=run, folder="run", codes=(0, 3))
    yield Step(name="report", arguments=("report", "run"))
    for kind in ("webdataset", "imagefolder", "parquet"):
        options = ("--format", kind, "--output", kind, "--filter", "conformity > -1 and not risk < 0")
        yield Step(name=kind, arguments=("export", "run", *options, "--samples-per-shard", "20"), folder=kind)
    rescore = ("rescore", "run", "--target", target, "--output", "rescored", "--json")
    yield Step(name="rescore", arguments=rescore, folder="rescored", codes=(0, 3), has_json=True)
    yield Step(name="compare", arguments=("compare", "run", "rescored", "--json"), has_json=True)
    yield Step(name="damage", change=damage)
    yield Step(name="verify the damage", arguments=("verify", "run"), codes=(1,))
    yield Step(name="repair", arguments=("repair", "run"))
    yield Step(name="resume after repair", arguments=run, folder="run", codes=(0, 3))
    yield Step(name="verify after repair", arguments=("verify", "run", "--deep", "--json"), has_json=True)


def damage(folder: Path) -> None:
    """Truncate the last tar of the run: its shard must be regenerated with the same bytes."""
    tar = sorted(folder.glob("run/shards/*.tar"))[-1]
    os.truncate(tar, tar.stat().st_size // 2)

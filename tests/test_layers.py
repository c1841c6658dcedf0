"""The layers of `engine`: the order of the packages, what the pure ones may import, how quickly commands start."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

ENGINE = REPOSITORY / "engine"
# What neither the mathematics nor the job and its records use: Ray, files, network, clocks, global randomness.
IMPURE = {
    "ray", "fsspec", "requests", "http", "socket", "subprocess", "typer", "rich", "webdataset", "pyarrow", "pathlib",
    "os", "shutil", "tempfile", "logging", "random", "time", "transformers",
}  # fmt: skip
# The messages between scheduler and executors, and the scheduler itself: a simulation drives the real ones.
PURE_FILES = (
    "generation/batching.py",
    *(path.relative_to(ENGINE).as_posix() for path in sorted((ENGINE / "driver/scheduling").glob("*.py"))),
)
START_UP = (
    "engine",
    "engine.cli",
    "engine.job.columns",
    "engine.job.spec",
    "engine.job.plan",
    "engine.models.job_checks",
)
HEAVY = ("torch", "ray", "diffusers", "transformers", "pyarrow", "numpy", "sklearn")


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


def top_level(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imported(path)}


def test_packages_import_in_one_direction():
    """The contracts of `pyproject.toml`: order of the packages, order inside `data`, no cycle anywhere."""
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        cwd=REPOSITORY, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


def test_the_package_stays_small_at_its_top():
    """At most ten packages and five loose files; `zoo` holds models, no code."""
    packages = {path.parent.name for path in ENGINE.glob("*/__init__.py")}
    assert len(packages) <= 10, packages
    assert len(list(ENGINE.glob("*.py"))) <= 5


@pytest.mark.parametrize("package", ["methods", "job"])
def test_methods_and_job_are_pure(package):
    for path in sorted((ENGINE / package).rglob("*.py")):
        assert not top_level(path) & IMPURE, path


@pytest.mark.parametrize("name", PURE_FILES)
def test_scheduling_is_pure(name):
    assert not top_level(ENGINE / name) & IMPURE


def test_only_the_ray_executor_imports_ray():
    """Everything else runs without Ray."""
    users = [path for path in sorted(ENGINE.rglob("*.py")) if "ray" in top_level(path)]
    names = [path.relative_to(ENGINE).as_posix() for path in users]
    modules = ("ray", "ray_actor", "ray_cluster", "ray_metrics", "ray_tasks")
    assert names == [f"driver/executors/{name}.py" for name in modules]


@pytest.mark.parametrize("module", START_UP)
def test_start_up_imports_nothing_heavy(module):
    """`riskforge --help` and `plan --validate` must not wait for torch, Ray or pyarrow."""
    code = f"import sys, {module}; sys.exit(', '.join(sorted({set(HEAVY)!r} & set(sys.modules))) or 0)"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_module_of_the_command_line_runs():
    done = subprocess.run(
        [sys.executable, "-m", "engine.cli", "--version"], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.stdout.startswith("riskforge ")

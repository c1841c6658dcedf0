"""The rings of the design: what each part may import, and how quickly the command line starts."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

ENGINE = REPOSITORY / "engine"
CORE = (
    "spec.py", "plan.py", "records.py", "scores.py", "finiteness.py", "scheduler.py", "temperature.py", "batching.py",
    "guidance",
    "sampling", "conditioning", "quotas.py", "messages.py", "tables.py", "class_names.py", "spec_messages.py",
    "labels.py", "heartbeat.py", "strict_json.py",
)  # fmt: skip
CORE_FORBIDS = {
    "ray", "fsspec", "requests", "http", "socket", "subprocess", "typer", "rich", "webdataset", "pyarrow", "pathlib",
    "os", "shutil", "tempfile", "logging", "random", "time", "transformers",
}  # fmt: skip


def sources(part: Path) -> list[Path]:
    return sorted(part.rglob("*.py")) if part.is_dir() else [part]


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            # A name of a package may be a module of it.
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


@pytest.mark.parametrize("part", CORE)
def test_the_core_is_pure(part):
    """No Ray, files, network, clocks or global randomness; and nothing of the outer rings."""
    for path in sources(ENGINE / part):
        names = imported(path)
        assert not {name.split(".")[0] for name in names} & CORE_FORBIDS, path
        outer = ("engine.dataset", "engine.models", "engine.executors", "engine.report", "engine.run", "engine.cli")
        outer += ("engine.commands", "engine.jobfile", "engine.inspection", "engine.imaging", "engine.rescore")
        outer += (
            "engine.studies",
            "engine.conditioner",
            "engine.images",
            "engine.digits",
            "engine.artefact",
            "engine.scoring",
        )
        outer += ("engine.generator", "engine.worker", "engine.observation", "engine.prepare", "engine.progress")
        assert not [name for name in names if name.startswith(outer)], path


def test_only_the_ray_executor_imports_ray():
    """Everything else runs without Ray."""
    users = [path for path in sources(ENGINE) if any(name.split(".")[0] == "ray" for name in imported(path))]
    assert [path.relative_to(ENGINE).as_posix() for path in users] == ["executors/ray.py"]


def test_the_edges_do_not_import_the_shell():
    """Files and models know nothing of executors, driver and command line."""
    edges = ("dataset", "models", "report", "images", "digits.py", "artefact.py", "conditioner.py", "generator.py")
    edges += ("scoring.py", "imaging.py", "worker.py", "acceptance.py", "rescore.py", "jobfile.py", "inspection.py")
    edges += ("terminal.py", "tars.py", "files.py")
    for part in edges:
        for path in sources(ENGINE / part):
            shell = (
                "engine.executors",
                "engine.run",
                "engine.prepare",
                "engine.observation",
                "engine.studies",
                "engine.cli",
                "engine.commands",
                "engine.progress",
            )
            assert not [name for name in imported(path) if name.startswith(shell)], path


@pytest.mark.parametrize("module", ["engine.cli", "engine.spec", "engine.plan", "engine.models.addresses"])
def test_start_up_imports_nothing_heavy(module):
    """`riskforge --help` and `plan --validate` must not wait for torch, Ray or pyarrow."""
    code = (
        f"import sys, {module};"
        "heavy = {'torch', 'ray', 'diffusers', 'transformers', 'pyarrow', 'numpy', 'sklearn'} & set(sys.modules);"
        "sys.exit(', '.join(sorted(heavy)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

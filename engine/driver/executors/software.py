"""The software that decides what a worker makes: it must be the same on all machines of a cluster."""

from __future__ import annotations

import hashlib
import importlib.metadata
import sys
from pathlib import Path

import engine

# Their versions decide pixels, scores, files, or whether processes understand each other.
PACKAGES = ("ray", "torch", "diffusers", "transformers", "numpy", "pillow", "pyarrow")
OWN = "riskforge"
ABSENT = "none"


def software() -> dict[str, str]:
    """Versions by name: of Python, of libraries, and of this package with a digest of its source.

    Of libraries without what a build appends (`2.9.1+cu128`): a head without a GPU may have another one.
    """
    versions = {"Python": f"{sys.version_info.major}.{sys.version_info.minor}"}
    versions |= {name: _version(name).partition("+")[0] for name in PACKAGES}
    return versions | {OWN: f"{_version(OWN)} ({_source_digest(Path(engine.__file__).parent)})"}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ABSENT


def _source_digest(folder: Path) -> str:
    """Digest of the source below a folder: checkouts of one version may differ."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder).as_posix()}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def software_problem(here: dict[str, str], there: dict[str, str], machine: str) -> str:
    """What differs on a machine from the driver's, with the remedy; empty if nothing does.

    Args:
        machine: its name, for the message.
    """
    lines = [
        f"{name} {there.get(name, ABSENT)} there and {version} on the driver's machine"
        for name, version in here.items()
        if there.get(name, ABSENT) != version
    ]
    if not lines:
        return ""
    return (
        f"machine {machine} has other software: {'; '.join(lines)}; results would depend on the machine. Install the"
        " same versions on all machines, or select those that have them by runtime.resources.label_selector"
    )

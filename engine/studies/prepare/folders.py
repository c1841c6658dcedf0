"""Where artefacts go."""

from __future__ import annotations

import os
from pathlib import Path

from engine.data.stores.base import Store
from engine.data.stores.built_output import check_writable_output
from engine.data.stores.folder import FolderStore
from engine.data.stores.opening import is_object_address, open_store
from engine.errors import OutputError
from engine.job.spec import JobSpec
from engine.models.artefact_documents import kind_of
from engine.models.configurations import ARTEFACT_DOCUMENT

CONDITIONING = kind_of(ARTEFACT_DOCUMENT)


def artefact_folder(job: JobSpec, kind: str = CONDITIONING) -> Path:
    """Where a job's artefacts of a kind go by default: `OUTPUT-KIND`, next to its output.

    Raises:
        OutputError: an output on an object store.
    """
    store = open_store(job.output.uri)
    if not isinstance(store, FolderStore):
        raise OutputError(
            f"output.uri: {store.uri} is on an object store, and a job reads artefacts from folders; give a folder or"
            " an address with --output, and copy the artefact to every machine with workers"
        )
    return store.root.with_name(f"{store.root.name}-{kind}")


def open_home(job: JobSpec, output: str | None, kind: str = CONDITIONING) -> Path | Store:
    """Where an artefact goes: a folder, or the store of an address; checked before the pass.

    Args:
        output: the folder or address; `artefact_folder(job, kind)` where not given.

    Raises:
        OutputError: it cannot be written to.
    """
    if output is not None and is_object_address(output):
        store = open_store(output)
        check_writable_output(store)
        return store
    folder = Path(output).expanduser() if output is not None else artefact_folder(job, kind)
    check_writable(folder)
    return folder


def artefact_address(home: Path | Store, path: Path) -> str:
    """The address of an artefact to show, by its home and its folder, or that of its copy."""
    return home.address(path.name) if isinstance(home, Store) else str(path)


def check_writable(folder: Path) -> None:
    """Check before the pass that the artefact can be written after it.

    Raises:
        OutputError: the folder, or the nearest one above it that exists, is a file or not writable.
    """
    nearest = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path))
    if not nearest.is_dir():
        raise OutputError(f"--output: {nearest} is a file, not a folder; choose another")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise OutputError(f"--output: {nearest} is not writable; change the permissions or choose another")

"""Checks of the folder or file that a study's results replace."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from engine.data.stores.base import Store
from engine.data.stores.built_output import check_writable_output, occupying_names
from engine.data.stores.file_errors import explained
from engine.data.stores.opening import is_object_address, open_store
from engine.errors import OutputError, StoreLostError
from engine.methods.strict_json import parse_json
from engine.models.untrusted_files import MAX_DOCUMENT_BYTES, read_whole

MAX_SHOWN = 5


def check_results(output: str, document: str, parts: tuple[str, ...], study: str) -> None:
    """As `check_folder`, of a folder or an address of an object store.

    Raises:
        OutputError: as there, or the store refuses.
    """
    if not is_object_address(output):
        check_folder(Path(output).expanduser(), document, parts, study)
        return
    store = open_store(output)
    names = occupying_names(store, study)
    foreign = [name for name in names if name not in parts]
    if foreign or (names and not _is_result_at(store, document, study)):
        raise OutputError(_foreign(store.uri, foreign or names, study))
    check_writable_output(store)


def check_folder(home: Path, document: str, parts: tuple[str, ...], study: str) -> None:
    """Check before the work that its results can be written after it.

    Args:
        document: name of the JSON file whose field `study` identifies the folder.
        parts: names of all files and folders that the study writes.

    Raises:
        OutputError: it is a file, is not writable, or holds files that no earlier run of the study has written.
    """
    if os.path.lexists(home) and not home.is_dir():
        raise OutputError(f"--output: {home} is a file, not a folder; choose another")
    nearest = next(path for path in (home, *home.parents) if os.path.lexists(path))
    if not nearest.is_dir():
        raise OutputError(f"--output: {nearest} is a file, not a folder; choose another")
    # A folder is replaced by renaming, which its parent has to allow.
    parent = home.parent if nearest == home else nearest
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"--output: {parent} is not writable; change the permissions or choose another")
    _check_creatable(parent)
    with explained(home):
        names = sorted(path.name for path in home.iterdir()) if home.is_dir() else []
    foreign = [name for name in names if name not in parts]
    if foreign or (names and not _is_result(home / document, study)):
        raise OutputError(_foreign(str(home), foreign or names, study))


def _foreign(where: str, names: list[str], study: str) -> str:
    shown = ", ".join(map(repr, names[:MAX_SHOWN]))
    return f"--output: {where} holds files that no earlier `riskforge {study}` has left there ({shown}); choose another"


def _check_creatable(parent: Path) -> None:
    """Create a folder and remove it: some file systems report that they are writable and are not."""
    probe = parent / f".riskforge-{secrets.token_hex(4)}"
    try:
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        raise OutputError(f"--output: nothing can be created in {parent} ({error.strerror}); choose another") from None


def _is_result_at(store: Store, document: str, study: str) -> bool:
    try:
        return bool(parse_json(store.read(document))["study"] == study)
    except StoreLostError:
        raise
    except (OutputError, ValueError, KeyError, TypeError):
        return False


def _is_result(document: Path, study: str) -> bool:
    try:
        return bool(parse_json(read_whole(document, MAX_DOCUMENT_BYTES))["study"] == study)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def check_replaces(option: str, path: Path, beginning: str) -> None:
    """Check that a file to write does not exist, is empty, or begins like the files that this option writes.

    Raises:
        OutputError: it is another file, such as one of a run, which would be lost.
    """
    if path.is_dir():
        raise OutputError(f"{option}: {path} is a folder; name a file")
    if not path.is_file():
        return
    with explained(path), path.open("rb") as file:
        first_bytes = file.read(len(beginning.encode()))
    if first_bytes and first_bytes != beginning.encode():
        raise OutputError(f"{option}: {path} is there already and was not written by this option; choose another name")

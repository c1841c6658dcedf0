"""The folder or file of a study's results: what may be in its place before it."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from engine.data.stores.file_errors import explained
from engine.errors import OutputError
from engine.methods.strict_json import parse_json
from engine.models.untrusted_files import MAX_DOCUMENT_BYTES, read_whole

MAX_SHOWN = 5


def check_folder(home: Path, document: str, parts: tuple[str, ...], study: str) -> None:
    """Find out before the work what would stop its results after it.

    Args:
        document: name of the JSON file that says by `study` what the folder is.
        parts: all names that a study leaves.

    Raises:
        OutputError: a file is in the place, it is not writable, or holds what no earlier study has left there.
    """
    if os.path.lexists(home) and not home.is_dir():
        raise OutputError(f"--output: {home} is a file, not a folder; choose another")
    nearest = next(one for one in (home, *home.parents) if os.path.lexists(one))
    if not nearest.is_dir():
        raise OutputError(f"--output: {nearest} is a file, not a folder; choose another")
    # A folder is replaced by renaming, which its parent has to allow.
    place = home.parent if nearest == home else nearest
    if not os.access(place, os.W_OK | os.X_OK):
        raise OutputError(f"--output: {place} is not writable; change the permissions or choose another")
    _try_out(place)
    with explained(home):
        names = sorted(one.name for one in home.iterdir()) if home.is_dir() else []
    foreign = [name for name in names if name not in parts]
    if foreign or (names and not _is_result(home / document, study)):
        shown = ", ".join(map(repr, (foreign or names)[:MAX_SHOWN]))
        raise OutputError(
            f"--output: {home} holds files that no earlier `riskforge {study}` has left there ({shown}); choose another"
        )


def _try_out(place: Path) -> None:
    """Make a folder and remove it: some file systems say that they are writable and are not."""
    probe = place / f".riskforge-{secrets.token_hex(4)}"
    try:
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        raise OutputError(f"--output: nothing can be made in {place} ({error.strerror}); choose another") from None


def _is_result(document: Path, study: str) -> bool:
    try:
        return bool(parse_json(read_whole(document, MAX_DOCUMENT_BYTES))["study"] == study)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def check_replaces(option: str, path: Path, beginning: str) -> None:
    """Check that a file to write is not there, is empty, or begins as what `compare` writes under this option.

    Raises:
        OutputError: it is something else, such as a file of a run, which would be lost.
    """
    if path.is_dir():
        raise OutputError(f"{option}: {path} is a folder; name a file")
    if not path.is_file():
        return
    with explained(path), path.open("rb") as file:
        found = file.read(len(beginning.encode()))
    if found and found != beginning.encode():
        raise OutputError(f"{option}: {path} is there already and was not written by this option; choose another name")

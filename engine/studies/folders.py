"""The folder of a study's results: built beside its place and renamed, so that it is whole or not there."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from engine.dataset.store import explained
from engine.errors import OutputError

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
    nearest = next(one for one in (home, *home.parents) if one.is_dir())
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


@contextlib.contextmanager
def fresh_folder(home: Path) -> Iterator[Path]:
    """An empty folder to build in, which takes the place of `home` at the end of the block, or leaves nothing behind.

    Raises:
        OutputError: the file system refuses.
    """
    built = home.with_name(f".{home.name}-{secrets.token_hex(4)}")
    with explained(home):
        try:
            built.mkdir(parents=True)
            yield built
            _swap(built, home)
        finally:
            shutil.rmtree(built, ignore_errors=True)


def _try_out(place: Path) -> None:
    """Make a folder and remove it: some file systems say that they are writable and are not."""
    probe = place / f".riskforge-{secrets.token_hex(4)}"
    try:
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        raise OutputError(f"--output: nothing can be made in {place} ({error.strerror}); choose another") from None


def _swap(built: Path, home: Path) -> None:
    """Put a folder in the place of another; interrupted, the old one is back or the new one there."""
    if not home.exists():
        built.rename(home)
        return
    aside = built.with_name(f"{built.name}-old")
    try:
        home.rename(aside)
        built.rename(home)
    except BaseException:
        if aside.exists() and not home.exists():
            aside.rename(home)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _is_result(document: Path, study: str) -> bool:
    try:
        return bool(json.loads(document.read_text(encoding="utf-8"))["study"] == study)
    except (OSError, ValueError, KeyError, TypeError):
        return False

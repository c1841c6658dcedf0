"""Folders that are built under a temporary name and renamed, so that they are complete or absent."""

from __future__ import annotations

import contextlib
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from engine.data.stores.file_errors import explained


@contextlib.contextmanager
def fresh_folder(home: Path) -> Iterator[Path]:
    """An empty folder to build in, which replaces `home` at the end of the block, or is removed on an error.

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


def _swap(built: Path, home: Path) -> None:
    """Replace a folder by another; if interrupted, either the old or the new one is in place."""
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

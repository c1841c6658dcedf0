"""The user's cache folder: what saves work, and can be removed at any time.

`$RISKFORGE_CACHE` (empty: no cache), else `riskforge` in `$XDG_CACHE_HOME` or `~/.cache`. A file there is used only if
it belongs to the user and nobody else may write it. Imports no torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import stat
from pathlib import Path
from typing import Any

from engine.methods.strict_json import parse_json
from engine.models.untrusted_files import MAX_RECORD_BYTES, read_whole

VARIABLE = "RISKFORGE_CACHE"


def cache_file(kind: str, key: object) -> Path | None:
    """The file of something in the cache; None without a cache folder.

    Args:
        kind: name of a folder of the cache.
        key: what distinguishes it from others of its kind, as JSON takes it.
    """
    folder = os.environ.get(VARIABLE)
    if folder is None:
        folder = f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/riskforge"
    if not folder:
        return None
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
    try:
        return Path(folder).expanduser().absolute() / kind / f"{name}.json"
    except (OSError, RuntimeError, ValueError):
        return None


def read_cached(path: Path | None) -> dict[str, Any]:
    """The document of a cache file; empty where there is none that is whole and the user's own."""
    try:
        if path is None or not _is_own(path.parent, stat.S_ISDIR) or not _is_own(path, stat.S_ISREG):
            return {}
        document = parse_json(read_whole(path, MAX_RECORD_BYTES))
        return document if isinstance(document, dict) else {}
    except (OSError, ValueError):
        return {}


def write_cached(path: Path | None, document: dict[str, Any]) -> None:
    """Put a document in place as a whole, whoever else writes it; where that is not possible, nothing happens."""
    if path is None:
        return
    with contextlib.suppress(OSError, ValueError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        staged = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
        try:
            descriptor = os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(json.dumps(document).encode())
            staged.replace(path)
        finally:
            staged.unlink(missing_ok=True)


def _is_own(path: Path, is_kind: Any) -> bool:
    """Whether the user alone can have written a file, or into a folder."""
    status = path.lstat()
    return bool(
        is_kind(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    )

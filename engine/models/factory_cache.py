"""Descriptions of factories that were called before, in the user's cache folder, with what they depend on.

`$RISKFORGE_CACHE` (empty: no cache), else `riskforge` in `$XDG_CACHE_HOME` or `~/.cache`. A file there is used only if it
belongs to the user and nobody else may write it, is whole, and everything it lists is as it was. Failures are never
kept. What is loaded later is compared with its digest (`check_unchanged`). Imports no torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import JobError
from engine.methods.strict_json import parse_json
from engine.models.factories import is_factory, module_file, module_of, tried_folders, working_folders
from engine.models.factory_files import MAX_FILES, dependencies, fingerprint
from engine.models.factory_folders import FACTORY_DOCUMENT, read_factory_folder
from engine.models.program_settings import TargetSettings, parse_settings
from engine.models.untrusted_files import MAX_RECORD_BYTES, read_whole

VARIABLE = "RISKFORGE_CACHE"
CACHE_VERSION = 1
_DIGEST = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """What is known of a factory's network.

    Attributes:
        digest: of its name, settings and tensors.
        untrainable: why `retrain` cannot train it; empty where it can.
    """

    settings: TargetSettings
    digest: str
    untrainable: str


def cached_description(address: str) -> Description | None:
    """The description of a factory that was called before, if nothing that it depends on has changed."""
    path = _place(address)
    try:
        if path is None or not _is_own(path.parent, stat.S_ISDIR) or not _is_own(path, stat.S_ISREG):
            return None
        raw = parse_json(read_whole(path, MAX_RECORD_BYTES))
        if raw["version"] != CACHE_VERSION or raw["address"] != _identity(address):
            return None
        folders, states = raw["folders"], raw["depends_on"]
        if folders != [str(folder) for folder in working_folders(_factory(address))][: len(folders)]:
            return None
        if not states or any(fingerprint(name) != state for name, state in states.items()):
            return None
        return _description(raw)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, JobError):
        return None


def keep_description(address: str, description: Description, opened: set[str]) -> None:
    """Keep a description, with the present state of what it depends on; without a cache folder nothing happens.

    Args:
        opened: the files that were opened for it.
    """
    path, factory = _place(address), _factory(address)
    file = module_file(module_of(factory)[0])
    if path is None or file is None:
        return
    folders = tried_folders(factory)
    depends_on = dependencies(file, folders, {*opened, *_stored_files(address)})
    if len(depends_on) > MAX_FILES:
        return
    document = {
        "version": CACHE_VERSION,
        "address": _identity(address),
        "folders": [str(folder) for folder in folders],
        "settings": description.settings.model_dump(mode="json"),
        "digest": description.digest,
        "untrainable": description.untrainable,
        "depends_on": depends_on,
    }
    with contextlib.suppress(OSError, ValueError):
        _write(path, json.dumps(document).encode())


def check_unchanged(address: str, digest: str) -> None:
    """Check that a factory's network is the one that its description is of.

    Raises:
        JobError: it is another, though nothing that it was seen to depend on has changed.

    Side effects: such a description is removed.
    """
    description = cached_description(address)
    if description is None or description.digest == digest:
        return
    if (path := _place(address)) is not None:
        with contextlib.suppress(OSError):
            path.unlink()
    raise JobError(
        f"'{address}' has other weights than when it was checked before, though its files are the same; the check is"
        " forgotten: give the command again"
    )


def _description(raw: dict[str, Any]) -> Description:
    digest, untrainable = raw["digest"], raw["untrainable"]
    if not (isinstance(digest, str) and _DIGEST.fullmatch(digest) and isinstance(untrainable, str)):
        raise ValueError("no description")
    return Description(settings=parse_settings(raw["settings"], ""), digest=digest, untrainable=untrainable[:1000])


def _factory(address: str) -> str:
    """The factory that an address names, itself or by the document of its folder."""
    stored = None if is_factory(address) else read_factory_folder(address)
    return stored.factory if stored else address


def _stored_files(address: str) -> list[str]:
    stored = read_factory_folder(address)
    return [str(path.resolve()) for path in (stored.weights, stored.folder / FACTORY_DOCUMENT)] if stored else []


def _identity(address: str) -> list[str]:
    """What distinguishes factories of one name: the file, and the folder of the weights."""
    file = module_file(module_of(_factory(address))[0])
    return [_factory(address), str(file), *_stored_files(address)]


def _place(address: str) -> Path | None:
    """The file of a description; None without a cache folder."""
    folder = os.environ.get(VARIABLE)
    if folder is None:
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        folder = f"{base}/riskforge"
    if not folder:
        return None
    try:
        name = hashlib.sha256(json.dumps(_identity(address)).encode()).hexdigest()[:32]
        return Path(folder).expanduser().absolute() / "factories" / f"{name}.json"
    except (OSError, RuntimeError, ValueError, JobError):
        return None


def _is_own(path: Path, is_kind: Any) -> bool:
    """Whether the user alone can have written a file, or into a folder."""
    status = path.lstat()
    return bool(
        is_kind(status.st_mode)
        and status.st_uid == os.geteuid()
        and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    )


def _write(path: Path, data: bytes) -> None:
    """Put a file in place as a whole, whoever else writes it."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    staged = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
    try:
        descriptor = os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)

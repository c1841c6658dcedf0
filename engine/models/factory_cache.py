"""Descriptions of factories that were called before, in the user's cache folder, with what they depend on.

A description is used only if it is whole (`engine.models.user_cache`) and everything that it lists is as it was.
Failures are never kept. What is loaded later is compared with its digest (`check_unchanged`). Imports no torch.
"""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import JobError
from engine.models.factories import import_folders, is_factory, module_file, module_of, tried_folders, working_folders
from engine.models.factory_files import MAX_FILES, are_as_loaded, dependencies, fingerprint
from engine.models.factory_folders import FACTORY_DOCUMENT, read_factory_folder
from engine.models.program_settings import TargetSettings, parse_settings
from engine.models.user_cache import cache_file, read_cached, write_cached

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
    try:
        raw = read_cached(_place(address))
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
    factory, place = _factory(address), _place(address)
    # Without a place to keep it, nothing that it depends on is looked for.
    if place is None or (file := module_file(module_of(factory)[0])) is None or not are_as_loaded():
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
    write_cached(place, document)


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
    return cache_file("factories", _identity(address))


def keep_import_folders(run: str) -> None:
    """Remember for a run where its factories are imported from, for commands that have no job file.

    In the user's cache and not in the run, which may be of others: a run must not say where code is.
    """
    if folders := import_folders():
        write_cached(cache_file("imports", run), {"folders": list(folders)})


def kept_import_folders(run: str) -> list[Path]:
    """The folders that a run's factories were imported from on this machine."""
    folders = read_cached(cache_file("imports", run)).get("folders")
    return [Path(folder) for folder in folders if isinstance(folder, str)] if isinstance(folders, list) else []

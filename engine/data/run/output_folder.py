"""Whether a folder can be the output of a run: not of the system, not a home, without foreign files."""

from __future__ import annotations

import os
from pathlib import Path

from engine.data.run.file_names import PLANS, SUCCESS
from engine.data.run.foreign_files import check_unused
from engine.data.stores.base import Store
from engine.data.stores.folder import FolderStore
from engine.errors import OutputError

# No files of users are in them, at any depth.
_SYSTEM_TREES = (
    "/bin", "/boot", "/dev", "/etc", "/lib", "/lib32", "/lib64", "/libx32", "/lost+found", "/proc", "/run", "/sbin",
    "/sys", "/usr", "/System", "/Library", "/Applications", "/private/etc",
)  # fmt: skip
# In these, users have folders of their own.
_EXEMPT = ("/dev/shm", "/run/user", "/run/media", "/usr/local", "/usr/src", "/usr/home")
# Folders that hold those of users or programs, and are not outputs themselves.
_PARENTS = (
    "/", "/home", "/root", "/Users", "/tmp", "/var", "/var/tmp", "/var/lib", "/var/log", "/var/cache", "/var/spool",
    "/opt", "/srv", "/mnt", "/media", "/usr/local", "/usr/src", "/usr/home", "/dev/shm", "/run/user", "/run/media",
    "/private", "/private/tmp", "/private/var",
)  # fmt: skip
_REMEDY = "choose another --output, such as runs/NAME"
# Where Ray puts the `--working-dir` of a job that was submitted, on one machine, as long as it runs.
_SUBMITTED = "/runtime_resources/working_dir_files/"


def check_output(store: Store) -> None:
    """Refuse an output that cannot, or should not, hold a run, by its path and its folder; writes nothing.

    An existing run may stay where it is. Object stores are not checked.

    Raises:
        OutputError: with the reason and the remedy.
    """
    if not isinstance(store, FolderStore) or store.list(PLANS):
        _check_writable_run(store)
        return
    folder = store.place
    if problem := _forbidden(folder):
        raise OutputError(f"output {store.uri}: {problem}; {_REMEDY}")
    check_unused(store)
    above = next(path for path in (folder, *folder.parents) if path.exists())
    _check_writable(store, above, "the folder" if above == folder else f"'{above}', in which it would be made,")


def _forbidden(folder: Path) -> str:
    """Why a folder, without links in its path, is unsuitable for a run; empty where it is suitable."""
    home = _home()
    if home is not None and folder in (home, *home.parents):
        return "is the home folder, or holds it"
    if str(folder) in _PARENTS:
        return "is a folder for the folders of others"
    if _SUBMITTED in f"{folder}/":
        return "is in the working folder of a submitted job, which is removed; name a path that all machines share"
    own_trees = (*_EXEMPT, *([] if home is None or home == Path("/") else [str(home)]))
    is_exempt = any(folder.is_relative_to(tree) for tree in own_trees)
    trees = [] if is_exempt else [tree for tree in _SYSTEM_TREES if folder.is_relative_to(tree)]
    if trees:
        return f"is part of the operating system ({trees[0]})"
    return ""


def _home() -> Path | None:
    try:
        return Path.home().resolve()
    except (OSError, RuntimeError):
        return None


def _check_writable_run(store: Store) -> None:
    """A run that continues is written to; a finished one is not."""
    if not isinstance(store, FolderStore) or store.exists(SUCCESS):
        return
    _check_writable(store, store.root, "the folder of the run")


def _check_writable(store: Store, folder: Path, what: str) -> None:
    if os.access(folder, os.W_OK | os.X_OK):
        return
    is_read_only = os.statvfs(folder).f_flag & os.ST_RDONLY
    why = "is on a file system that is read-only" if is_read_only else "cannot be written to: no permission"
    raise OutputError(f"output {store.uri}: {what} {why}; change that, or {_REMEDY}")

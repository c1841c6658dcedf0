"""A run in a folder of a local or shared file system.

A file becomes visible whole or not at all: it is written and synced under `_state/staging`, on the file system of its
target, and then linked to its name, which fails where the name exists. Each process stages in a folder of its own and
holds its lock, which distinguishes the files of a killed process from those of a living one.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import stat
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path, PurePosixPath

from engine.data.stores import file_locks
from engine.data.stores.base import LOCKS, STAGING, STATE, TORN, Store
from engine.data.stores.file_errors import explained, patient
from engine.data.stores.staging import claim_folder, release_folder, remove_if_dead
from engine.errors import OutputError, StoreLostError
from engine.models.untrusted_files import MAX_DOCUMENT_BYTES, MAX_RECORD_BYTES, check_regular, read_whole


def is_there(path: Path) -> bool:
    """Whether something has this path; an impossible name is an error, not an absence."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


class FolderStore(Store):
    """A folder of a local or shared file system.

    Attributes:
        root: the folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.uri = str(root)
        self._staging: Path | None = None
        self._release: weakref.finalize[..., FolderStore] | None = None

    def __reduce__(self) -> tuple[type[FolderStore], tuple[Path]]:
        return FolderStore, (self.root,)

    @property
    def place(self) -> Path:
        """The folder without links."""
        return self.root.resolve()

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.root.name

    def address(self, name: str = "") -> str:
        """The path of a name."""
        return str(self.path(name))

    def absolute_address(self, address: str) -> str:
        """A path that may be relative to the folder, or else to the working directory."""
        path = self.root / address
        # Unlike `Path.exists`, this takes an address that no path can have for one of nothing.
        return str(path.resolve()) if "://" not in address and os.path.exists(path) else address  # noqa: PTH110

    def path(self, name: str) -> Path:
        """Where a name lies.

        Raises:
            ValueError: the name leads out of the store.
        """
        pure = PurePosixPath(name)
        if pure.is_absolute() or ".." in pure.parts:
            raise ValueError(f"{name!r} is not a name inside the store")
        return self.root / pure

    def is_there(self) -> bool:
        """Whether there is the folder."""
        return self.is_folder("")

    @patient
    def exists(self, name: str) -> bool:
        """Whether something has this name."""
        with explained(self.path(name)):
            return is_there(self.path(name))

    @patient
    def is_folder(self, name: str) -> bool:
        """Whether a folder has this name."""
        with explained(self.path(name)):
            try:
                return stat.S_ISDIR(self.path(name).stat().st_mode)
            except OSError as error:
                # A link to nothing, or to itself.
                if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                    raise
                return False

    @patient
    def read(self, name: str, max_bytes: int = MAX_DOCUMENT_BYTES) -> bytes:
        """The bytes of a file."""
        with explained(self.path(name)):
            return read_whole(self.path(name), max_bytes)

    def read_each(
        self, names: Iterable[str], max_bytes: int = MAX_RECORD_BYTES, *, listed: bool = False
    ) -> Iterator[tuple[str, bytes | OutputError]]:
        """Names and bytes of the files that are there, one at a time."""
        for name in names:
            data: bytes | OutputError
            try:
                data = self.read(name, max_bytes)
            except StoreLostError:
                raise
            except OutputError as error:
                if isinstance(error.__cause__, FileNotFoundError):
                    continue
                data = error
            yield name, data

    @patient
    def tail(self, name: str, max_bytes: int) -> bytes:
        """The end of a file."""
        with explained(self.path(name)):
            check_regular(self.path(name))
            with self.path(name).open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - max_bytes))
                return file.read(max_bytes)

    @patient
    def fetch(self, name: str, *, keep: bool = False) -> Path:
        """The file itself; a pipe or device is refused, as reading it may never end."""
        path = self.path(name)
        with explained(path), contextlib.suppress(FileNotFoundError, NotADirectoryError):
            for entry in path.iterdir() if path.is_dir() else [path]:
                if not entry.is_dir():
                    check_regular(entry)
        return path

    def fetch_each(self, names: Iterable[str], *, keep: bool = False) -> Iterator[Path]:
        """The files themselves."""
        return map(self.fetch, names)

    def size_of(self, names: Iterable[str]) -> int:
        """Bytes of files; for links those of their target."""
        return sum(path.stat().st_size for path in map(self.path, names) if path.exists())

    def total_size(self) -> int:
        """Bytes of all files; for links their own."""
        places = os.walk(self.root, followlinks=False)
        return sum((Path(folder) / name).lstat().st_size for folder, _, names in places for name in names)

    @patient
    def list(self, folder: str = "") -> list[str]:
        """Names in a folder, sorted, from one listing; none where there is no such folder."""
        prefix = f"{folder}/" if folder else ""
        with explained(self.path(folder)):
            try:
                with os.scandir(self.path(folder)) as entries:
                    return sorted(prefix + entry.name for entry in entries)
            except FileNotFoundError:
                return []

    def sizes(self, folder: str) -> dict[str, int]:
        """Bytes of the files in a folder by name, for links those of their target."""
        sizes: dict[str, int] = {}
        with explained(self.path(folder)):
            try:
                with os.scandir(self.path(folder)) as entries:
                    for entry in entries:
                        try:
                            if entry.is_file():
                                sizes[f"{folder}/{entry.name}"] = entry.stat().st_size
                        except OSError as error:
                            # It was removed meanwhile, or is a dangling or circular link.
                            if error.errno not in (errno.ENOENT, errno.ELOOP):
                                raise
            except FileNotFoundError:
                return {}
        return sizes

    @patient
    def publish(self, name: str, data: bytes | Path) -> bool:
        """Make a file visible under its name if the name is free.

        Args:
            data: the bytes, or a file that stays where it is; a file from `staging()` is not copied.

        Returns:
            Whether these bytes are now there by this or an earlier call; False where another file has the name.
        """
        target = self.path(name)
        with self._file_of(data) as source, explained(target):
            try:
                _with_parent(target, lambda: os.link(source, target))
            except FileExistsError:
                # A network file system may report its own link, when the response was lost and the request repeated.
                return source.samefile(target)
            sync(target.parent)
        return True

    @patient
    def replace(self, name: str, data: bytes | Path) -> None:
        """Create or overwrite a file atomically. For files that are regenerated each time."""
        target = self.path(name)
        with self._file_of(data) as source, explained(target):
            _with_parent(target, lambda: source.replace(target))
            sync(target.parent)

    @patient
    def append(self, name: str, text: str) -> None:
        """Add to the end of a file; visible at once."""
        path = self.path(name)
        with explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                check_regular(path)
            with path.open("a", encoding="utf-8") as file:
                file.write(text)

    def flush(self, *, if_due: bool = False) -> None:
        """Everything is visible already."""

    def remove_all(self, names: Iterable[str]) -> None:
        """Remove files, one after the other."""
        for name in names:
            self.remove(name)

    @patient
    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        with explained(self.path(name)):
            self.path(name).unlink(missing_ok=True)

    @patient
    def remove_tree(self, name: str) -> None:
        """Remove a folder and all in it, or a file, if it is there; of a link only the link."""
        path = self.path(name)
        with explained(path):
            if path.is_symlink():
                path.unlink()
            elif path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    @patient
    def set_aside(self, name: str) -> None:
        """Move an incomplete file out of the way, under `_state/torn`, if it is there."""
        source = self.path(name)
        target = self.path(f"{TORN}/{source.name}.{secrets.token_hex(4)}")
        with explained(source):
            target.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):
                source.rename(target)

    def staging(self) -> Path:
        """This process's folder for unfinished files, on the file system of the output."""
        if self._staging is None or not self._staging.is_dir():
            with explained(self.path(STAGING)):
                self._staging, descriptor = claim_folder(self.path(STAGING))
            self._release = weakref.finalize(self, release_folder, self._staging, descriptor, os.getpid())
        return self._staging

    def leave(self) -> None:
        """Remove the empty folders that staging made: a folder without a run does not need them."""
        if self._release is not None:
            self._release()
        for name in (STAGING, STATE):
            with contextlib.suppress(OSError):
                self.path(name).rmdir()

    def clean_staging(self) -> None:
        """Remove the unfinished files of processes that have ended."""
        folder = self.path(STAGING)
        with explained(folder):
            for name in {Path(entry).name.removesuffix(".lock") for entry in self.list(STAGING)}:
                remove_if_dead(folder / name)

    def lock(self, name: str) -> AbstractContextManager[None]:
        """Hold a lock between processes; it ends with the process that holds it.

        Where the file system has no locks the block runs without one.
        """
        return file_locks.lock(self.path(f"{LOCKS}/{name}"))

    def try_lock(self, name: str, holder: str) -> AbstractContextManager[str]:
        """Hold a lock between processes if it is free; it ends with the process, its file with the block.

        Gives an empty text, or the text of the holder where another process holds it. Where the file system has no
        locks the block runs without one.

        Args:
            holder: who this is, to be written into the lock.
        """
        return file_locks.try_lock(self.path(f"{LOCKS}/{name}"), holder)

    @contextlib.contextmanager
    def _file_of(self, data: bytes | Path) -> Iterator[Path]:
        """A synced file with the data on the store's file system; removed afterwards if it was made here."""
        if isinstance(data, Path) and data.is_relative_to(self.root):
            with explained(data):
                sync(data)
            yield data
            return
        temporary = self.staging() / f"{secrets.token_hex(8)}.tmp"
        try:
            with explained(temporary):
                if isinstance(data, Path):
                    shutil.copyfile(data, temporary)
                else:
                    temporary.write_bytes(data)
                sync(temporary)
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)


def _with_parent(target: Path, action: Callable[[], object]) -> None:
    """Do what needs the target's folder, and create the folder only where it turns out to be missing."""
    try:
        action()
    except FileNotFoundError:
        target.parent.mkdir(parents=True, exist_ok=True)
        action()


def sync(path: Path) -> None:
    """Write a file's bytes, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems do not sync folders.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)

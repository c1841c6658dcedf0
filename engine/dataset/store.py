"""Where a run is stored: names to bytes, published once and never overwritten.

A `Store` is a folder (`FolderStore`, here) or lies in an object store (`engine.dataset.object_store`).

In a folder a file becomes visible whole or not at all: it is written and synced under `_state/staging`, on the file
system of its target, and then linked to its name, which fails where the name exists. Each process stages in a folder of
its own and holds a lock beside it, so that what a killed process left is told from what a living one is writing.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import os
import random
import re
import secrets
import shutil
import stat
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path, PurePath, PurePosixPath
from typing import ParamSpec, TypeVar
from urllib.parse import unquote, urlsplit

from engine.errors import OutputError, StoreLostError
from engine.files import MAX_DOCUMENT_BYTES, MAX_RECORD_BYTES, UnsuitableFileError, check_regular, read_whole

Parameters = ParamSpec("Parameters")
Answer = TypeVar("Answer")

STATE = "_state"
STAGING = "_state/staging"
TORN = "_state/torn"
LOCKS = "_state/locks"
DRIVER_LOCK = "driver"
LEASES = "_state/lease"
EVENTS = "_state/events"
MAX_HOLDER_BYTES = 1000
OBJECT_SCHEMES = ("s3", "gs", "gcs")

_KEPT = "what is committed is kept, and the same command continues from there"
_REMEDIES: dict[int, str] = {
    errno.ENOSPC: f"the disk is full; free some space and run again ({_KEPT})",
    errno.EDQUOT: f"the disk quota is used up; free some space and run again ({_KEPT})",
    errno.EFBIG: "the file is larger than this file system or the limit of the process allows; use fewer "
    "samples_per_shard",
    errno.EROFS: "the file system is read-only; make it writable or choose another --output",
    errno.EACCES: "no permission; change the permissions or choose another --output",
    errno.EPERM: "not permitted; the folder must be writable and its file system must have hard links, "
    "otherwise choose another --output",
    errno.EOPNOTSUPP: "the file system has no hard links, which publishing needs; choose another --output",
    errno.EXDEV: "lies on another file system than the rest of the output; an output must be on one",
    errno.ENOTDIR: "a part of the path is a file, not a folder; choose another --output",
    errno.EEXIST: "a file is in the place of a folder; choose another --output",
    errno.EISDIR: "a folder is in the place of a file; move it away or choose another --output",
    errno.ENAMETOOLONG: "the path is too long; choose a shorter --output",
    errno.ENOENT: "there is no such file or folder",
    errno.ELOOP: "a link leads to itself; remove it or choose another --output",
}
# A shared file system that is away for a while, which another try may find again.
_LOST = {
    errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH,
    errno.ENETRESET, errno.ECONNABORTED, errno.ECONNREFUSED, errno.ECONNRESET, errno.ENOTCONN, errno.ESHUTDOWN,
    errno.EREMOTEIO,
}  # fmt: skip


# Pauses between the tries of what such a file system does not do.
LOST_WAITS = (0.2, 1.0, 3.0, 8.0)

# Folders of this process with copies of objects, each with the address that its files are copies of.
COPIES: dict[Path, str] = {}


def shown(path: Path | str) -> str:
    """A path for messages: of a copy, the address of the object."""
    if isinstance(path, Path):
        for folder, uri in list(COPIES.items()):
            if path.is_relative_to(folder):
                return f"{uri}/{path.relative_to(folder).as_posix()}"
    return str(path)


@contextlib.contextmanager
def explained(path: Path | str) -> Iterator[None]:
    """Turn an error of the operating system into an `OutputError` that names the path and the remedy."""
    try:
        yield
    except OSError as error:
        kind = StoreLostError if error.errno in _LOST else OutputError
        raise kind(f"{shown(path)}: {remedy_of(error)}") from error


def is_no_file(error: OutputError) -> bool:
    """Whether an error is that something else stands in the place of a file: a pipe, a device, a link to itself."""
    cause = error.__cause__
    return isinstance(cause, UnsuitableFileError) or (isinstance(cause, OSError) and cause.errno == errno.ELOOP)


def remedy_of(error: OSError) -> str:
    """What to do about an error of the operating system."""
    if error.errno in _LOST:
        return f"the file system does not answer ({error.strerror}); see to its mount ({_KEPT})"
    return _REMEDIES.get(error.errno or 0) or error.strerror or str(error)


def pause(seconds: float) -> None:
    """Wait for about so long, so that processes that failed together do not try again together."""
    time.sleep(seconds * (0.75 + random.random() / 2))


def patient(method: Callable[Parameters, Answer]) -> Callable[Parameters, Answer]:
    """A method of a store that is tried again where the file system is away for a while.

    Each leaves things as they were or as they should be, so that another try does no harm.
    """

    @functools.wraps(method)
    def again(*arguments: Parameters.args, **options: Parameters.kwargs) -> Answer:
        for wait in LOST_WAITS:
            try:
                return method(*arguments, **options)
            except StoreLostError:
                pause(wait)
        return method(*arguments, **options)

    return again


def open_store(uri: str) -> Store:
    """The store of an output address. Nothing is created before something is written.

    Args:
        uri: a folder, its `file://` address, or a folder of an object store: `s3://BUCKET/NAME`, `gs://BUCKET/NAME`.

    Raises:
        OutputError: an address that this version does not store to, or a file in the place of the folder.
    """
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", uri)
    if scheme and scheme[1].lower() in OBJECT_SCHEMES:
        from engine.dataset.object_store import open_object_store

        return open_object_store(uri)
    if mistyped := re.match(r"(s3|gs|gcs):", uri, re.IGNORECASE):
        raise OutputError(
            f"output {uri}: would be a folder called {mistyped[0]}; write {mistyped[1].lower()}://BUCKET/NAME"
        )
    if scheme and scheme[1].lower() != "file":
        raise OutputError(
            f"output {uri}: {scheme[1]}:// is not supported; use a folder, s3://BUCKET/NAME or gs://BUCKET/NAME"
        )
    if scheme:
        parts = urlsplit(uri)
        if parts.netloc not in ("", "localhost"):
            raise OutputError(
                f"output {uri}: names the host {parts.netloc.rpartition('@')[2]!r}; write file:///absolute/path"
            )
        uri = unquote(parts.path)
    if "\0" in uri:
        raise OutputError(f"output {uri!r}: holds a character that no path has; choose another --output")
    try:
        with explained(f"output {uri}"):
            root = Path(uri).expanduser().absolute()
            there = next(one for one in (root, *root.parents) if _is_there(one))
            if there != root and not there.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, "")
            is_file = there == root and not root.is_dir()
    except RuntimeError as error:
        raise OutputError(f"output {uri}: names the home folder of nobody ({error}); choose another --output") from None
    if is_file:
        raise OutputError(f"output {root}: is a file, not a folder; choose another --output")
    return FolderStore(root)


def refuse_objects(uri: str, option: str, what: str) -> None:
    """Refuse an address of an object store, for what is written to folders alone.

    Args:
        what: it, in words.

    Raises:
        OutputError: it is one.
    """
    if uri.partition("://")[0].lower() in OBJECT_SCHEMES and "://" in uri:
        raise OutputError(
            f"{option} {uri}: {what} is written to folders alone; give a folder, and copy it from there, such as with"
            " `aws s3 sync`"
        )


def _is_there(path: Path) -> bool:
    """Whether something has this path; a name that can be nobody's is an error, not an absence."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


class Store(ABC):
    """Where a run is stored. Names are relative, with `/` between their parts.

    Every method raises `OutputError`, naming address and remedy, where the file system or the object store refuses.

    Attributes:
        uri: its address; `open_store` opens it anywhere.
    """

    uri: str

    def __reduce__(self) -> tuple[Callable[[str], Store], tuple[str]]:
        return open_store, (self.uri,)

    # Names ---------------------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def place(self) -> PurePath:
        """What tells whether two stores are one, or one in the other; for comparing alone."""

    @property
    def name(self) -> str:
        """The last part of its address."""
        return self.place.name

    @abstractmethod
    def address(self, name: str = "") -> str:
        """Where a name lies, for people and for `open_store`.

        Raises:
            ValueError: the name leads out of the store.
        """

    @abstractmethod
    def beside(self, address: str) -> str:
        """An address that may be relative to this store, made absolute where something is there."""

    # Reading -------------------------------------------------------------------------------------------------------

    @abstractmethod
    def is_there(self) -> bool:
        """Whether there is such a folder."""

    @abstractmethod
    def exists(self, name: str) -> bool:
        """Whether something has this name."""

    @abstractmethod
    def is_folder(self, name: str) -> bool:
        """Whether a folder has this name."""

    @abstractmethod
    def read(self, name: str, max_bytes: int = MAX_DOCUMENT_BYTES) -> bytes:
        """The bytes of a file; an `OutputError` caused by a `FileNotFoundError` where there is none.

        Args:
            max_bytes: a larger file is refused.
        """

    @abstractmethod
    def read_each(
        self, names: Iterable[str], max_bytes: int = MAX_RECORD_BYTES
    ) -> Iterator[tuple[str, bytes | OutputError]]:
        """Names and bytes of many small files in their order; those that are not there any more are left out.

        Of a file that cannot be read as one, such as a larger one, the error comes in the place of its bytes.
        """

    @abstractmethod
    def tail(self, name: str, max_bytes: int) -> bytes:
        """The end of a file; as `read` otherwise."""

    @abstractmethod
    def fetch(self, name: str, *, keep: bool = False) -> Path:
        """A local file with the bytes, or a local folder with the files of one; to be read, not written.

        Nothing is at the path where there is no such file.

        Args:
            keep: whether the file may be opened long after; others may be gone once some dozens were fetched.
        """

    @abstractmethod
    def fetch_each(self, names: Iterable[str], *, keep: bool = False) -> Iterator[Path]:
        """As `fetch` for many names, in their order, some ahead of time."""

    @abstractmethod
    def list(self, folder: str = "") -> list[str]:
        """Names in a folder, sorted, from one listing; none where there is no such folder."""

    @abstractmethod
    def sizes(self, folder: str) -> dict[str, int]:
        """Bytes of the files in a folder by name, from one listing; none where there is no such folder."""

    @abstractmethod
    def size_of(self, names: Iterable[str]) -> int:
        """Bytes of files together; those that are not there count nothing."""

    @abstractmethod
    def total_size(self) -> int:
        """Bytes of all files."""

    # Writing -------------------------------------------------------------------------------------------------------

    @abstractmethod
    def publish(self, name: str, data: bytes | Path) -> bool:
        """Make a file visible under its name if the name is free.

        Args:
            data: the bytes, or a file that stays where it is; a file from `staging()` is not copied.

        Returns:
            Whether these bytes are now there by this or an earlier call; False where another file has the name.
        """

    @abstractmethod
    def replace(self, name: str, data: bytes | Path) -> None:
        """Put a file in the place of whatever has its name, atomically. For the files that are made anew each time."""

    @abstractmethod
    def append(self, name: str, text: str) -> None:
        """Add to the end of a file that this process alone writes; it may be seen later, by `flush` at the latest."""

    @abstractmethod
    def flush(self, *, if_due: bool = False) -> None:
        """Let everybody see what was appended.

        Args:
            if_due: whether only what has waited for long, without waiting for it or for its errors.
        """

    @abstractmethod
    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""

    @abstractmethod
    def remove_all(self, names: Iterable[str]) -> None:
        """Remove files, if they are there."""

    @abstractmethod
    def remove_tree(self, name: str) -> None:
        """Remove a folder and all in it, or a file, if it is there; of a link only the link."""

    @abstractmethod
    def set_aside(self, name: str) -> None:
        """Move a file that is not whole out of the way, under `_state/torn`, if it is there."""

    # Processes -----------------------------------------------------------------------------------------------------

    @abstractmethod
    def staging(self) -> Path:
        """This process's local folder for unfinished files."""

    @abstractmethod
    def leave(self) -> None:
        """Remove the empty folders that staging made: in a folder that is no run nothing needs them."""

    @abstractmethod
    def clean_staging(self) -> None:
        """Remove the unfinished files of processes that are no more."""

    @abstractmethod
    def lock(self, name: str) -> AbstractContextManager[None]:
        """Hold a lock between processes; it ends with the process that holds it.

        Where there are no locks the block runs without one.
        """

    @abstractmethod
    def try_lock(self, name: str, holder: str) -> AbstractContextManager[str]:
        """Hold a lock between processes if it is free; it ends with the process that holds it, its file with the block.

        Gives an empty text, or what the holder wrote where that is another. Where there are no locks the block runs
        without one.

        Args:
            holder: who this is, to be written into the lock.
        """


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file of a store, which is fetched when it is read."""

    store: Store
    name: str

    def __str__(self) -> str:
        return self.store.address(self.name)

    def fetch(self, *, keep: bool = False) -> Path:
        """A local file with the bytes, as `Store.fetch`."""
        return self.store.fetch(self.name, keep=keep)


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

    def beside(self, address: str) -> str:
        """A path that may be relative to the folder, or else to where one is."""
        beside = self.root / address
        return str(beside.resolve()) if "://" not in address and beside.exists() else address

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
            return _is_there(self.path(name))

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
        self, names: Iterable[str], max_bytes: int = MAX_RECORD_BYTES
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
        """The file itself; what is neither a file nor a folder is refused, as reading it may never end."""
        path = self.path(name)
        with explained(path), contextlib.suppress(FileNotFoundError, NotADirectoryError):
            for one in path.iterdir() if path.is_dir() else [path]:
                if not one.is_dir():
                    check_regular(one)
        return path

    def fetch_each(self, names: Iterable[str], *, keep: bool = False) -> Iterator[Path]:
        """The files themselves."""
        return map(self.fetch, names)

    def size_of(self, names: Iterable[str]) -> int:
        """Bytes of files; of links those of what they lead to."""
        return sum(path.stat().st_size for path in map(self.path, names) if path.exists())

    def total_size(self) -> int:
        """Bytes of all files; of links those that they take themselves."""
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
        """Bytes of the files in a folder by name, of links those of what they lead to."""
        found: dict[str, int] = {}
        with explained(self.path(folder)):
            try:
                with os.scandir(self.path(folder)) as entries:
                    for entry in entries:
                        try:
                            if entry.is_file():
                                found[f"{folder}/{entry.name}"] = entry.stat().st_size
                        except OSError as error:
                            # It went meanwhile, or is a link that leads nowhere or to itself.
                            if error.errno not in (errno.ENOENT, errno.ELOOP):
                                raise
            except FileNotFoundError:
                return {}
        return found

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
                # A network file system may report a link that it made, when the answer was lost and asked again.
                return source.samefile(target)
            _sync(target.parent)
        return True

    @patient
    def replace(self, name: str, data: bytes | Path) -> None:
        """Put a file in the place of whatever has its name, atomically. For the files that are made anew each time."""
        target = self.path(name)
        with self._file_of(data) as source, explained(target):
            _with_parent(target, lambda: source.replace(target))
            _sync(target.parent)

    @patient
    def append(self, name: str, text: str) -> None:
        """Add to the end of a file; it is seen at once."""
        path = self.path(name)
        with explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                check_regular(path)
            with path.open("a", encoding="utf-8") as file:
                file.write(text)

    def flush(self, *, if_due: bool = False) -> None:
        """Everything is seen already."""

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
        """Move a file that is not whole out of the way, under `_state/torn`, if it is there."""
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
        """Remove the empty folders that staging made: in a folder that is no run nothing needs them."""
        if self._release is not None:
            self._release()
        for name in (STAGING, STATE):
            with contextlib.suppress(OSError):
                self.path(name).rmdir()

    def clean_staging(self) -> None:
        """Remove the unfinished files of processes that are no more."""
        folder = self.path(STAGING)
        with explained(folder):
            for name in {Path(entry).name.removesuffix(".lock") for entry in self.list(STAGING)}:
                remove_if_dead(folder / name)

    @contextlib.contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Hold a lock between processes; it ends with the process that holds it.

        Where the file system has no locks the block runs without one.
        """
        path = self.path(f"{LOCKS}/{name}")
        with explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    @contextlib.contextmanager
    def try_lock(self, name: str, holder: str) -> Iterator[str]:
        """Hold a lock between processes if it is free; it ends with the process that holds it, its file with the block.

        Gives an empty text, or what the holder wrote where that is another. Where the file system has no locks the
        block runs without one.

        Args:
            holder: who this is, to be written into the lock.
        """
        path = self.path(f"{LOCKS}/{name}")
        with explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor, is_free = _open_lock(path)
        try:
            if not is_free:
                yield _holder(descriptor) or "another process"
                return
            with explained(path):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, holder.encode()[:MAX_HOLDER_BYTES])
            try:
                yield ""
            finally:
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)
        finally:
            os.close(descriptor)

    @contextlib.contextmanager
    def _file_of(self, data: bytes | Path) -> Iterator[Path]:
        """A synced file with the data on the store's file system; removed afterwards if it was made here."""
        if isinstance(data, Path) and data.is_relative_to(self.root):
            with explained(data):
                _sync(data)
            yield data
            return
        temporary = self.staging() / f"{secrets.token_hex(8)}.tmp"
        try:
            with explained(temporary):
                if isinstance(data, Path):
                    shutil.copyfile(data, temporary)
                else:
                    temporary.write_bytes(data)
                _sync(temporary)
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)


def _with_parent(target: Path, action: Callable[[], object]) -> None:
    """Do what needs the target's folder, and make the folder only when it turns out to be missing."""
    try:
        action()
    except FileNotFoundError:
        target.parent.mkdir(parents=True, exist_ok=True)
        action()


def _sync(path: Path) -> None:
    """Bring a file's bytes, or a folder's names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems do not sync folders.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def claim_folder(staging: Path) -> tuple[Path, int]:
    """A new folder and the descriptor of its lock, which stays open as long as the process lives.

    The lock is taken before the folder is made, and its file is removed after the folder: a folder is dead exactly
    when its lock is free.
    """
    staging.mkdir(parents=True, exist_ok=True)
    while True:
        folder = staging / f"{os.getpid()}-{secrets.token_hex(6)}"
        descriptor = os.open(_lock_of(folder), os.O_RDWR | os.O_CREAT, 0o666)
        _flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink:
            folder.mkdir()
            return folder, descriptor
        os.close(descriptor)  # A cleaning process was faster than the lock.


def release_folder(folder: Path, descriptor: int, owner: int) -> None:
    """Leave nothing behind at a regular end; a forked child leaves its parent's folder alone."""
    if os.getpid() == owner:
        with contextlib.suppress(OSError):
            _remove(folder)
            _lock_of(folder).unlink(missing_ok=True)
        os.close(descriptor)


def remove_if_dead(folder: Path) -> None:
    """Remove a folder of `claim_folder` whose process is no more."""
    lock = _lock_of(folder)
    try:
        descriptor = os.open(lock, os.O_RDWR)
    except FileNotFoundError:
        _remove(folder)
        return
    try:
        if _flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB):
            _remove(folder)
            lock.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _open_lock(path: Path) -> tuple[int, bool]:
    """The descriptor of a lock's file, and whether the lock is ours (or nobody's, where there are none)."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK, 0o666)
        try:
            _flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, or_raise=True)
        except BlockingIOError:
            return descriptor, False
        if os.fstat(descriptor).st_nlink:
            return descriptor, True
        os.close(descriptor)  # Its last holder removed it after it was opened here.


def _holder(descriptor: int) -> str:
    """What the holder of a lock wrote into its file."""
    with contextlib.suppress(OSError):
        return os.read(descriptor, MAX_HOLDER_BYTES).decode(errors="replace")
    return ""


def _lock_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")


def _flock(descriptor: int, operation: int, *, or_raise: bool = False) -> bool:
    """Take a lock; False where it is held (or `BlockingIOError`), or where the file system has none."""
    try:
        fcntl.flock(descriptor, operation)
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS):
            raise
        if or_raise and error.errno == errno.EWOULDBLOCK:
            raise
        return False
    return True

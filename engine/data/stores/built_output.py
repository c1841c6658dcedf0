"""Outputs that are built in a local folder and then appear: a folder by one rename, an address file by file.

At an address the place is marked as unfinished before the first file is there, and its last file says that all are.
What a killed process left is known by the mark, and the same command begins again.
"""

from __future__ import annotations

import contextlib
import secrets
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from engine.data.stores.base import LEASES, STATE, Store
from engine.data.stores.conditional_put import PROBES
from engine.data.stores.folder import FolderStore
from engine.data.stores.fresh_folder import fresh_folder
from engine.data.stores.lease import hold
from engine.errors import OutputError, RiskforgeError

UNFINISHED = f"{STATE}/unfinished"
NUM_UPLOADS = 8
# Files that wait for their upload, at most: they take room on this machine.
MAX_WAITING = 32


@dataclass(frozen=True, slots=True)
class BuiltOutput:
    """A local folder to build in.

    Attributes:
        path: the folder, empty at first.
        finished: is told of a file in it that is not written, or read, any more; it may leave this machine at once.
    """

    path: Path
    finished: Callable[[Path], None]


def occupying_names(store: Store, kind: str) -> list[str]:
    """Names in the place of an output that are not the rest of an unfinished one of the same kind.

    Args:
        kind: name of the command that builds it.

    Raises:
        OutputError: the store refuses.
    """
    names = store.list()
    if isinstance(store, FolderStore) or STATE not in names:
        return names
    own = [name for name in store.list(STATE) if name not in (LEASES, PROBES)]
    if UNFINISHED in own and store.read(UNFINISHED).decode(errors="replace") == kind:
        return []
    return [name for name in names if name != STATE] + own


@contextlib.contextmanager
def built_output(
    store: Store, kind: str, last: str, notice: Callable[[str], None] = lambda text: None
) -> Iterator[BuiltOutput]:
    """A folder to build in, whose files replace what the store has at the end of the block; nothing does on an error.

    At an address they are uploaded one after the other, those that are reported as finished already within the block,
    and the earlier content goes as soon as the first one comes.

    Args:
        kind: name of the command that builds it; the rest of an unfinished one is removed.
        last: name of the file that completes it.
        notice: is given a text before waiting for the lease of a process that may be dead.

    Raises:
        OutputError: the store refuses.
        OwnedError: another process is writing to the same address.
    """
    if isinstance(store, FolderStore):
        with fresh_folder(store.root) as path:
            yield BuiltOutput(path, lambda path: None)
        return
    with _sole_writer(store, notice):
        path = Path(tempfile.mkdtemp(prefix="built-", dir=store.staging()))
        uploads = _Uploads(store, path, kind, last)
        try:
            with contextlib.closing(uploads):
                yield BuiltOutput(path, uploads.add)
                uploads.complete()
        except BaseException:
            with contextlib.suppress(RiskforgeError):
                uploads.withdraw()
            raise


@contextlib.contextmanager
def _sole_writer(store: Store, notice: Callable[[str], None]) -> Iterator[None]:
    """Hold the lease of an address, of which nothing is left afterwards."""
    lease = None
    try:
        with hold(store, notice=notice) as lease:
            yield
    finally:
        with contextlib.suppress(RiskforgeError):
            if lease is not None:
                store.remove(lease.name)
        store.leave()


class _Uploads:
    """Uploads files of a folder, several at a time, and removes them locally.

    Args:
        path: the folder.
    """

    def __init__(self, store: Store, path: Path, kind: str, last: str) -> None:
        self._store, self._path, self._kind, self._last = store, path, kind, last
        self._pool = ThreadPoolExecutor(NUM_UPLOADS, thread_name_prefix="upload")
        self._waiting: deque[Future[None]] = deque()
        self._has_begun = False

    def add(self, path: Path) -> None:
        """Upload a file, after those that wait already.

        Raises:
            OutputError: an upload failed.
        """
        self._begin()
        while len(self._waiting) >= MAX_WAITING:
            self._waiting.popleft().result()
        self._waiting.append(self._pool.submit(self._upload, path))

    def complete(self) -> None:
        """Upload what is left in the folder, the last file when all others are there.

        Raises:
            OutputError: an upload failed.
        """
        self._begin()
        # What was uploaded is not there any more.
        self._wait()
        for path in sorted(self._path.rglob("*")):
            if path.is_file() and self._name(path) != self._last:
                self.add(path)
        self._wait()
        self._upload(self._path / self._last)
        self._store.remove(UNFINISHED)

    def withdraw(self) -> None:
        """Remove what was uploaded, if anything was."""
        if self._has_begun:
            self._clear()
            self._store.remove(UNFINISHED)

    def close(self) -> None:
        """Wait for the uploads that have begun."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _wait(self) -> None:
        while self._waiting:
            self._waiting.popleft().result()

    def _begin(self) -> None:
        """Mark the place as unfinished, and empty it."""
        if not self._has_begun:
            self._has_begun = True
            self._store.replace(UNFINISHED, self._kind.encode())
            self._clear()

    def _clear(self) -> None:
        self._store.remove(self._last)
        for name in self._store.list():
            if name != STATE:
                self._store.remove_tree(name)

    def _upload(self, path: Path) -> None:
        name = self._name(path)
        if not self._store.publish(name, path):
            raise OutputError(f"{self._store.address(name)}: another process writes there, too; run again alone")
        path.unlink()

    def _name(self, path: Path) -> str:
        return path.relative_to(self._path).as_posix()


def check_writable_output(store: Store) -> None:
    """Check before the work that its results can be written to an address after it, by an object that is removed again.

    Raises:
        OutputError: the store refuses.
    """
    probe = f"{PROBES}/{secrets.token_hex(8)}"
    store.replace(probe, b"")
    store.remove(probe)

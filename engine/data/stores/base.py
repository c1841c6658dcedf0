"""The contract of a store: names to bytes, published once and never overwritten."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path, PurePath

from engine.errors import OutputError
from engine.models.untrusted_files import MAX_DOCUMENT_BYTES, MAX_RECORD_BYTES

STATE = "_state"
STAGING = "_state/staging"
TORN = "_state/torn"
LOCKS = "_state/locks"
DRIVER_LOCK = "driver"
LEASES = "_state/lease"
EVENTS = "_state/events"
MAX_HOLDER_BYTES = 1000


class Store(ABC):
    """Where a run is stored. Names are relative, with `/` between their parts.

    Every method raises `OutputError`, naming address and remedy, where the file system or the object store refuses.

    Attributes:
        uri: its address; `engine.data.stores.opening.open_store` opens it anywhere.
    """

    uri: str

    # Names ---------------------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def place(self) -> PurePath:
        """Its location as a path, to compare stores: whether they are the same, or nested."""

    @property
    def name(self) -> str:
        """The last part of its address."""
        return self.place.name

    @abstractmethod
    def address(self, name: str = "") -> str:
        """The address of a name, for messages and for `open_store`.

        Raises:
            ValueError: the name leads out of the store.
        """

    @abstractmethod
    def absolute_address(self, address: str) -> str:
        """An address that may be relative to this store, made absolute where something exists there."""

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
        self, names: Iterable[str], max_bytes: int = MAX_RECORD_BYTES, *, listed: bool = False
    ) -> Iterator[tuple[str, bytes | OutputError]]:
        """Names and bytes of many small files in their order; those that are not there any more are left out.

        For a file that cannot be read, such as one that is too large, the error is given instead of its bytes.

        Args:
            listed: the names are of a listing just made. What was read before, and is unchanged in that listing, need
                not be read again.
        """

    @abstractmethod
    def tail(self, name: str, max_bytes: int) -> bytes:
        """The end of a file; as `read` otherwise."""

    @abstractmethod
    def fetch(self, name: str, *, keep: bool = False) -> Path:
        """A local file with the bytes, or a local folder with the files of one; to be read, not written.

        Nothing is at the path where there is no such file.

        Args:
            keep: whether the file may be opened much later; others may be removed once some dozens were fetched.
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
        """Create or overwrite a file atomically; a file from `staging()` is moved. For files that are regenerated."""

    @abstractmethod
    def append(self, name: str, text: str) -> None:
        """Add to the end of a file that this process alone writes; it may be seen later, by `flush` at the latest."""

    @abstractmethod
    def flush(self, *, if_due: bool = False) -> None:
        """Make appended text visible to other processes.

        Args:
            if_due: only text that has waited long enough, in the background and without reporting errors.
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
        """Move an incomplete file out of the way, under `_state/torn`, if it is there."""

    # Processes -----------------------------------------------------------------------------------------------------

    @abstractmethod
    def staging(self) -> Path:
        """This process's local folder for unfinished files."""

    @abstractmethod
    def leave(self) -> None:
        """Remove the empty folders that staging made: a folder without a run does not need them."""

    @abstractmethod
    def clean_staging(self) -> None:
        """Remove the unfinished files of processes that have ended."""

    @abstractmethod
    def lock(self, name: str) -> AbstractContextManager[None]:
        """Hold a lock between processes; it ends with the process that holds it.

        Where there are no locks the block runs without one.
        """

    @abstractmethod
    def try_lock(self, name: str, holder: str) -> AbstractContextManager[str]:
        """Hold a lock between processes if it is free; it ends with the process, its file with the block.

        Gives an empty text, or the text of the holder where another process holds it. Where there are no locks the
        block runs without one.

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

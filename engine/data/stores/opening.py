"""The store of an address."""

from __future__ import annotations

import errno
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from engine.data.stores.base import Store
from engine.data.stores.file_errors import explained
from engine.data.stores.folder import FolderStore, is_there
from engine.errors import OutputError

OBJECT_SCHEMES = ("s3", "gs", "gcs")


def open_store(uri: str) -> Store:
    """The store of an output address. Nothing is created before something is written.

    Args:
        uri: a folder, its `file://` address, or a folder of an object store: `s3://BUCKET/NAME`, `gs://BUCKET/NAME`.

    Raises:
        OutputError: the scheme is not supported, or the path is a file.
    """
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", uri)
    scheme = match[1].lower() if match else ""
    if scheme in OBJECT_SCHEMES:
        from engine.data.stores.object_store import open_object_store

        return open_object_store(uri)
    if mistyped := re.match(r"(s3|gs|gcs):", uri, re.IGNORECASE):
        raise OutputError(
            f"output {uri}: would be a folder called {mistyped[0]}; write {mistyped[1].lower()}://BUCKET/NAME"
        )
    if match and scheme != "file":
        raise OutputError(
            f"output {uri}: {match[1]}:// is not supported; use a folder, s3://BUCKET/NAME or gs://BUCKET/NAME"
        )
    return _open_folder(_path_of(uri) if match else uri)


def _path_of(uri: str) -> str:
    """The path of a `file://` address.

    Raises:
        OutputError: it is on another host.
    """
    parts = urlsplit(uri)
    if parts.netloc not in ("", "localhost"):
        raise OutputError(
            f"output {uri}: names the host {parts.netloc.rpartition('@')[2]!r}; write file:///absolute/path"
        )
    return unquote(parts.path)


def _open_folder(path: str) -> FolderStore:
    """The store of a folder.

    Raises:
        OutputError: the path is impossible, or that of a file.
    """
    if "\0" in path:
        raise OutputError(f"output {path!r}: holds a character that no path has; choose another --output")
    try:
        with explained(f"output {path}"):
            root = Path(path).expanduser().absolute()
            existing = next(folder for folder in (root, *root.parents) if is_there(folder))
            if existing != root and not existing.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, "")
            is_file = existing == root and not root.is_dir()
    except RuntimeError as error:
        raise OutputError(
            f"output {path}: names the home folder of nobody ({error}); choose another --output"
        ) from None
    if is_file:
        raise OutputError(f"output {root}: is a file, not a folder; choose another --output")
    return FolderStore(root)


def is_object_address(uri: str) -> bool:
    """Whether this is an address of an object store, well-formed or not."""
    return "://" in uri and uri.partition("://")[0].lower() in OBJECT_SCHEMES


def refuse_objects(uri: str, option: str, what: str) -> None:
    """Refuse an address of an object store, for what is written to folders alone.

    Args:
        what: it, in words.

    Raises:
        OutputError: it is one.
    """
    if is_object_address(uri):
        raise OutputError(
            f"{option} {uri}: {what} is written to folders alone; give a folder, and copy it from there, such as with"
            " `aws s3 sync`"
        )

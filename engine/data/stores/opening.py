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
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", uri)
    if scheme and scheme[1].lower() in OBJECT_SCHEMES:
        from engine.data.stores.object_store import open_object_store

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
            existing = next(path for path in (root, *root.parents) if is_there(path))
            if existing != root and not existing.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, "")
            is_file = existing == root and not root.is_dir()
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

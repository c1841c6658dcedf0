"""Files that are ignored as they hold no image: those of operating systems and tools, and hidden ones."""

from __future__ import annotations

from pathlib import PurePosixPath

_SYSTEM = frozenset({"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "__macosx", "$recycle.bin", "__pycache__"})


def why_ignored(place: str, *, in_hidden: bool = False) -> str:
    """Why a file is ignored, by its path in a folder or a tar; empty where it is not.

    Args:
        in_hidden: whether files in folders whose names begin with a dot are read.
    """
    parts = PurePosixPath(place).parts
    for number, part in enumerate(parts):
        if part.lower() in _SYSTEM:
            return f"is a file of the operating system or a tool ({part})"
        if part.startswith(".") and part != ".." and (number == len(parts) - 1 or not in_hidden):
            return "is hidden: its name or its folder's begins with a dot"
    return ""

"""Files that hold no image and are no mistake: those of operating systems and tools."""

from __future__ import annotations

from pathlib import PurePosixPath

_SYSTEM = frozenset({"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "__macosx", "$recycle.bin", "__pycache__"})


def why_ignored(place: str, *, in_hidden: bool = False) -> str:
    """Why a file is not looked at, by its path in a folder or a tar; empty where it is.

    Args:
        in_hidden: whether files are looked at in folders whose names begin with a dot.
    """
    parts = PurePosixPath(place).parts
    for number, part in enumerate(parts):
        if part.lower() in _SYSTEM:
            return f"is a file of the operating system or a tool ({part})"
        if part.startswith(".") and part != ".." and (number == len(parts) - 1 or not in_hidden):
            return "is hidden: its name or its folder's begins with a dot"
    return ""

"""Files from outside: only regular files are read, and only up to the limit."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from engine.models.untrusted_files import UnsuitableFileError, check_regular, read_whole


def test_a_file_is_read_up_to_its_limit(tmp_path: Path) -> None:
    """Exactly the limit is allowed; the message has both numbers."""
    path = tmp_path / "a"
    path.write_bytes(b"x" * 2000)
    assert read_whole(path, 2000) == b"x" * 2000
    with pytest.raises(UnsuitableFileError, match=r"has 2,000 bytes, more than the 1,999 "):
        read_whole(path, 1999)
    path.write_bytes(b"")
    assert read_whole(path, 0) == b""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="no /proc")
def test_a_file_that_is_longer_than_its_size_is_refused() -> None:
    """Files of /proc have size 0, as has a file that grows after it was opened."""
    path = Path("/proc/self/status")
    assert read_whole(path, 2**20).startswith(b"Name:")
    with pytest.raises(UnsuitableFileError, match="has 11 bytes, more than the 10 "):
        read_whole(path, 10)


@pytest.mark.parametrize("is_linked", [False, True])
@pytest.mark.parametrize("kind", ["a folder", "a pipe", "a device", "a socket"])
def test_what_is_not_a_regular_file_is_refused_at_once(
    kind: str, is_linked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pipe without a writer would block for ever; links to such files are no better."""
    # The path of a socket may have about a hundred characters.
    monkeypatch.chdir(tmp_path)
    path = Path("/dev/zero" if kind == "a device" else "a")
    with socket.socket(socket.AF_UNIX) as listener:
        if kind == "a folder":
            path.mkdir()
        elif kind == "a pipe":
            os.mkfifo(path)
        elif kind == "a socket":
            listener.bind("a")
        if is_linked:
            Path("link").symlink_to(path.absolute())
            path = Path("link")
        for read in (check_regular, lambda path: read_whole(path, 10)):
            with pytest.raises(UnsuitableFileError, match=f"is {kind}, not a file"):
                read(path)


def test_a_missing_file_is_another_error(tmp_path: Path) -> None:
    """Callers distinguish it."""
    for read in (check_regular, lambda path: read_whole(path, 10)):
        with pytest.raises(FileNotFoundError):
            read(tmp_path / "a")

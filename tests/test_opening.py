"""Addresses of outputs: which store each opens, and which are refused."""

from __future__ import annotations

import errno
import importlib.util
from pathlib import Path

import pytest

from engine.data.stores.opening import open_store
from engine.errors import OutputError
from tests.test_resume import reopen


def test_addresses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative and file:// addresses become absolute; others say what is not there."""
    monkeypatch.chdir(tmp_path)
    assert open_store("runs/x").uri == str(tmp_path / "runs" / "x")
    assert open_store(f"file://{tmp_path}/with%20space").uri == f"{tmp_path}/with space"
    assert not list(tmp_path.iterdir()), "looking creates nothing"
    with pytest.raises(OutputError, match=r"hdfs:// is not supported; use a folder, s3://BUCKET/NAME"):
        open_store("hdfs://server/x")
    with pytest.raises(OutputError, match="names the host 'server'"):
        open_store("file://server/x")
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="is a file, not a folder"):
        open_store("file")
    with pytest.raises(OutputError, match=r"part of the path is a file.*--output"):
        reopen(tmp_path / "file" / "below")


@pytest.mark.parametrize("uri", ["~nobody-of-this-name/run", "a\0b", "x" * 5000])
def test_addresses_that_no_file_system_takes(uri: str) -> None:
    """A home of nobody, a character that no path has, a name that is too long."""
    with pytest.raises(OutputError, match="output"):
        open_store(uri)


def test_an_address_below_a_closed_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It cannot even be looked at; raised by hand, as root may look at everything."""

    def refuse(path: Path, **_: object) -> bool:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "lstat", refuse)
    with pytest.raises(OutputError, match="no permission"):
        open_store(str(tmp_path))


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("s3://bucket", "output 's3://bucket': is not of the form SCHEME://BUCKET/NAME; name a folder in a bucket"),
        ("s3:///x", "output 's3:///x': is not of the form SCHEME://BUCKET/NAME; name a folder in a bucket"),
        ("s3://b/x/../y", "output 's3://b/x/../y': holds one of * ? [ ] \\ #, a control character, or a part . or .."),
        ("s3://b/*", "output 's3://b/*': holds one of * ? [ ] \\ #, a control character, or a part . or .."),
        ("s3:/b/x", "output s3:/b/x: would be a folder called s3:; write s3://BUCKET/NAME"),
        ("GS:b/x", "output GS:b/x: would be a folder called GS:; write gs://BUCKET/NAME"),
        ("ftp://b/x", "output ftp://b/x: ftp:// is not supported; use a folder, s3://BUCKET/NAME or gs://BUCKET/NAME"),
    ],
)
def test_addresses_that_cannot_be(uri: str, message: str) -> None:
    with pytest.raises(OutputError) as caught:
        open_store(uri)
    assert str(caught.value) == message


@pytest.mark.parametrize(("uri", "library", "extra"), [("s3://b/x", "s3fs", "s3"), ("gs://b/x", "gcsfs", "gcs")])
def test_a_missing_extra(uri: str, library: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == library else found(name))
    with pytest.raises(OutputError) as caught:
        open_store(uri)
    assert (
        str(caught.value) == f"output {uri}: needs {library}, which is not installed; pip install 'riskforge[{extra}]'"
    )

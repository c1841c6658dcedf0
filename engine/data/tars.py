"""The only reader of tars: members listed with limits, whatever program wrote the archive.

Only headers are read until contents are asked for. Sizes are bounded by the file and by a limit; links, devices and
sparse files, whose contents are elsewhere or of any size, are listed as what they are and cannot be read.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

BLOCK_BYTES = tarfile.BLOCKSIZE
# Of names and other attributes in headers of their own.
MAX_HEADER_BYTES = 2**20
# Zeros after the last member that are checked; writers pad to records of 10 kB.
MAX_PADDING_BYTES = 2**20

_PLAIN = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_PAX = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
_LONG = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
_KINDS = {
    tarfile.LNKTYPE: "a hard link",
    tarfile.SYMTYPE: "a link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a pipe",
    tarfile.GNUTYPE_SPARSE: "a sparse file",
}
# Has no contents, although its header may name a size.
_EMPTY = (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE)


class DamagedTarError(Exception):
    """The archive cannot be read from here on; the text says why."""


@dataclass(frozen=True, slots=True)
class Member:
    """A member of a tar.

    Attributes:
        offset: where its contents begin, in bytes.
        size: of its contents, in bytes; all of them lie in the archive.
        is_folder: whether it is one.
        problem: what it is where it is neither a plain file nor a folder, such as `a link`; else empty.
        is_extended: whether a header with names or attributes comes before it.
    """

    name: str
    offset: int
    size: int
    is_folder: bool = False
    problem: str = ""
    is_extended: bool = False

    @property
    def is_file(self) -> bool:
        """Whether its contents can be read."""
        return not self.is_folder and not self.problem


def walk_tar(file: BinaryIO, encoding_errors: str = "surrogateescape") -> Iterator[Member]:
    """The members of an uncompressed tar in order: ustar, old, GNU or pax.

    Args:
        file: seekable; another position of it between two members does no harm.
        encoding_errors: of names that are not UTF-8, as for `bytes.decode`.

    Raises:
        DamagedTarError: a header is damaged, or the archive is cut short, or goes on after its end.
    """
    total = os.fstat(file.fileno()).st_size
    place, extended = 0, _Extended()
    while True:
        info, place = _header(file, place, encoding_errors)
        if info is None:
            break
        size = _stored_size(info, extended)
        if size < 0 or place + size > total:
            raise DamagedTarError(f"cut short inside {info.name!r}")
        if info.type in _PAX or info.type in _LONG:
            extended.read(file, place, size, info)
        else:
            yield extended.member(info, place, size)
            # A global header holds for all that follows.
            extended = _Extended()
        place += size + -size % BLOCK_BYTES
    _check_end(file, place, total)


def read_member(file: BinaryIO, member: Member) -> bytes:
    """The contents of a member that is a file.

    Raises:
        DamagedTarError: the archive is shorter than it was.
    """
    data = os.pread(file.fileno(), member.size, member.offset)
    if len(data) != member.size:
        raise DamagedTarError(f"cut short inside {member.name!r}")
    return data


class _Extended:
    """What extended headers say about the next member."""

    def __init__(self) -> None:
        self.name: str | None = None
        self.size: int | None = None
        self.is_sparse = False
        self.is_there = False

    def read(self, file: BinaryIO, place: int, size: int, info: tarfile.TarInfo) -> None:
        """Read an extended header with names and attributes."""
        if size > MAX_HEADER_BYTES:
            raise DamagedTarError(f"a header of {size} bytes; up to {MAX_HEADER_BYTES} are read")
        data = os.pread(file.fileno(), size, place)
        self.is_there = True
        if info.type == tarfile.GNUTYPE_LONGNAME:
            self.name = data.partition(b"\0")[0].decode("utf-8", "surrogateescape")
        elif info.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
            self._read_pax(data)

    def _read_pax(self, data: bytes) -> None:
        """Records `LENGTH KEY=VALUE\\n`, the length being that of the whole record (POSIX, pax)."""
        place = 0
        while place < len(data) and data[place] != 0:
            head, blank, _ = data[place : place + 20].partition(b" ")
            length = int(head) if blank and head.isdigit() else 0
            record = data[place + len(head) + 1 : place + length]
            key, equals, value = record[:-1].partition(b"=")
            if length <= len(head) + 1 or place + length > len(data) or not equals or record[-1:] != b"\n":
                raise DamagedTarError("a header with attributes is damaged")
            self._note(key, value)
            place += length

    def _note(self, key: bytes, value: bytes) -> None:
        if key == b"path":
            self.name = value.decode("utf-8", "surrogateescape")
        elif key == b"size":
            if not value.isdigit() or len(value) > 20:
                raise DamagedTarError("a header with attributes is damaged")
            self.size = int(value)
        elif key.startswith(b"GNU.sparse."):
            self.is_sparse = True

    def member(self, info: tarfile.TarInfo, place: int, size: int) -> Member:
        """The member, with the attributes of its extended headers."""
        name = info.name if self.name is None else self.name.rstrip("/")
        is_folder = info.type == tarfile.DIRTYPE
        problem = "" if info.type in _PLAIN or is_folder else _KINDS.get(info.type, "of an unknown kind")
        if self.is_sparse:
            problem = _KINDS[tarfile.GNUTYPE_SPARSE]
        return Member(name, place, size, is_folder, problem, self.is_there)


def _header(file: BinaryIO, place: int, encoding_errors: str) -> tuple[tarfile.TarInfo | None, int]:
    """The header at a place, or None at the end of the archive; and the place after it."""
    block = os.pread(file.fileno(), BLOCK_BYTES, place)
    if place == 0 and (packer := _packer(block)):
        raise DamagedTarError(f"compressed with {packer}; unpack it to a plain tar")
    if len(block) < BLOCK_BYTES:
        raise DamagedTarError("cut short: the end of the archive is missing")
    if not any(block):
        return None, place
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", encoding_errors)
    except (tarfile.HeaderError, ValueError) as error:
        raise DamagedTarError(f"a member's header is damaged ({error})") from None
    place += BLOCK_BYTES
    is_more = info.type == tarfile.GNUTYPE_SPARSE and block[482] != 0
    while is_more:
        block = os.pread(file.fileno(), BLOCK_BYTES, place)
        if len(block) < BLOCK_BYTES:
            raise DamagedTarError(f"cut short inside {info.name!r}")
        place, is_more = place + BLOCK_BYTES, block[504] != 0
    return info, place


def _stored_size(info: tarfile.TarInfo, extended: _Extended) -> int:
    """Bytes of contents that follow a header."""
    if info.type in _EMPTY:
        return 0
    is_header = info.type in _PAX or info.type in _LONG
    return info.size if is_header or extended.size is None else extended.size


def _packer(block: bytes) -> str:
    magic = {
        b"\x1f\x8b": "gzip",
        b"BZh": "bzip2",
        b"\xfd7zXZ\0": "xz",
        b"\x28\xb5\x2f\xfd": "zstd",
        b"PK\x03\x04": "zip",
    }
    return next((name for start, name in magic.items() if block.startswith(start)), "")


def _check_end(file: BinaryIO, place: int, total: int) -> None:
    """Distinguish the end of an archive from another archive behind it, at which readers stop without a word.

    Raises:
        DamagedTarError: it does not end here.
    """
    rest = os.pread(file.fileno(), MAX_PADDING_BYTES, place)
    if any(rest) or total - place > MAX_PADDING_BYTES:
        raise DamagedTarError(f"goes on for {total - place} bytes after its end; two archives in one file are not read")

"""Random access to the samples of tars: where each member's contents lie, found once by walking over the headers."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from engine.dataset.shards import IMAGE_FORMATS, tar_entries
from engine.dataset.store import StoredFile, explained
from engine.errors import CorruptShardError

RECORD = "json"
MAX_OPEN = 64


class Place(NamedTuple):
    """Where the contents of a member lie: number of the tar, offset and size in bytes."""

    tar: int
    offset: int
    size: int


class SamplePlace(NamedTuple):
    """Where the members of a sample lie, and of what format its image is."""

    image: Place
    image_format: str
    record: Place


def index_tars(tars: Sequence[StoredFile], keys: Iterable[str]) -> dict[str, SamplePlace]:
    """Places of the samples with these keys; the walk ends once all are found.

    Raises:
        CorruptShardError: a tar is missing or torn, or a sample is in none of them.
    """
    wanted = set(keys)
    found: dict[str, SamplePlace] = {}
    for number, tar in enumerate(tars):
        if len(found) == len(wanted):
            break
        path = tar.fetch()
        if not path.exists():
            raise CorruptShardError(f"{tar}: is missing; `riskforge verify` tells what is damaged")
        _index_tar(path, number, wanted, found)
    if missing := wanted - found.keys():
        where = str(tars[0]).rpartition("/")[0] if tars else "the run, which has no tars"
        raise CorruptShardError(
            f"{where}: no tar has the image of {min(missing)!r} ({len(missing)} are missing); `riskforge verify` tells"
            " what is damaged"
        )
    return found


def _index_tar(path: Path, number: int, wanted: set[str], found: dict[str, SamplePlace]) -> None:
    image: tuple[str, str, Place] | None = None
    for name, offset, size in tar_entries(path):
        key, _, extension = name.partition(".")
        if extension in IMAGE_FORMATS:
            image = (key, extension, Place(number, offset, size))
        elif extension == RECORD and image and image[0] == key and key in wanted:
            found.setdefault(key, SamplePlace(image[2], image[1], Place(number, offset, size)))


@dataclass
class TarReader:
    """Reads members by their places. A copy in another process opens files of its own.

    Attributes:
        tars: the files that places number.
    """

    tars: Sequence[StoredFile]
    _open: OrderedDict[int, int] = field(default_factory=OrderedDict, repr=False)
    _paths: dict[int, Path] = field(default_factory=dict, repr=False)
    _owner: int = 0

    def read(self, place: Place) -> bytes:
        """The contents of a member.

        Raises:
            OutputError: the file is gone or cannot be read.
            CorruptShardError: it has become shorter.
        """
        path = str(self.tars[place.tar])
        with explained(path):
            data = os.pread(self._descriptor(place.tar), place.size, place.offset)
        if len(data) != place.size:
            raise CorruptShardError(f"{path}: is shorter than when it was opened; `riskforge verify` tells more")
        return data

    def close(self) -> None:
        """Close all files."""
        if self._owner == os.getpid():
            for descriptor in self._open.values():
                os.close(descriptor)
        self._open.clear()

    def _descriptor(self, tar: int) -> int:
        if self._owner != os.getpid():
            # Those of the parent process stay its own.
            self._open, self._owner = OrderedDict(), os.getpid()
        if tar not in self._open:
            if len(self._open) >= MAX_OPEN:
                os.close(self._open.popitem(last=False)[1])
            self._open[tar] = self._opened(tar)
        self._open.move_to_end(tar)
        return self._open[tar]

    def _opened(self, tar: int) -> int:
        """A descriptor of the local file, which is asked for once, and again where it is gone: tars do not change."""
        with suppress(KeyError, FileNotFoundError):
            return os.open(self._paths[tar], os.O_RDONLY)
        self._paths[tar] = self.tars[tar].fetch()
        return os.open(self._paths[tar], os.O_RDONLY)

    def __getstate__(self) -> dict[str, Any]:
        return {"tars": self.tars, "_open": OrderedDict(), "_paths": {}, "_owner": 0}

    def __del__(self) -> None:
        # At the end of a program modules may be gone already; the system closes the files then.
        if globals().get("os") is not None:
            self.close()

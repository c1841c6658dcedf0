"""Random access to the samples of tars: the offsets of all members, collected once by reading the headers."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from engine.data.run.shards import IMAGE_FORMATS, tar_entries
from engine.data.stores.base import StoredFile
from engine.data.stores.file_errors import explained
from engine.errors import CorruptShardError, OutputError, StoreLostError, first_line

RECORD = "json"
MAX_OPEN = 64


class MemberPlace(NamedTuple):
    """Where the contents of a member are: number of the tar, offset and size in bytes."""

    tar: int
    offset: int
    size: int


class SamplePlace(NamedTuple):
    """Where the members of a sample are, and the format of its image."""

    image: MemberPlace
    image_format: str
    record: MemberPlace


class SamplePlaces(Mapping[str, SamplePlace]):
    """Places of samples by key, in one array of numbers: there may be millions."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._rows = {key: row for row, key in enumerate(dict.fromkeys(keys))}
        # Number of the tar, offset and size of the image, number of its format, offset and size of the record.
        self._numbers = np.full((len(self._rows), 6), -1, dtype=np.int64)
        self._formats: list[str] = []
        self.num_missing = len(self._rows)

    def add(self, key: str, place: SamplePlace) -> None:
        """Note the place of a sample that is wanted; the first one counts."""
        row = self._rows.get(key)
        if row is None or self._numbers[row, 0] >= 0:
            return
        if place.image_format not in self._formats:
            self._formats.append(place.image_format)
        self._numbers[row] = (*place.image, self._formats.index(place.image_format), *place.record[1:])
        self.num_missing -= 1

    def find(self, key: str) -> SamplePlace | None:
        """The place of a sample, or None where it is nowhere."""
        return None if self._numbers[self._rows[key], 0] < 0 else self[key]

    def first_missing(self) -> str:
        """The first key by name that is nowhere."""
        return min(key for key, row in self._rows.items() if self._numbers[row, 0] < 0)

    @property
    def image_formats(self) -> frozenset[str]:
        """Extensions of the images."""
        return frozenset(self._formats)

    def __getitem__(self, key: str) -> SamplePlace:
        tar, offset, size, form, *record = self._numbers[self._rows[key]].tolist()
        return SamplePlace(MemberPlace(tar, offset, size), self._formats[form], MemberPlace(tar, *record))

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)


def index_tars(tars: Sequence[StoredFile], keys: Iterable[str]) -> SamplePlaces:
    """Places of the samples with these keys; ends once all are located.

    Raises:
        CorruptShardError: a tar is missing or torn, or a sample is in none of them.
    """
    places = SamplePlaces(keys)
    for number, tar in enumerate(tars):
        if not places.num_missing:
            break
        path = tar.fetch()
        if not path.exists():
            raise CorruptShardError(f"{tar}: is missing; `riskforge verify` reports what is damaged")
        _index_tar(path, number, places)
    if places.num_missing:
        where = str(tars[0]).rpartition("/")[0] if tars else "the run, which has no tars"
        raise CorruptShardError(
            f"{where}: no tar has the image of {places.first_missing()!r} ({places.num_missing} are missing);"
            " `riskforge verify` reports what is damaged"
        )
    return places


def find_in_tars(tars: Sequence[StoredFile], keys: Iterable[str]) -> tuple[SamplePlaces, list[str]]:
    """Places of the samples with these keys as far as tars have them, and what is wrong with tars.

    Raises:
        StoreLostError: an object store cannot be reached.
    """
    places, problems = SamplePlaces(keys), []
    for number, tar in enumerate(tars):
        if not places.num_missing:
            break
        try:
            _index_tar(tar.fetch(), number, places)
        except StoreLostError:
            raise
        except (OSError, OutputError, CorruptShardError) as error:
            problems.append(first_line(error))
    return places, problems


def _index_tar(path: Path, number: int, places: SamplePlaces) -> None:
    image: tuple[str, str, MemberPlace] | None = None
    for name, offset, size in tar_entries(path):
        key, _, extension = name.partition(".")
        if extension in IMAGE_FORMATS:
            image = (key, extension, MemberPlace(number, offset, size))
        elif extension == RECORD and image and image[0] == key:
            places.add(key, SamplePlace(image[2], image[1], MemberPlace(number, offset, size)))


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

    def read(self, place: MemberPlace) -> bytes:
        """The contents of a member.

        Raises:
            OutputError: the file is gone or cannot be read.
            CorruptShardError: it has become shorter.
        """
        path = str(self.tars[place.tar])
        with explained(path):
            data = os.pread(self._descriptor(place.tar), place.size, place.offset)
        if len(data) != place.size:
            raise CorruptShardError(f"{path}: is shorter than when it was opened; `riskforge verify` reports more")
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
        """A descriptor of the local file, which is fetched once, and again where it was removed: tars do not change."""
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

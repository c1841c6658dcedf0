"""The image files of chosen samples, taken out of the shards without reading the rest of them."""

from __future__ import annotations

import bisect
import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

from engine.data.run.commits import list_commits
from engine.data.run.shards import IMAGE_FORMATS, SHARDS, shard_name, tar_entries
from engine.data.run.tar_index import MemberPlace, TarReader
from engine.data.stores.base import Store, StoredFile
from engine.errors import CorruptShardError, OutputError, StoreLostError


class StoredImages(Mapping[str, bytes]):
    """Image files by the keys of their samples; each is read when it is asked for, so one is held at a time."""

    def __init__(self, reader: TarReader, places: dict[str, MemberPlace]) -> None:
        self._reader, self._places = reader, places

    def __getitem__(self, key: str) -> bytes:
        return self._reader.read(self._places[key])

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: object) -> bool:
        return key in self._places


@dataclass(frozen=True, slots=True)
class ImageShards:
    """Where the image files of rows are.

    Attributes:
        store: the run that has the tars; None where there is none any more.
        job_name: after which they are called.
        numbers: of the shards that the rows are of; None for all that are committed.
    """

    store: Store | None
    job_name: str
    numbers: frozenset[int] | None = None

    def find(self, keys: dict[int, str], folder: str = SHARDS) -> StoredImages:
        """As `find_images`; nothing where there is no run."""
        if self.store is None:
            return StoredImages(TarReader(()), {})
        return find_images(self.store, self.job_name, keys, folder, self.numbers)


def scored_shards(store: Store) -> frozenset[int]:
    """Numbers of the shards whose rows a rescored folder has; the run may have grown since."""
    stems = (PurePosixPath(name).stem for name in store.list(SHARDS) if name.endswith(".parquet"))
    numbers = (stem.rsplit("-", 1)[-1] for stem in stems)
    return frozenset(int(number) for number in numbers if number.isdecimal())


def find_images(
    store: Store, job_name: str, keys: dict[int, str], folder: str = SHARDS, shards: frozenset[int] | None = None
) -> StoredImages:
    """Image files by key; a sample whose image is not found is left out.

    Args:
        keys: key of each wanted sample by its row number in the metadata, which holds the shards in their order.
        folder: of the tars; that of starts or twins for the second images of samples, which have their keys.
        shards: numbers of those that the metadata holds; None for all.
    """
    commits = list_commits(store)
    numbers = sorted(number for number in commits if shards is None or number in shards)
    ends = list(itertools.accumulate(commits[number].counts.attempted for number in numbers))
    wanted: dict[int, set[str]] = defaultdict(set)
    for row, key in keys.items():
        if (place := bisect.bisect_right(ends, row)) < len(numbers):
            wanted[numbers[place]].add(key)
    tars = [StoredFile(store, f"{folder}/{shard_name(job_name, number)}.tar") for number in sorted(wanted)]
    places: dict[str, MemberPlace] = {}
    for number, (tar, (_, some)) in enumerate(zip(tars, sorted(wanted.items()), strict=True)):
        places |= _places(tar, number, some)
    return StoredImages(TarReader(tars), places)


def _places(tar: StoredFile, number: int, keys: set[str]) -> dict[str, MemberPlace]:
    """Where the images of some keys lie; a tar that cannot be read ends early."""
    places: dict[str, MemberPlace] = {}
    try:
        for name, offset, size in tar_entries(tar.fetch()):
            key, _, extension = name.partition(".")
            if key in keys and extension in IMAGE_FORMATS:
                places[key] = MemberPlace(number, offset, size)
            if len(places) == len(keys):
                break
    except StoreLostError:
        raise
    except (OSError, OutputError, CorruptShardError):
        return places
    return places

"""Indexes of the tars for other readers: `wids.json` for wids, `_info.json` for timm."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

from engine.data.run.commits import read_commits
from engine.data.run.counts import num_stored
from engine.data.run.file_names import TIMM_INFO, WIDS_INDEX
from engine.data.stores.base import Store
from engine.data.stores.file_errors import explained
from engine.job.spec import JobSpec

if TYPE_CHECKING:
    pass


class IndexEntry(NamedTuple):
    """A tar with images, as the indexes list it."""

    name: str
    num_images: int
    md5: str
    num_bytes: int


def write_indexes(store: Store, job: JobSpec) -> None:
    """Write the index of `wids` and the info of timm next to the shards; shards without an image are left out.

    Raises:
        CorruptShardError: a commit record cannot be read.
    """
    entries = (
        IndexEntry(f"{record.name}.tar", num_images, record.tar_md5, record.tar_bytes)
        for record in read_commits(store)
        if (num_images := num_stored(job, record.counts))
    )
    write_index_files(store, entries)


def write_index_files(store: Store, entries: Iterable[IndexEntry]) -> None:
    """Write the index of `wids` and the info of timm over the given tars, in constant memory but for their names."""
    staged = store.staging() / "wids.json"
    names: list[str] = []
    lengths: list[int] = []
    with explained(staged), staged.open("w", encoding="utf-8") as file:
        file.write('{"__kind__": "wids-shard-index-v1", "wids_version": 1, "shardlist": [')
        for entry in entries:
            names.append(entry.name)
            lengths.append(entry.num_images)
            file.write((",\n" if names[1:] else "\n") + json.dumps(_wids_entry(entry)))
        file.write("\n]}\n")
    store.replace(WIDS_INDEX, staged)
    split = {"name": "train", "num_samples": sum(lengths), "filenames": names, "shard_lengths": lengths}
    store.replace(TIMM_INFO, (json.dumps({"splits": {"train": split}}) + "\n").encode())


def _wids_entry(entry: IndexEntry) -> dict[str, Any]:
    return {
        "url": entry.name,
        "md5sum": entry.md5,
        "nsamples": entry.num_images,
        "filesize": entry.num_bytes,
    }

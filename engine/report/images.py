"""The image files of chosen samples, taken out of the shards without reading the rest of them."""

from __future__ import annotations

import bisect
import itertools
import tarfile
from collections import defaultdict
from pathlib import Path

from engine.dataset.commits import list_commits
from engine.dataset.shards import SHARDS, shard_name
from engine.dataset.store import Store


def read_images(store: Store, job_name: str, keys: dict[int, str]) -> dict[str, bytes]:
    """Image files by key; a sample whose image is not found is left out.

    Args:
        keys: key of each wanted sample by its row number in the metadata, which holds the shards in their order.
    """
    commits = list_commits(store)
    numbers = sorted(commits)
    ends = list(itertools.accumulate(commits[number].counts.attempted for number in numbers))
    wanted: dict[int, set[str]] = defaultdict(set)
    for row, key in keys.items():
        if (place := bisect.bisect_right(ends, row)) < len(numbers):
            wanted[numbers[place]].add(key)
    images: dict[str, bytes] = {}
    for number, some in sorted(wanted.items()):
        images |= _members(store.fetch(f"{SHARDS}/{shard_name(job_name, number)}.tar"), some)
    return images


def _members(path: Path, keys: set[str]) -> dict[str, bytes]:
    """The images of some keys; other members are skipped over, and a tar that cannot be read ends early."""
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                if key in keys and extension not in ("json", "cls") and (file := tar.extractfile(member)):
                    found[key] = file.read()
                if len(found) == len(keys):
                    break
    except (OSError, tarfile.TarError):
        return found
    return found

"""What a push would change in a repository, and what keeps it from that."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.data.publishing.contents import PUSHED, Contents, PushedFile, git_digest
from engine.data.publishing.hub import RemoteFile
from engine.data.publishing.hub_card import matches
from engine.data.run.companions import COMPANIONS
from engine.data.run.file_names import CARD, EXPORT_KIND, MANIFEST, METADATA
from engine.data.run.foreign_files import list_names
from engine.data.run.shards import SHARDS, file_digest
from engine.errors import JobError
from engine.methods.strict_json import parse_json
from engine.models.untrusted_files import MAX_DOCUMENT_BYTES

# The Hub makes it with the repository.
_OF_THE_HUB = frozenset([".gitattributes"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Differences:
    """What a push would change.

    Attributes:
        missing: files that are not there.
        changed: files that are there with other content.
        num_equal, equal_bytes: files that are there as they are.
        stale: files of an earlier push that this data set does not have, which go.
        kept: files of others, which stay.
        conflicts: names of others' content that would be replaced, or read as data.
    """

    missing: list[PushedFile] = field(default_factory=list)
    changed: list[PushedFile] = field(default_factory=list)
    num_equal: int = 0
    equal_bytes: int = 0
    stale: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    conflicts: list[str] = field(default_factory=list)
    mixing: list[str] = field(default_factory=list)

    @property
    def names(self) -> set[str]:
        """Names of the files to push."""
        return {file.name for file in (*self.missing, *self.changed)}


def find_differences(
    contents: Contents, remote: Mapping[str, RemoteFile], read: Callable[[str], bytes], *, overwrite: bool
) -> Differences:
    """Compare a data set with a repository.

    Args:
        remote: the files there, by name.
        read: gives the content of one.
        overwrite: whether content of others is replaced.
    """
    missing: list[PushedFile] = []
    changed: list[PushedFile] = []
    num_equal = equal_bytes = 0
    for file in contents.files:
        there = remote.get(file.name)
        if there is None:
            missing.append(file)
        elif is_equal(contents, file, there):
            num_equal, equal_bytes = num_equal + 1, equal_bytes + file.num_bytes
        else:
            changed.append(file)
    earlier = _Earlier.read(remote, read)
    is_ours = earlier is not None and earlier.digest == contents.digest
    names = {file.name for file in contents.files}
    others = sorted(name for name in remote if name not in names and name not in _OF_THE_HUB)
    stale = [name for name in others if earlier and earlier.wrote(name)] if is_ours or overwrite else []
    kept = [name for name in others if name not in set(stale)]
    return Differences(
        missing=missing,
        changed=changed,
        num_equal=num_equal,
        equal_bytes=equal_bytes,
        stale=stale,
        kept=kept,
        conflicts=[] if overwrite else list(_conflicts(changed, remote, earlier if is_ours else None)),
        mixing=[name for name in kept if any(matches(name, pattern) for pattern in contents.patterns)],
    )


def is_equal(contents: Contents, file: PushedFile, there: RemoteFile) -> bool:
    """Whether a file is in the repository as it is; its bytes are read where neither side has recorded enough."""
    if file.num_bytes != there.num_bytes:
        return False
    if there.sha256 and file.sha256:
        return file.sha256 == there.sha256
    content = contents.store.fetch(file.name) if file.content is None else file.content
    if there.sha256:
        assert isinstance(content, Path), "what is made for a push has its checksum"
        return file_digest(content, "sha256") == there.sha256
    return git_digest(content) == there.git_digest


def _conflicts(changed: list[PushedFile], remote: Mapping[str, RemoteFile], earlier: _Earlier | None) -> Iterator[str]:
    """Names of content that is not of an earlier push of the same data set."""
    for file in changed:
        # The card may have been edited on the Hub since.
        if earlier is None or (file.name == CARD and earlier.card != remote[CARD].git_digest):
            yield file.name


@dataclass(frozen=True, slots=True)
class _Earlier:
    """An earlier push, by the manifest in the repository.

    Attributes:
        card: what git calls its card; empty where that is not known.
    """

    name: str
    digest: str
    card: str

    @classmethod
    def read(cls, remote: Mapping[str, RemoteFile], read: Callable[[str], bytes]) -> _Earlier | None:
        """The earlier push; None where there was none that was completed."""
        if MANIFEST not in remote or remote[MANIFEST].num_bytes > MAX_DOCUMENT_BYTES:
            return None
        try:
            manifest: Any = parse_json(read(MANIFEST))
        except ValueError:
            return None
        if not isinstance(manifest, dict) or not (manifest.get("kind") == EXPORT_KIND or "plan_digest" in manifest):
            return None
        pushed = manifest.get(PUSHED)
        card = pushed.get("card") if isinstance(pushed, dict) else ""
        digest = str(manifest.get("plan_digest") or manifest.get("digest") or "")
        return cls(str(manifest.get("name", "")), digest, str(card))

    def wrote(self, name: str) -> bool:
        """Whether a file is called as the data files of this data set are."""
        folders = "|".join((SHARDS, *COMPANIONS))
        own = rf"(?:{folders})/{re.escape(self.name)}-\d{{6,}}\.tar|train-\d{{5,}}-of-\d{{5,}}\.parquet"
        return re.fullmatch(rf"{own}|{METADATA}(?:/part-\d{{6}}\.parquet)?", name) is not None


def check_differences(differences: Differences, where: str) -> None:
    """Refuse to replace what others have pushed, or to mix their data with this.

    Raises:
        JobError: naming the files.
    """
    if differences.conflicts:
        raise JobError(
            f"--to {where}: holds other content under names of this data set"
            f" ({list_names(differences.conflicts)}); push to another repository, or replace it with --overwrite"
        )
    if differences.mixing:
        raise JobError(
            f"--to {where}: holds files of others that would be read as data of this data set"
            f" ({list_names(differences.mixing)}); push to another repository, or delete them there (`hf repos"
            " delete-files`)"
        )

"""Labelled images in WebDataset tars."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from engine.data.images.decode import UnusableImageError, brief, check_bytes
from engine.data.images.image_source import (
    REJECTED,
    ImageSource,
    Item,
    LabelledImage,
    ReadResult,
    in_context,
    make_result,
    unusable,
)
from engine.data.images.labelling import Labelling
from engine.data.images.run_surplus import SURPLUS, surplus_keys
from engine.data.images.tar_samples import SkippedMember, TarSample, divide_group, group_members
from engine.data.tars import DamagedTarError, Member, read_member, walk_tar
from engine.job.class_lookup import is_index
from engine.job.records import REAL

KIND = "WebDataset tars"

MAX_LABEL_BYTES = 4096
# Members that are searched for the first label: a set without labels must not be traversed twice.
MAX_LOOKED_AT = 10_000
MAX_JSON_BYTES = 16 * 2**20

_NO_LABEL = "has no label: neither a .cls nor a `class_index` or `class_name` in .json can be read"


def webdataset(paths: Sequence[Path], labels: Labelling | tuple[str, ...], root: Path | None = None) -> ImageSource:
    """Samples of tars: adjacent members that share their name up to the first dot, or the last where that pairs them.

    The image is the member with an extension of `EXTENSIONS`; the class is in `.cls` (an index or a name), and as
    `class_index` and `class_name` in `.json`, which must agree. Members outside samples are reported; unread members
    of a sample are counted by extension. Rejected and surplus samples of a run are reported.

    Args:
        labels: class names of the target in index order, or how labels are read.
        root: what the names of the tars are relative to; their own folders where not given.

    Raises:
        UnsuitableFileError: what a run does not count cannot be read.
    """
    surplus = frozenset[str]().union(*(surplus_keys(folder) for folder in {path.parent for path in paths}))
    labelling = labels if isinstance(labels, Labelling) else Labelling(labels)
    tars = _Tars(tuple(paths), labelling, root, surplus)
    num_bytes = sum(path.stat().st_size for path in paths)
    return ImageSource(KIND, None, tuple(partial(tars.items, path) for path in paths), num_bytes, labelling)


class _Tars:
    """A set of tars, whose labels are read in one way."""

    def __init__(
        self, paths: tuple[Path, ...], labelling: Labelling, root: Path | None, surplus: frozenset[str]
    ) -> None:
        self._paths, self._labelling, self._root, self._is_settled = paths, labelling, root, False
        self._surplus = surplus

    def items(self, path: Path) -> Iterator[Item]:
        """What is in a tar, in order."""
        if not self._is_settled:
            self._labelling.settle_by_first(self._written())
            self._is_settled = True
        name = path.name if self._root is None else path.relative_to(self._root).as_posix()
        others = Counter[str]()
        try:
            with path.open("rb") as file:
                yield from self._samples(name, file, others)
        except (DamagedTarError, OSError) as error:
            yield partial(unusable, name, f"cut short or damaged from here on ({brief(error)})")
        for extension, count in sorted(others.items()):
            reason = f"{count} members with this extension are next to an image that is read, and are not read"
            yield partial(unusable, f"{name}/*.{extension}", reason)

    def _samples(self, tar: str, file: BinaryIO, others: Counter[str]) -> Iterator[Item]:
        for group in group_members(file):
            if isinstance(group, SkippedMember):
                yield partial(unusable, f"{tar}/{group.name}", group.reason)
                continue
            for sample in divide_group(group):
                others.update(sample.others)
                name = f"{tar}/{sample.name}"
                if sample.problem:
                    yield partial(unusable, name, sample.problem)
                else:
                    yield partial(_read_sample, file, name, sample, self._labelling, self._surplus)

    def _written(self) -> Iterator[str]:
        """What the first `.cls` of the set hold, tar by tar."""
        left = MAX_LOOKED_AT
        for path in self._paths:
            with contextlib.suppress(DamagedTarError, OSError), path.open("rb") as file:
                for member in itertools.islice(walk_tar(file), left):
                    left -= 1
                    if member.is_file and member.name.lower().endswith(".cls"):
                        with contextlib.suppress(UnusableImageError):
                            yield _text(file, member)


def _read_sample(
    file: BinaryIO, name: str, sample: TarSample, labelling: Labelling, surplus: frozenset[str]
) -> ReadResult:
    assert sample.image is not None, "a sample without a problem has an image"
    record = _record(file, sample.record)
    if record.get("accepted") is False:
        return unusable(name, REJECTED)
    if record.get("accepted") is True and str(record.get("key")) in surplus:
        return unusable(name, f"is beyond the quota of its run ({SURPLUS})")
    item = make_result(
        name, partial(_class_of, file, sample, record, labelling), partial(_contents, file, sample.image)
    )
    if isinstance(item, LabelledImage) and "schema_version" in record and record.get("method") != REAL:
        # Of a run, whose files need not be marked as synthetic.
        item = dataclasses.replace(item, is_synthetic=True)
    return in_context(item, record.get("context"))


def _class_of(file: BinaryIO, sample: TarSample, record: dict[str, Any], labelling: Labelling) -> int:
    """The class of a sample by `.cls` and `.json`, which must agree.

    Raises:
        UnusableImageError: nothing, no class of the target, or two classes.
    """
    known = _class_of_record(record, labelling)
    if sample.label is None and known is None:
        raise UnusableImageError(_NO_LABEL if sample.record else "has no label: neither .cls nor .json is next to it")
    if sample.label is None:
        assert known is not None
        return known
    written = _text(file, sample.label).strip()
    if known is None:
        return labelling.of_written(written)
    says_index = is_index(written) and int(written) == record.get("class_index")
    if not says_index and labelling.of_written(written) != known:
        raise UnusableImageError(f"has two labels: {written!r} in .cls, and class {known} in .json")
    return known


def _class_of_record(record: dict[str, Any], labelling: Labelling) -> int | None:
    """The class in a sample's .json, or None: by name where there is one, as a run of another target may be read."""
    index, name = record.get("class_index"), record.get("class_name")
    index = index if isinstance(index, int) and not isinstance(index, bool) else None
    if isinstance(name, str) and name:
        return labelling.of_name(name) if index is None else labelling.of_named_index(name, index)
    return None if index is None else labelling.of_index(index)


def _record(file: BinaryIO, member: Member | None) -> dict[str, Any]:
    """A sample's .json, or nothing."""
    if member is None or member.size > MAX_JSON_BYTES:
        return {}
    try:
        record = json.loads(_contents(file, member))
    except (UnusableImageError, ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def _text(file: BinaryIO, member: Member) -> str:
    """A label.

    Raises:
        UnusableImageError: too long, or not UTF-8.
    """
    if member.size > MAX_LABEL_BYTES:
        raise UnusableImageError(_NO_LABEL)
    try:
        return _contents(file, member).decode("utf-8-sig")
    except ValueError:
        raise UnusableImageError(_NO_LABEL) from None


def _contents(file: BinaryIO, member: Member) -> bytes:
    check_bytes(member.size)
    try:
        return read_member(file, member)
    except (DamagedTarError, OSError) as error:
        raise UnusableImageError(f"cannot be read from the archive ({brief(error)})") from None

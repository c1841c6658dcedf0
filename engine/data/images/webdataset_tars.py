"""Labelled images in WebDataset tars."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from engine.data.images.decode import EXTENSIONS, UnusableImageError, brief, check_bytes
from engine.data.images.findings import (
    REJECTED,
    Found,
    ImageSource,
    Item,
    LabelledImage,
    in_context,
    make_finding,
    unusable,
)
from engine.data.images.ignored import why_ignored
from engine.data.images.labelling import Labelling
from engine.data.tars import DamagedTarError, Member, read_member, walk_tar
from engine.job.class_lookup import is_index
from engine.job.records import REAL
from engine.models.untrusted_files import UnsuitableFileError, check_regular, read_whole

KIND = "WebDataset tars"
# The folder of a run's tars; beside it the rows of all samples, and in it the keys of those beyond their quota.
SHARDS, ROWS, SURPLUS = "shards", "metadata.parquet", "surplus.txt"
MAX_SURPLUS_BYTES = 2**30
LABELS = ("cls", "json")
MAX_LABEL_BYTES = 4096
# Members among which the first label is sought: a set without any must not be walked through twice.
MAX_LOOKED_AT = 10_000
MAX_JSON_BYTES = 16 * 2**20

# What stands before the last dot of a composed extension; numbers and blanks are of names.
_COMPOSED = re.compile(r"[A-Za-z_-]+")
_NO_LABEL = "has no label: neither a .cls nor a `class_index` or `class_name` in .json can be read"


def webdataset(paths: Sequence[Path], labels: tuple[str, ...], root: Path | None = None) -> ImageSource:
    """Samples of tars: adjacent members that share their name up to the first dot, or the last where that pairs them.

    The image is the member with an extension of `EXTENSIONS`; the class stands in `.cls` (an index or a name), and as
    `class_index` and `class_name` in `.json`, which must agree. What is no part of a sample is named; members beside an
    image that is read are counted by extension. Of a run, what it rejected or does not count is named.

    Args:
        root: what the names of the tars are relative to; their own folders where not given.

    Raises:
        UnsuitableFileError: what a run does not count cannot be read.
    """
    surplus = frozenset[str]().union(*(_surplus(folder) for folder in {path.parent for path in paths}))
    tars = _Tars(tuple(paths), Labelling(labels), root, surplus)
    num_bytes = sum(path.stat().st_size for path in paths)
    return ImageSource(KIND, None, tuple(partial(tars.items, path) for path in paths), num_bytes)


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
            reason = f"{count} members with this extension stand beside an image that is read, and are not"
            yield partial(unusable, f"{name}/*.{extension}", reason)

    def _samples(self, tar: str, file: BinaryIO, others: Counter[str]) -> Iterator[Item]:
        for group in _groups(file):
            if isinstance(group, _Problem):
                yield partial(unusable, f"{tar}/{group.name}", group.reason)
                continue
            for sample in _divide(group):
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


@dataclass(frozen=True, slots=True)
class _Problem:
    """A member that is no part of a sample, and why."""

    name: str
    reason: str


@dataclass(slots=True)
class _Sample:
    """Members that belong together.

    Attributes:
        name: of the image, or what its members share.
        problem: why there is nothing to read.
        others: extensions of members that are not read.
    """

    name: str
    image: Member | None = None
    label: Member | None = None
    record: Member | None = None
    problem: str = ""
    others: list[str] = field(default_factory=list)


# Members by what stands between the first dot of their name and the extension, and by extension in lower case.
_Parts = dict[str, dict[str, Member]]


@dataclass(slots=True)
class _Group:
    """Adjacent members that share their name up to the first dot."""

    key: str
    parts: _Parts = field(default_factory=dict)


def _groups(file: BinaryIO) -> Iterator[_Group | _Problem]:
    """Groups, after the members between that are in none. What was whole before damage is given first.

    Raises:
        DamagedTarError: the archive cannot be read to its end.
    """
    group = _Group("")
    try:
        for member in walk_tar(file):
            if member.is_folder:
                continue
            if problem := _why_not(member):
                yield _Problem(member.name, problem)
                continue
            folder, slash, base = member.name.rpartition("/")
            stem, _, rest = base.partition(".")
            if (key := folder + slash + stem) != group.key:
                if group.parts:
                    yield group
                group = _Group(key)
            middle, _, extension = rest.rpartition(".")
            part = group.parts.setdefault(middle, {})
            if extension.lower() in part:
                yield _Problem(member.name, "is there twice in its sample; the first one counts")
            else:
                part[extension.lower()] = member
    except DamagedTarError:
        if group.parts:
            yield group
        raise
    if group.parts:
        yield group


def _why_not(member: Member) -> str:
    """Why a member is no part of a sample; empty where it is."""
    if member.problem:
        return f"is {member.problem}, which is not followed" if "link" in member.problem else f"is {member.problem}"
    stem, dot, extension = member.name.rpartition("/")[2].partition(".")
    if reason := why_ignored(member.name, in_hidden=True):
        return reason
    return "" if stem and dot and extension else "has no extension; images and labels in tars are found by theirs"


def _divide(group: _Group) -> Iterator[_Sample]:
    """The samples of a group: one each where members pair up by their name to the last dot, else one in all.

    So `2024.01.02.png` and `2024.01.02.cls` belong together, and so do `a.rgb.png` and `a.label.cls`.
    """
    pairs = [middle for middle, part in group.parts.items() if _images(part) and not part.keys().isdisjoint(LABELS)]
    if len(group.parts) == 1 or any(pairs):
        for middle, part in group.parts.items():
            yield _one_sample(f"{group.key}.{middle}" if middle else group.key, {"": part})
    else:
        yield _one_sample(group.key, group.parts)


def _images(part: dict[str, Member]) -> list[Member]:
    return [member for extension, member in part.items() if extension in EXTENSIONS]


def _one_sample(key: str, parts: _Parts) -> _Sample:
    """The sample of some members: plain extensions come first, composed ones count where they are unique."""
    images = _images(parts.get("", {}))[:1] or [one for part in parts.values() for one in _images(part)]
    labels, records = _of_extension(parts, "cls"), _of_extension(parts, "json")
    members = [member for part in parts.values() for member in part.values()]
    if not images:
        endings = ", ".join(sorted({"." + one.name.rpartition(".")[2] for one in members if not _is_label(one)}))
        beside = f" among its members ({endings})" if endings else ""
        what = "a label and no image" if labels or records else "no image and no label"
        return _Sample(key, problem=f"has {what}{beside}")
    if len(images) > 1 or len(labels) > 1:
        several = images if len(images) > 1 else labels
        names = ", ".join(one.name.rpartition("/")[2] for one in several[:4])
        what = "images" if len(images) > 1 else "labels"
        return _Sample(key, problem=f"has {len(several)} {what} ({names}), and none of them by a plain extension")
    label, record = next(iter(labels), None), records[0] if len(records) == 1 else None
    if stranger := next((one for one in (label, record) if one and not _are_one(key, images[0], one)), None):
        name = stranger.name.rpartition("/")[2]
        return _Sample(images[0].name, problem=f"has no label of its name; {name} may be another sample's")
    used = [images[0], label, record]
    others = [one.name.rpartition(".")[2].lower() for one in members if all(one is not other for other in used)]
    return _Sample(images[0].name, images[0], label, record, others=others)


def _of_extension(parts: _Parts, extension: str) -> list[Member]:
    plain = [parts[""][extension]] if extension in parts.get("", {}) else []
    return plain or [part[extension] for part in parts.values() if extension in part]


def _are_one(key: str, image: Member, label: Member) -> bool:
    """Whether an image and a label are of one sample: `rgb.png` and `label.cls` are extensions, `02.png` is a name."""
    middles = {one.name[len(key) + 1 :].rpartition(".")[0] for one in (image, label)}
    return len(middles) == 1 or "" in middles or all(_COMPOSED.fullmatch(one) for one in middles)


def _is_label(member: Member) -> bool:
    return member.name.rpartition(".")[2].lower() in LABELS


def _surplus(folder: Path) -> frozenset[str]:
    """Keys of the samples in a folder of shards that are beyond the quota of their request.

    Runs that were closed before schema version 3 have no list, and a column in their rows.

    Raises:
        UnsuitableFileError: list or rows cannot be read.
    """
    try:
        return frozenset(read_whole(folder / SURPLUS, MAX_SURPLUS_BYTES).decode("utf-8", "replace").split())
    except FileNotFoundError:
        rows = folder.resolve().parent / ROWS
    except OSError as error:
        raise UnsuitableFileError(f"its {SURPLUS}: {brief(error)}") from None
    if not rows.exists() or folder.resolve().name != SHARDS:
        return frozenset()
    try:
        return frozenset(_surplus_rows(rows))
    except (OSError, ValueError) as error:
        raise UnsuitableFileError(f"its {ROWS}: {brief(error)}") from None


def _surplus_rows(rows: Path) -> Iterator[str]:
    from engine.data.run.surplus import has_surplus, surplus_lines

    for one in rows.iterdir() if rows.is_dir() else [rows]:
        check_regular(one)
    if has_surplus(rows):
        yield from (line.decode().strip() for line in surplus_lines(rows))


def _read_sample(file: BinaryIO, name: str, sample: _Sample, labelling: Labelling, surplus: frozenset[str]) -> Found:
    assert sample.image is not None, "a sample without a problem has an image"
    record = _record(file, sample.record)
    if record.get("accepted") is False:
        return unusable(name, REJECTED)
    if record.get("accepted") is True and str(record.get("key")) in surplus:
        return unusable(name, f"is beyond the quota of its run ({SURPLUS})")
    found = make_finding(
        name, partial(_class_of, file, sample, record, labelling), partial(_contents, file, sample.image)
    )
    if isinstance(found, LabelledImage) and "schema_version" in record and record.get("method") != REAL:
        # Of a run, whose files need not say what they are.
        found = dataclasses.replace(found, is_synthetic=True)
    return in_context(found, record.get("context"))


def _class_of(file: BinaryIO, sample: _Sample, record: dict[str, Any], labelling: Labelling) -> int:
    """What a sample says of its class, in `.cls` and `.json` alike.

    Raises:
        UnusableImageError: nothing, no class of the target, or two classes.
    """
    known = _class_of_record(record, labelling)
    if sample.label is None and known is None:
        raise UnusableImageError(_NO_LABEL if sample.record else "has no label: neither .cls nor .json is beside it")
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

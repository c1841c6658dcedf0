"""Which members of a WebDataset tar belong to one sample."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

from engine.data.images.decode import EXTENSIONS
from engine.data.images.ignored import why_ignored
from engine.data.tars import DamagedTarError, Member, walk_tar

LABELS = ("cls", "json")

# What precedes the last dot of a composed extension; numbers and blanks belong to names.
_COMPOSED = re.compile(r"[A-Za-z_-]+")


@dataclass(frozen=True, slots=True)
class SkippedMember:
    """A member that is no part of a sample, and why."""

    name: str
    reason: str


@dataclass(slots=True)
class TarSample:
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


# Members by the text between the first dot of their name and the extension, and by extension in lower case.
_Parts = dict[str, dict[str, Member]]


@dataclass(slots=True)
class _Group:
    """Adjacent members that share their name up to the first dot."""

    key: str
    parts: _Parts = field(default_factory=dict)


def group_members(file: BinaryIO) -> Iterator[_Group | SkippedMember]:
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
                yield SkippedMember(member.name, problem)
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
                yield SkippedMember(member.name, "is there twice in its sample; the first one counts")
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


def divide_group(group: _Group) -> Iterator[TarSample]:
    """The samples of a group: one each where members pair up by their name to the last dot, else one in all.

    So `2024.01.02.png` and `2024.01.02.cls` belong together, and so do `a.rgb.png` and `a.label.cls`.
    """
    pairs = [middle for middle, part in group.parts.items() if _images(part) and not part.keys().isdisjoint(LABELS)]
    if len(group.parts) == 1 or any(pairs):
        for middle, part in group.parts.items():
            yield _make_sample(f"{group.key}.{middle}" if middle else group.key, {"": part})
    else:
        yield _make_sample(group.key, group.parts)


def _images(part: dict[str, Member]) -> list[Member]:
    return [member for extension, member in part.items() if extension in EXTENSIONS]


def _make_sample(key: str, parts: _Parts) -> TarSample:
    """The sample of some members: plain extensions come first, composed ones count where they are unique."""
    images = _images(parts.get("", {}))[:1] or [member for part in parts.values() for member in _images(part)]
    labels, records = _of_extension(parts, "cls"), _of_extension(parts, "json")
    members = [member for part in parts.values() for member in part.values()]
    if not images:
        extensions = {"." + member.name.rpartition(".")[2] for member in members if not _is_label(member)}
        endings = ", ".join(sorted(extensions))
        listed = f" among its members ({endings})" if endings else ""
        what = "a label and no image" if labels or records else "no image and no label"
        return TarSample(key, problem=f"has {what}{listed}")
    if len(images) > 1 or len(labels) > 1:
        several = images if len(images) > 1 else labels
        names = ", ".join(member.name.rpartition("/")[2] for member in several[:4])
        what = "images" if len(images) > 1 else "labels"
        return TarSample(key, problem=f"has {len(several)} {what} ({names}), and none of them by a plain extension")
    label, record = next(iter(labels), None), records[0] if len(records) == 1 else None
    labelled = [member for member in (label, record) if member]
    if strangers := [member for member in labelled if not _belong_together(key, images[0], member)]:
        name = strangers[0].name.rpartition("/")[2]
        return TarSample(images[0].name, problem=f"has no label of its name; {name} may be another sample's")
    rest = [member for member in members if all(member is not used for used in (images[0], *labelled))]
    others = [member.name.rpartition(".")[2].lower() for member in rest]
    return TarSample(images[0].name, images[0], label, record, others=others)


def _of_extension(parts: _Parts, extension: str) -> list[Member]:
    plain = [parts[""][extension]] if extension in parts.get("", {}) else []
    return plain or [part[extension] for part in parts.values() if extension in part]


def _belong_together(key: str, image: Member, label: Member) -> bool:
    """Whether an image and a label are of one sample: `rgb.png` and `label.cls` are extensions, `02.png` is a name."""
    middles = {member.name[len(key) + 1 :].rpartition(".")[0] for member in (image, label)}
    return len(middles) == 1 or "" in middles or all(_COMPOSED.fullmatch(middle) for middle in middles)


def _is_label(member: Member) -> bool:
    return member.name.rpartition(".")[2].lower() in LABELS

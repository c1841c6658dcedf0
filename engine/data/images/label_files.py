"""Label maps of images: `label_map.json` next to them says which labels of theirs are which classes of the target."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.data.images.decode import brief
from engine.errors import JobError
from engine.job.class_lookup import folded
from engine.job.label_maps import checked_entries, find_label
from engine.methods.strict_json import parse_json
from engine.models.untrusted_files import read_whole

LABEL_MAP = "label_map.json"
# Of labels that are left out.
LEFT_OUT = -1
_MAX_BYTES, _MAX_LABELS = 2**22, 100_000


def read_label_map(folder: Path, labels: tuple[str, ...], option: str) -> dict[str, int]:
    """The label map of a folder's images: classes by label, `LEFT_OUT` for labels whose images are not used.

    It is that of the nearest folder that has one: this one, or the two above it, as for cards.

    Args:
        labels: class names of the target in index order.
        option: that gave the folder, for messages.

    Returns:
        By label without differences of case and separators (`engine.job.class_lookup.folded`); empty without a file.

    Raises:
        JobError: the file cannot be used; all problems, a line each.
    """
    folder = folder.absolute()
    for parent in (folder, *folder.parents[:2]):
        if (path := parent / LABEL_MAP).is_file():
            return _classes(_entries(path, option), labels, f"{option}: {path}")
    return {}


def _entries(path: Path, option: str) -> dict[str, str | None]:
    try:
        document = parse_json(read_whole(path, _MAX_BYTES))
        if isinstance(document, dict) and len(document) > _MAX_LABELS:
            raise ValueError(f"has {len(document)} labels; give {_MAX_LABELS} or fewer")
        return checked_entries(document)
    except OSError as error:
        raise JobError(f"{option}: {path}: cannot be read ({brief(error)})") from None
    except ValueError as error:
        raise JobError(f"{option}: {path}: {error}") from None


def _classes(entries: Mapping[str, str | None], labels: tuple[str, ...], where: str) -> dict[str, int]:
    classes: dict[str, int] = {}
    problems: list[str] = []
    find = find_label(labels, "the target")
    for text, named in entries.items():
        try:
            index = LEFT_OUT if named is None else find(named)
        except ValueError as error:
            problems.append(f"{where}: {error}")
            continue
        if classes.setdefault(folded(text), index) != index:
            problems.append(f"{where}: names {text!r} twice, in other letters; name each label once")
    if problems:
        raise JobError(problems[:20])
    return classes


def as_json(pairs: Any) -> str:
    """A map as the file has it."""
    return json.dumps(pairs, ensure_ascii=False)

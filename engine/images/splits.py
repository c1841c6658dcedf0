"""Splits of a data set that lie in one folder, such as `train` and `test`: they are read one at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from engine.images.tables import names_in

CARD = "README.md"
# Names of Hugging Face's default splits (`datasets`, data_files.SPLIT_KEYWORDS).
KEYWORDS = {
    "train": "train", "training": "train",
    "validation": "validation", "valid": "validation", "dev": "validation", "val": "validation",
    "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip
_SEPARATORS = re.compile(r"[-._ 0-9]+")
_SHARDED = re.compile(r"(?P<split>.+)-[0-9]{5}-of-[0-9]{5}.*")
_MAX_CARD_BYTES = 2**22


def split_of(place: str) -> str:
    """The split that a file belongs to by its name, or by that of a folder of its own; empty where nothing says."""
    *folders, name = PurePosixPath(place).parts
    if match := _SHARDED.fullmatch(name):
        return match["split"]
    return keyword_in(name) or next(filter(None, map(keyword_in, reversed(folders))), "")


def keyword_in(name: str) -> str:
    """The name of a split among the words of a name, as it is written; empty where there is none."""
    return next((word for word in _SEPARATORS.split(name) if word.lower() in KEYWORDS), "")


def is_same_split(first: str, second: str) -> bool:
    """Whether two names are of one split, such as `val` and `validation`."""
    return _canonical(first) == _canonical(second)


def group_by_split(splits: dict[str, str]) -> dict[str, list[str]]:
    """Files by split, in order; equal names of one split come together under the first.

    Args:
        splits: by file.
    """
    groups: dict[str, list[str]] = {}
    for place, split in splits.items():
        same = next((one for one in groups if is_same_split(one, split)), split)
        groups.setdefault(same, []).append(place)
    return groups


def is_several(names: Sequence[str]) -> bool:
    """Whether names speak of more than one split."""
    return len({_canonical(keyword_in(name)) for name in names}) > 1


def _canonical(split: str) -> str:
    return KEYWORDS.get(split.lower(), split)


@dataclass(frozen=True, slots=True)
class Card:
    """What a data set's card (`README.md` with a YAML header) says of its files.

    Attributes:
        splits: files by split, or by `CONFIG/SPLIT` where there are several configurations; empty where it names none.
        class_names: of column `label`; empty where it names none, or several lists.
    """

    splits: dict[str, list[str]]
    class_names: tuple[str, ...]


def read_card(root: Path, places: Sequence[str]) -> Card:
    """The card of a folder; an empty one where there is none that can be read.

    Args:
        places: the data files that its patterns may name.
    """
    header = _header(root / CARD)
    configs = header.get("configs")
    named = [one for one in configs if isinstance(one, dict)] if isinstance(configs, list) else []
    splits: dict[str, list[str]] = {}
    for config in named:
        prefix = f"{config.get('config_name', 'default')}/" if len(named) > 1 else ""
        for split, patterns in _patterns(config):
            matched = [place for place in places if any(_matches(place, one) for one in patterns)]
            if matched:
                splits.setdefault(prefix + split, []).extend(matched)
    return Card(splits, _class_names(header.get("dataset_info")) or _older_class_names(root))


def _older_class_names(root: Path) -> tuple[str, ...]:
    """Class names in the files that older versions of `datasets` put beside the data."""
    infos: list[Any] = []
    for name in ("dataset_infos.json", "dataset_info.json"):
        try:
            if (root / name).stat().st_size <= _MAX_CARD_BYTES:
                found = json.loads((root / name).read_text(encoding="utf-8"))
                infos += found.values() if isinstance(found, dict) and name == "dataset_infos.json" else [found]
        except (OSError, ValueError, RecursionError):
            continue
    names = {
        names_in(one["features"].get("label"))
        for one in infos
        if isinstance(one, dict) and isinstance(one.get("features"), dict)
    }
    return next(iter(names)) if len(names) == 1 else ()


def _header(path: Path) -> dict[str, Any]:
    """The YAML between the first two lines of dashes."""
    import yaml

    try:
        if path.stat().st_size > _MAX_CARD_BYTES:
            return {}
        text = path.read_text(encoding="utf-8-sig")
        match = re.match(r"---[ \t]*\n(.*?)\n---[ \t]*(\n|$)", text.replace("\r\n", "\n"), re.DOTALL)
        header = yaml.safe_load(match[1]) if match else None
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    return header if isinstance(header, dict) else {}


def _patterns(config: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """Splits of a configuration with the patterns of their files (`datasets`, data_files.sanitize_patterns)."""
    folder, files = config.get("data_dir"), config.get("data_files")
    prefix = f"{folder}/" if isinstance(folder, str) else ""
    if files is None:
        return []
    entries = files if isinstance(files, list) else [files]
    if all(isinstance(one, str) for one in entries):
        return [("train", [prefix + one for one in entries])]
    if isinstance(files, dict) and "path" not in files:
        return [(str(split), [prefix + one for one in _texts(path)]) for split, path in files.items()]
    return [
        (str(one.get("split", "train")), [prefix + path for path in _texts(one.get("path"))])
        for one in entries
        if isinstance(one, dict)
    ]


def _texts(value: Any) -> list[str]:
    return [one for one in (value if isinstance(value, list) else [value]) if isinstance(one, str)]


def _matches(place: str, pattern: str) -> bool:
    """Whether a pattern of a card names a file: `*` within a folder, `**` over folders."""
    expression = ""
    for part in re.findall(r"\*\*/|\*\*|\*|\?|\[[^\]]*\]|.", pattern.removeprefix("./"), re.DOTALL):
        known = {"**/": "(.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
        expression += known.get(part) or (part if part.startswith("[") and len(part) > 2 else re.escape(part))
    try:
        return re.fullmatch(expression, place) is not None
    except re.error:
        return False


def _class_names(info: Any) -> tuple[str, ...]:
    """Class names of column `label` in a card's `dataset_info`, of one configuration or of several that agree."""
    found: set[tuple[str, ...]] = set()
    for one in info if isinstance(info, list) else [info]:
        features = one.get("features") if isinstance(one, dict) else None
        for feature in features if isinstance(features, list) else []:
            if isinstance(feature, dict) and feature.get("name") == "label" and isinstance(feature.get("dtype"), dict):
                found.add(names_in(feature["dtype"].get("class_label")))
    return next(iter(found)) if len(found) == 1 else ()

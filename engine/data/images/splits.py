"""Splits of a data set that lie in one folder, such as `train` and `test`: they are read one at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from engine.data.images.parquet_files import names_in
from engine.models.untrusted_files import read_whole

CARD = "README.md"
# Names of Hugging Face's default splits (`datasets`, data_files.SPLIT_KEYWORDS).
KEYWORDS = {
    "train": "train", "training": "train",
    "validation": "validation", "valid": "validation", "dev": "validation", "val": "validation",
    "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip
_SEPARATORS = re.compile(r"[-._ 0-9=]+")
_SHARDED = re.compile(r"(?P<split>.+)-[0-9]{5}-of-[0-9]{5}.*")
_MAX_CARD_BYTES = 2**22


def split_of(place: str) -> str:
    """The split of a file by its name, or by that of a folder above it; empty where neither names one."""
    *folders, name = PurePosixPath(place).parts
    if match := _SHARDED.fullmatch(name):
        return match["split"]
    return keyword_in(name) or next(filter(None, map(keyword_in, reversed(folders))), "")


def configurations_of(places: Sequence[str]) -> list[str]:
    """The folders that each have a split of their own: both contain the same file of the split.

    Args:
        places: files of one split, as `split_of` has it.

    Returns:
        Nothing where the files are of one configuration.
    """
    below: dict[str, set[str]] = {}
    for place in places:
        *folders, name = PurePosixPath(place).parts
        is_in_name = bool(_SHARDED.fullmatch(name) or keyword_in(name))
        depths = [len(folders)] if is_in_name else [row for row, folder in enumerate(folders) if keyword_in(folder)]
        depth = max(depths, default=0)
        below.setdefault("/".join([*folders, name][depth:]), set()).add("/".join(folders[:depth]))
    is_one = all(len(homes) == 1 for homes in below.values())
    return [] if is_one else sorted(set[str]().union(*below.values()))


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
        same = next((group for group in groups if is_same_split(group, split)), split)
        groups.setdefault(same, []).append(place)
    return groups


def is_several(names: Sequence[str]) -> bool:
    """Whether names speak of more than one split."""
    return len({_canonical(keyword_in(name)) for name in names}) > 1


def _canonical(split: str) -> str:
    return KEYWORDS.get(split.lower(), split)


def card_class_names(folder: Path) -> tuple[str, ...] | None:
    """Class names of column `label` in a data set's card, or in the files that older versions of `datasets` write.

    Of the nearest folder that has some: this one, or the two above it, as files may lie in `data/`.

    Returns:
        None where there are several lists, of several configurations, so that none is known to be a file's.
    """
    folder = folder.absolute()
    for parent in (folder, *folder.parents[:2]):
        if lists := {names for feature in _label_features(parent) if (names := names_in(feature))}:
            return next(iter(lists)) if len(lists) == 1 else None
    return ()


def _label_features(folder: Path) -> Iterator[Any]:
    """The feature `label` in every description of a folder's data."""
    info = _header(folder / CARD).get("dataset_info")
    infos = [*(info if isinstance(info, list) else [info]), *_older_infos(folder)]
    for features in (info.get("features") for info in infos if isinstance(info, dict)):
        if isinstance(features, dict):
            yield features.get("label")
        for feature in features if isinstance(features, list) else []:
            if isinstance(feature, dict) and feature.get("name") == "label" and isinstance(feature.get("dtype"), dict):
                yield feature["dtype"].get("class_label")


def _older_infos(folder: Path) -> Iterator[Any]:
    for name in ("dataset_infos.json", "dataset_info.json"):
        try:
            document = json.loads(read_whole(folder / name, _MAX_CARD_BYTES))
            yield from document.values() if isinstance(document, dict) and name == "dataset_infos.json" else [document]
        except (OSError, ValueError, RecursionError):
            continue


def read_splits(root: Path, places: Sequence[str]) -> dict[str, list[str]]:
    """Files by split as the card of a folder has them (`configs`), by `CONFIG/SPLIT` where there are several.

    Args:
        places: the data files that its patterns may name.
    """
    named = _configs(root)
    splits: dict[str, list[str]] = {}
    for config in named:
        prefix = f"{config.get('config_name', 'default')}/" if len(named) > 1 else ""
        for split, patterns in _patterns(config):
            matched = [place for place in places if any(_matches(place, pattern) for pattern in patterns)]
            if matched:
                splits.setdefault(prefix + split, []).extend(matched)
    return splits


def has_splits(root: Path) -> bool:
    """Whether the card of a folder names splits of its files."""
    return any(_patterns(config) for config in _configs(root))


def _configs(root: Path) -> list[dict[str, Any]]:
    configs = _header(root / CARD).get("configs")
    return [config for config in configs if isinstance(config, dict)] if isinstance(configs, list) else []


def _header(path: Path) -> dict[str, Any]:
    """The YAML between the first two lines of dashes."""
    import yaml

    try:
        text = read_whole(path, _MAX_CARD_BYTES).decode("utf-8-sig")
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
    if all(isinstance(entry, str) for entry in entries):
        return [("train", [prefix + entry for entry in entries])]
    if isinstance(files, dict) and "path" not in files:
        return [(str(split), [prefix + pattern for pattern in _texts(path)]) for split, path in files.items()]
    return [
        (str(entry.get("split", "train")), [prefix + path for path in _texts(entry.get("path"))])
        for entry in entries
        if isinstance(entry, dict)
    ]


def _texts(value: Any) -> list[str]:
    return [item for item in (value if isinstance(value, list) else [value]) if isinstance(item, str)]


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

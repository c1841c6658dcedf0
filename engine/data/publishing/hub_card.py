"""The card as the Hub reads it: cards of earlier versions lack what their data set is read by."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import yaml

from engine.data.run.card import card_config
from engine.errors import CorruptShardError, first_line

_HEADER = re.compile(r"\A---[ \t]*\r?\n(?P<header>.*?)^---[ \t]*(?:\r?\n|\Z)", re.DOTALL | re.MULTILINE)
# In C where that was built; both read plain data alone.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
CONFIGS, INFO = "configs", "dataset_info"


def read_header(card: str, where: str) -> dict[str, Any]:
    """The header of a card; empty where it has none.

    Raises:
        CorruptShardError: it is no mapping in YAML.
    """
    match = _HEADER.match(card)
    try:
        header = yaml.load(match["header"], _LOADER) if match else {}
    except yaml.YAMLError as error:
        raise CorruptShardError(f"{where}: its header is not YAML ({first_line(error)}); correct it") from None
    if not isinstance(header or {}, dict):
        raise CorruptShardError(f"{where}: its header is not a mapping; correct it")
    return header or {}


@dataclass(frozen=True, slots=True)
class HubCard:
    """A card that says which files are data, and of which types.

    Attributes:
        patterns: of the files that it declares as data.
    """

    text: str
    patterns: list[str]


def completed_card(
    card: str, where: str, data_files: list[str], features: Callable[[], list[dict[str, Any]]] | None
) -> HubCard:
    """A card with what its header lacks; what it says already stays as it is.

    Args:
        where: the card, for messages.
        data_files: patterns of the data files.
        features: gives the types of the columns; None where the files state them.

    Raises:
        CorruptShardError: the header cannot be read.
    """
    header = read_header(card, where)
    lacking: dict[str, Any] = {}
    if CONFIGS not in header:
        lacking[CONFIGS] = [card_config(data_files, card)]
    if INFO not in header and features is not None:
        lacking[INFO] = {"features": features()}
    return HubCard(_with_keys(card, lacking), _patterns((header | lacking)[CONFIGS]))


def _with_keys(card: str, lacking: dict[str, Any]) -> str:
    """A card with these keys at the end of its header."""
    if not lacking:
        return card
    text = yaml.safe_dump(lacking, sort_keys=False, allow_unicode=True)
    match = _HEADER.match(card)
    if match is None:
        return f"---\n{text}---\n\n{card}"
    return f"{card[: match.end('header')]}{text}{card[match.end('header') :]}"


def _patterns(configs: Any) -> list[str]:
    patterns: list[str] = []
    waiting = [configs]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            patterns.append(value)
        elif isinstance(value, list):
            waiting += value
        elif isinstance(value, dict):
            waiting += [value[key] for key in ("data_files", "path") if key in value]
    return patterns


def matches(name: str, pattern: str) -> bool:
    """Whether a pattern of a card selects a file: `*` and `?` match within a folder, `**` any folders."""
    *folders, last = pattern.split("/")
    above = "".join("(?:[^/]+/)*" if part == "**" else f"{_part(part)}/" for part in folders)
    return re.fullmatch(above + (".+" if last == "**" else _part(last)), name) is not None


def _part(part: str) -> str:
    return re.escape(part).replace(r"\*", "[^/]*").replace(r"\?", "[^/]")

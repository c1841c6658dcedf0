"""Notices in the files of a run: what the hardware made workers do otherwise than the job says."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from engine.terminal import ELLIPSIS, printable, redacted

# Of a shard; texts of libraries can be of any length and number.
MAX_NOTICES = 20
MAX_NOTICE_CHARS = 300
# Of a manifest, and of a session on a terminal.
MAX_DISTINCT = 100


def storable(texts: Iterable[str]) -> list[str]:
    """Texts as a commit record holds them: distinct lines without passwords and control characters, all bounded."""
    return list(dict.fromkeys(line for text in texts if (line := one_line(text))))[:MAX_NOTICES]


def unstored(texts: Iterable[str], stored: Iterable[str]) -> list[str]:
    """Those of some texts that a record does not hold: it is of another try, or was full."""
    held = set(stored)
    return [text for text in texts if not held.issuperset(storable([text]))]


def one_line(text: str) -> str:
    """A text without passwords, control characters and line breaks, cut to `MAX_NOTICE_CHARS`."""
    # Without passwords before it is cut: half an address shows no longer that it has one.
    line = printable(" ".join(redacted(text).split())[: MAX_NOTICE_CHARS + 1])
    return line if len(line) <= MAX_NOTICE_CHARS else line[: MAX_NOTICE_CHARS - 1] + ELLIPSIS


def are_storable(texts: Any) -> bool:
    """Whether a value of a commit record can be its notices."""
    return (
        isinstance(texts, list)
        and len(texts) <= MAX_NOTICES
        and all(isinstance(text, str) and len(text) <= MAX_NOTICE_CHARS for text in texts)
    )


def count_notices(shards: Iterable[Iterable[str]]) -> list[dict[str, Any]]:
    """The first `MAX_DISTINCT` notices of shards in their order, each with the number of shards that have it."""
    counts: dict[str, int] = {}
    for texts in shards:
        for text in map(one_line, texts):
            if text in counts or len(counts) < MAX_DISTINCT:
                counts[text] = counts.get(text, 0) + 1
    return [{"text": text, "shards": num_shards} for text, num_shards in counts.items()]


def known_notices(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """The notices of a manifest; none where an earlier version wrote it, or where they are of another kind."""
    rows = manifest.get("notices")
    known = [row for row in rows[:MAX_DISTINCT] if _is_row(row)] if isinstance(rows, list) else []
    # Others than this program may have written it, too.
    return [{"text": one_line(row["text"]), "shards": row["shards"]} for row in known]


def _is_row(row: Any) -> bool:
    return isinstance(row, dict) and are_storable([row.get("text")]) and type(row.get("shards")) is int


def notice_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Notices as lines of text."""
    return [f"{row['text']} ({row['shards']} shard{'' if row['shards'] == 1 else 's'})" for row in rows]

"""The counts of a shard, and their encoding in the name of its commit record.

    000012.ok=31.rejected=0.failed=1.accepted=20.003-007=3_mix=5.json

is shard 12; the last part counts the accepted samples per class code, runs of equal counts joined. Where it is too
long for a file name it reads `many`, and the counts are inside the record alone.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from engine.job.plan import JOINT_CODE
from engine.job.records import STATUS_FAILED, STATUS_OK, STATUS_REJECTED
from engine.job.spec import JobSpec

MAX_NAME_CHARS = 200
MANY = "many"
NONE = "none"

# Regular expression that finds the keys for which `is_joint` holds.
JOINT_KEY = f"-{JOINT_CODE}-[^-]*$"

_COUNTS = re.compile(r"ok=(\d{1,9})\.rejected=(\d{1,9})\.failed=(\d{1,9})\.accepted=(\d{1,9})\.([a-z0-9=_-]+)\.json")
_RUN = re.compile(rf"(?:(\d{{3,8}})(?:-(\d{{3,8}}))?|{JOINT_CODE})=(\d{{1,9}})")


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardCounts:
    """Samples of a shard by status.

    Attributes:
        accepted_per_class: accepted samples by class code of their keys: `003`, or `mix` for a joint prompt.
    """

    ok: int = 0
    rejected: int = 0
    failed: int = 0
    accepted: int = 0
    accepted_per_class: dict[str, int] = field(default_factory=dict)

    @property
    def attempted(self) -> int:
        """Samples of any status."""
        return self.ok + self.rejected + self.failed


def class_code(key: str) -> str:
    """The class part of a sample's key; empty for a key that no run has made."""
    parts = key.rsplit("-", 2)
    return parts[1] if len(parts) == 3 else ""


def is_joint(key: str) -> bool:
    """Whether a key is of a sample with a joint prompt."""
    return class_code(key) == JOINT_CODE


def count_rows(rows: Iterable[dict[str, Any]]) -> ShardCounts:
    """Count the rows of a shard.

    Args:
        rows: with `key`, `status` and `accepted`.
    """
    statuses: Counter[str] = Counter()
    classes: Counter[str] = Counter()
    for row in rows:
        statuses[row["status"]] += 1
        if row["accepted"]:
            classes[class_code(row["key"])] += 1
    return ShardCounts(
        ok=statuses[STATUS_OK],
        rejected=statuses[STATUS_REJECTED],
        failed=statuses[STATUS_FAILED],
        accepted=classes.total(),
        accepted_per_class=dict(sorted(classes.items())),
    )


def num_stored(job: JobSpec, counts: ShardCounts) -> int:
    """Images in a shard's tar: those of rejected samples too, where the job stores them."""
    return counts.ok + (counts.rejected if job.output.store_rejected else 0)


def record_name(number: int, counts: ShardCounts) -> str:
    """File name of a shard's commit record, at most 200 characters."""
    head = f"{number:06d}.ok={counts.ok}.rejected={counts.rejected}.failed={counts.failed}.accepted={counts.accepted}."
    classes = _classes_text(counts.accepted_per_class)
    if len(head) + len(classes) + len(".json") > MAX_NAME_CHARS:
        classes = MANY
    return f"{head}{classes}.json"


def parse_record_name(name: str) -> tuple[int, ShardCounts | None] | None:
    """Shard number and counts of a record's name; equal counts are one shared object.

    Returns:
        None for the name of something else; no counts where only the record has them.
    """
    number, _, rest = name.partition(".")
    if not (number.isascii() and number.isdigit() and 6 <= len(number) <= 15):
        return None
    counts = _parse_counts(rest)
    return (int(number), counts[0]) if counts else None


@functools.lru_cache(maxsize=8192)
def _parse_counts(text: str) -> tuple[ShardCounts | None] | None:
    match = _COUNTS.fullmatch(text)
    if match is None:
        return None
    if match[5] == MANY:
        return (None,)
    ok, rejected, failed, accepted = map(int, match.groups()[:4])
    classes = _parse_classes(match[5], accepted)
    if classes is None:
        return None
    return (ShardCounts(ok=ok, rejected=rejected, failed=failed, accepted=accepted, accepted_per_class=classes),)


def _classes_text(counts: dict[str, int]) -> str:
    """Counts per class code as `003-007=3_mix=5`."""
    numbers = sorted(int(code) for code in counts if code != JOINT_CODE)
    parts = []
    # Numbers of one run have the same distance to their place, and the same count.
    places = ((number - place, counts[f"{number:03d}"], number) for place, number in enumerate(numbers))
    for (_, count), group in itertools.groupby(places, key=lambda item: item[:2]):
        run = [number for _, _, number in group]
        parts.append(f"{run[0]:03d}={count}" if len(run) == 1 else f"{run[0]:03d}-{run[-1]:03d}={count}")
    if JOINT_CODE in counts:
        parts.append(f"{JOINT_CODE}={counts[JOINT_CODE]}")
    return "_".join(parts) or NONE


def _parse_classes(text: str, accepted: int) -> dict[str, int] | None:
    if text == NONE:
        return {}
    counts: dict[str, int] = {}
    for part in text.split("_"):
        match = _RUN.fullmatch(part)
        if match is None:
            return None
        first, last, count = match.groups()
        if first and int(last or first) - int(first) >= accepted:
            return None  # More classes than accepted samples.
        codes = (
            [JOINT_CODE] if first is None else [f"{number:03d}" for number in range(int(first), int(last or first) + 1)]
        )
        counts.update(dict.fromkeys(codes, int(count)))
    return counts

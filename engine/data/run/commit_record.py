"""A commit record: the proof that a shard is whole, with the checksums of its files."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from engine.data.run.companions import TarFacts, companion_name, parse_companions
from engine.data.run.counts import ShardCounts, record_name
from engine.data.run.notices import MAX_NOTICE_CHARS, MAX_NOTICES, are_storable
from engine.data.run.shards import SHARDS
from engine.errors import MAX_REASON_CHARS, CorruptShardError, OutputError
from engine.methods.strict_json import parse_json

COMMITS = "_state/commits"

RECORD_VERSION = 1

# Of a row of a `ScreeningTally`.
TALLY_COLUMNS = 4
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*-\d{6,}")


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitRecord:
    """A commit record.

    Attributes:
        shard: number of the shard.
        name: name of its files without extension.
        request, start, stop: the samples, as in `ShardSpec`.
        attempt, worker: the try that made the published files.
        timing: seconds by name, as measured by the worker; empty where the files of another try were adopted.
        screening: rows of a `ScreeningTally`; empty where nothing was screened.
        notices: what the hardware made the worker do otherwise than the job says, since its last shard.
        companions: tars with second images of its samples, by their folder; none in most runs.
    """

    shard: int
    name: str
    plan_digest: str
    request: int
    start: int
    stop: int
    attempt: int
    worker: str
    counts: ShardCounts
    tar_sha256: str
    tar_md5: str
    tar_bytes: int
    parquet_sha256: str
    parquet_bytes: int
    timing: dict[str, float]
    screening: list[list[int]] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    companions: Mapping[str, TarFacts] = field(default_factory=dict)

    @property
    def file_name(self) -> str:
        """Name of the record in the store."""
        return f"{COMMITS}/{record_name(self.shard, self.counts)}"

    @property
    def files(self) -> dict[str, tuple[str, int]]:
        """Checksum (SHA-256) and bytes of the files of the shard by name in the store, in order of publishing."""
        facts = [(self.tar_sha256, self.tar_bytes), (self.parquet_sha256, self.parquet_bytes)]
        facts += [(companion.sha256, companion.bytes) for companion in self.companions.values()]
        return dict(zip(file_names(self.name, self.companions), facts, strict=True))

    def to_json(self) -> str:
        """The record as one line."""
        fields = {"record_version": RECORD_VERSION} | dataclasses.asdict(self)
        for name in ("notices", "companions"):
            if not fields[name]:
                # Versions before a field refuse a record that has it: they go on with the runs that do not need it.
                del fields[name]
        return json.dumps(fields, allow_nan=False)


def file_pair(shard_name: str) -> tuple[str, str]:
    """Names of the tar and the parquet of a shard."""
    return f"{SHARDS}/{shard_name}.tar", f"{SHARDS}/{shard_name}.parquet"


def file_names(shard_name: str, companions: Iterable[str]) -> list[str]:
    """Names of all files of a shard with these companions, in order of publishing."""
    return [*file_pair(shard_name), *(companion_name(kind, shard_name) for kind in companions)]


def parse_record(where: str, text: str | bytes | OutputError) -> CommitRecord:
    """A record from its text, or from why the text could not be read.

    Raises:
        CorruptShardError: it is not a record, or could not be read.
    """
    if isinstance(text, OutputError):
        raise CorruptShardError(f"{text}; or remove it to make the shard again") from text
    try:
        raw = parse_json(text)
        if raw.pop("record_version") != RECORD_VERSION:
            raise ValueError("of another version")
        counts = ShardCounts(**raw["counts"])
        # Class codes and counts that have no name are not ours.
        record_name(0, counts)
        companions = parse_companions(raw.get("companions", {}))
        record = CommitRecord(**raw | {"counts": counts, "companions": companions})
        _check_fields(record)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        reason = str(error)[:MAX_REASON_CHARS]
        remedy = "remove it to make the shard again"
        raise CorruptShardError(f"{where}: not a commit record ({reason}); {remedy}") from error
    return record


def _check_fields(record: CommitRecord) -> None:
    """Refuse a record whose fields are of other types, or whose name is not that of a shard's files.

    Raises:
        ValueError: with the field.
    """
    for name in ("shard", "request", "start", "stop", "attempt", "tar_bytes", "parquet_bytes"):
        if type(value := getattr(record, name)) is not int or value < 0:
            raise ValueError(f"{name} is not a whole number: {value!r}")
    for name in ("name", "plan_digest", "worker", "tar_sha256", "tar_md5", "parquet_sha256"):
        if not isinstance(value := getattr(record, name), str):
            raise ValueError(f"{name} is not a text: {value!r}")
    if not _NAME.fullmatch(record.name):
        raise ValueError(f"name {record.name!r} is not that of a shard")
    timing = record.timing
    if not isinstance(timing, dict) or not all(type(seconds) in (int, float) for seconds in timing.values()):
        raise ValueError(f"timing is not seconds by name: {timing!r}")
    rows = record.screening
    if not isinstance(rows, list) or not all(map(_is_tally_row, rows)):
        raise ValueError(f"screening is not rows of {TALLY_COLUMNS} counts: {rows!r}")
    if not are_storable(record.notices):
        raise ValueError(f"notices is not at most {MAX_NOTICES} texts of {MAX_NOTICE_CHARS} characters")


def _is_tally_row(row: Any) -> bool:
    return isinstance(row, list) and len(row) == TALLY_COLUMNS and all(type(number) is int for number in row)

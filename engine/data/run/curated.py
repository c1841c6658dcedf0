"""The files of a curated run: what it was selected from, by which reward, and what was drawn.

A curated run is a run of its own with the samples of its parent: `engine.studies.curate` writes it. Its plan has the
identity of the parent's and the key `curation`; its folder `curation` has `curation.json` and `selection.parquet`,
which are there before its first shard is, and what a learned reward leaves.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from engine.data.run.file_names import CURATION, CURATION_DOCUMENT, CURATION_FILES, SELECTION
from engine.data.run.stored_plan import read_run
from engine.data.stores.base import Store
from engine.data.stores.file_errors import is_no_file
from engine.errors import MAX_REASON_CHARS, CorruptShardError, OutputError
from engine.job.plan import Plan
from engine.methods.strict_json import parse_json

Part = TypeVar("Part")

CURATION_VERSION = 1
# Key of a manifest and of a plan's identity.
KEY = "curation"
AMONG = ("run", "class")
# Ancestors of a curated run of a curated run, the nearest first.
MAX_ANCESTORS = 1000
# Of names and addresses; no path is longer.
MAX_TEXT_CHARS = 4096
# Commands that make what is missing of a run, for messages.
REMAKE_RUN = "`riskforge run` with the same job"
REMAKE_CURATED = "`riskforge curate` with the same options"
_REMEDY = f"{REMAKE_CURATED} writes it again"


@dataclass(frozen=True, slots=True, kw_only=True)
class ParentRun:
    """The run that another was selected from, or one of its ancestors.

    Attributes:
        uri: its address; a folder's is relative to the curated run, where both are folders. Of an ancestor it is
            empty: the run that was selected from it states it.
        name: of its job.
        plan_digest: of its plan.
        shards_digest: of its committed tars.
    """

    uri: str
    name: str
    plan_digest: str
    shards_digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassCount:
    """Samples of a class among the candidates and among the selected ones."""

    class_index: int
    name: str
    candidates: int
    selected: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Proportion:
    """A share, or a correlation, with its interval; `total` is the number of observations, 0 where it has none."""

    value: float
    low: float
    high: float
    total: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardRecord:
    """The reward that a run was curated by.

    Attributes:
        name: as the user gave it: a column, `package.module:function`, or the file of preferences.
        kind: `column`, `function`, `preferences` or `values`, of which nothing more is known.
        digest: of everything that decides its values; part of the plan's identity.
        model: of a learned reward `linear` or `network`; else empty.
        num_records: preferences that it was trained on; 0 where it was not learned.
        num_removed: preferences that a defence removed before.
        defence: its name, or empty.
        accuracy: on records that did not train it.
    """

    name: str
    kind: str
    digest: str
    model: str = ""
    num_records: int = 0
    num_removed: int = 0
    defence: str = ""
    accuracy: Proportion | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MonitorRecord:
    """What the monitor says of a learned reward, over all rounds that it continues (`methods.curation.monitor`).

    Attributes:
        e_value: the wealth now; finite.
        highest: the largest so far, by which the alarm is raised.
        level: the alarm is raised where `highest` reached 1 / level.
        num_audited: records that trusted raters judged again.
        num_differing: those in which the choices differ.
        covariance: over the candidates, of `e^R` of a reward fitted to trusted choices and `e^R~` of the learned one.
        correlation: the same, scaled to [-1, 1], with its interval.
        after: address of the earlier curated run whose state was continued; empty where this is the first.
    """

    e_value: float
    highest: float
    alarm: bool
    level: float
    num_audited: int
    num_differing: int
    covariance: float | None = None
    correlation: Proportion | None = None
    after: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Curation:
    """The content of `curation.json`, and of a manifest's `curation`.

    Attributes:
        parent: the run it was selected from.
        ancestors: of a parent that is curated itself, the nearest first.
        group_size: K, candidates of which one is selected.
        among: `run`, or `class` where a group has samples of one class.
        seed: of the groups and the draws.
        scale: factor of the rewards.
        num_candidates: samples of the parent that are stored, accepted and within their quota.
        num_groups: of them; one sample of each is selected.
        num_left_over: candidates that fill no group.
        mean_reward: of all candidates, before the scale.
        mean_reward_selected: of the selected ones.
        classes: candidates and selected samples by class.
        files: checksums (SHA-256) of the other files of the folder, by name.
    """

    parent: ParentRun
    ancestors: tuple[ParentRun, ...]
    reward: RewardRecord
    monitor: MonitorRecord | None
    group_size: int
    among: str
    seed: int
    scale: float
    num_candidates: int
    num_groups: int
    num_left_over: int
    mean_reward: float
    mean_reward_selected: float
    classes: tuple[ClassCount, ...]
    files: Mapping[str, str]

    @property
    def num_selected(self) -> int:
        """Selected samples: one of each group."""
        return self.num_groups

    def to_document(self) -> dict[str, Any]:
        """The curation as plain data."""
        return {"curation_version": CURATION_VERSION} | json.loads(json.dumps(asdict(self), allow_nan=False))


def parse_curation(document: Any) -> Curation:
    """A curation from plain data, which anybody may have written.

    Raises:
        ValueError: a field is missing, unknown or of another type, or its counts contradict each other.
    """
    fields = _fields(document, "curation", Curation, ("curation_version",))
    version = fields.pop("curation_version")
    if type(version) is not int or version != CURATION_VERSION:
        raise ValueError("it is of another version")
    parts = {
        "parent": _parent(fields["parent"]),
        "ancestors": tuple(map(_parent, _list(fields["ancestors"], "ancestors", MAX_ANCESTORS))),
        "reward": _reward(fields["reward"]),
        "monitor": None if fields["monitor"] is None else _monitor(fields["monitor"]),
        "classes": tuple(_part(entry, "classes", ClassCount) for entry in _list(fields["classes"], "classes")),
        "files": _checksums(fields["files"]),
    }
    _check_plain(fields, Curation, without=parts)
    curation = Curation(**fields | parts)
    if curation.among not in AMONG or curation.group_size < 1:
        raise ValueError("its options are not those of a curation")
    if curation.num_groups * curation.group_size + curation.num_left_over != curation.num_candidates:
        raise ValueError("its groups and the candidates left over are not all candidates")
    totals = [sum(getattr(count, name) for count in curation.classes) for name in ("candidates", "selected")]
    if totals != [curation.num_candidates, curation.num_selected]:
        raise ValueError("its classes have other numbers of samples than it states")
    return curation


def curation_of(manifest: Mapping[str, Any]) -> Curation | None:
    """The curation of a manifest; None of a run that was not curated.

    Raises:
        ValueError: it is of another kind than `riskforge curate` writes.
    """
    return parse_curation(manifest[KEY]) if KEY in manifest else None


def is_curated(plan: Plan) -> bool:
    """Whether a plan is that of a curated run."""
    return KEY in plan.identity


def remake_command(plan: Plan) -> str:
    """The command that makes what is missing of a run, for messages."""
    return REMAKE_CURATED if is_curated(plan) else REMAKE_RUN


def check_not_curated(store: Store) -> None:
    """Refuse to sample into a curated run: its samples are those that its parent has.

    Raises:
        OutputError: the output holds one.
    """
    stored = read_run(store)
    if stored is not None and KEY in stored.identity:
        raise OutputError(
            f"output {store.uri}: holds a curated run, in which nothing is sampled; `riskforge curate` with the same"
            " options continues it. Choose another --output, or remove it with --resume overwrite --yes"
        )


def read_curation(store: Store) -> Curation:
    """The curation of a curated run, from its own folder.

    Raises:
        CorruptShardError: `curation.json` is missing or damaged.
    """
    if (curation := find_curation(store)) is None:
        raise CorruptShardError(f"{store.address(CURATION_DOCUMENT)}: is missing; {_REMEDY}")
    return curation


def find_curation(store: Store) -> Curation | None:
    """As `read_curation`; None where there is no `curation.json`."""
    try:
        return parse_curation(parse_json(store.read(CURATION_DOCUMENT)))
    except OutputError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return None
        if not is_no_file(error):
            raise
        reason = str(error)
    except (ValueError, TypeError) as error:
        reason = str(error)
    raise CorruptShardError(
        f"{store.address(CURATION_DOCUMENT)}: is not that of a curated run ({reason[:MAX_REASON_CHARS]}); remove it,"
        f" and {_REMEDY}"
    )


def describes(curation: Curation, plan: Plan) -> bool:
    """Whether a curation is the one that the identity of a plan states."""
    stated = {
        "parent": curation.parent.plan_digest,
        "shards": curation.parent.shards_digest,
        "candidates": curation.group_size,
        "among": curation.among,
        "seed": curation.seed,
        "scale": curation.scale,
    }
    identity = plan.identity[KEY]
    if not isinstance(identity, dict) or not isinstance(reward := identity.get("reward"), dict):
        return False
    is_same_reward = (reward.get("kind"), reward.get("digest")) == (curation.reward.kind, curation.reward.digest)
    return is_same_reward and all(identity.get(name) == value for name, value in stated.items())


def damaged_files(store: Store, curation: Curation) -> list[str]:
    """Names of the other files of the folder that are missing or not those that were written."""
    return [name for name, checksum in curation.files.items() if _checksum_of(store, name) != checksum]


def _checksum_of(store: Store, name: str) -> str:
    """The checksum of a file; empty where there is none, or something else has its name."""
    try:
        path = store.fetch(f"{CURATION}/{name}")
    except OutputError as error:
        if is_no_file(error):
            return ""
        raise
    return file_checksum(path) if path.is_file() else ""


def file_checksum(data: bytes | Path) -> str:
    """SHA-256 of a file of the folder."""
    if isinstance(data, bytes):
        return hashlib.sha256(data).hexdigest()
    with data.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _parent(value: Any) -> ParentRun:
    return _part(value, "parent", ParentRun)


def _reward(value: Any) -> RewardRecord:
    fields = _fields(value, "reward", RewardRecord)
    parts = {"accuracy": _proportion(fields["accuracy"], "accuracy")}
    _check_plain(fields, RewardRecord, without=parts)
    return RewardRecord(**fields | parts)


def _monitor(value: Any) -> MonitorRecord:
    fields = _fields(value, "monitor", MonitorRecord)
    covariance = fields["covariance"]
    if covariance is not None and not _is_number(covariance):
        raise ValueError(f"monitor.covariance is {covariance!r}")
    parts = {"correlation": _proportion(fields["correlation"], "correlation"), "covariance": covariance}
    _check_plain(fields, MonitorRecord, without=parts)
    if not 0 < fields["level"] < 1:
        raise ValueError(f"monitor.level is {fields['level']}")
    return MonitorRecord(**fields | parts)


def _proportion(value: Any, where: str) -> Proportion | None:
    return None if value is None else _part(value, where, Proportion)


def _part(value: Any, where: str, kind: type[Part]) -> Part:
    """A part whose fields are all plain."""
    fields = _fields(value, where, kind)
    _check_plain(fields, kind)
    return kind(**fields)


def _fields(value: Any, where: str, kind: type, more: tuple[str, ...] = ()) -> dict[str, Any]:
    """The fields of a part by name; all of them, and no others."""
    names = {*kind.__dataclass_fields__, *more}  # type: ignore[attr-defined]
    if not isinstance(value, dict) or value.keys() != names:
        raise ValueError(f"{where} has other fields than {', '.join(sorted(names))}")
    return dict(value)


def _check_plain(fields: dict[str, Any], kind: type, without: Collection[str] = ()) -> None:
    """Check that the plain fields of a part are of their types; counts are not negative."""
    for name, field in kind.__dataclass_fields__.items():  # type: ignore[attr-defined]
        value = fields[name]
        if name not in without and not _FITS[field.type](value):
            raise ValueError(f"{name} is {str(value)[:MAX_REASON_CHARS]!r}")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


_FITS = {
    "str": lambda value: type(value) is str and len(value) <= MAX_TEXT_CHARS,
    "int": lambda value: type(value) is int and value >= 0,
    "float": _is_number,
    "bool": lambda value: type(value) is bool,
}


def _list(value: Any, where: str, most: int | None = None) -> list[Any]:
    if not isinstance(value, list) or (most is not None and len(value) > most):
        raise ValueError(f"{where} is not a list of its parts")
    return value


def _checksums(value: Any) -> dict[str, str]:
    known = {name.removeprefix(f"{CURATION}/") for name in CURATION_FILES if name != CURATION_DOCUMENT}
    is_complete = isinstance(value, dict) and SELECTION.removeprefix(f"{CURATION}/") in value
    if not is_complete or not value.keys() <= known or not all(map(_FITS["str"], value.values())):
        raise ValueError("files is not a checksum for each file of the folder")
    return dict(value)


def manifest_part(store: Store, plan: Plan) -> dict[str, Any]:
    """What the manifest of a curated run has more than that of its parent; nothing of any other run.

    Raises:
        CorruptShardError: `curation.json` is missing or damaged.
    """
    return {KEY: read_curation(store).to_document()} if is_curated(plan) else {}

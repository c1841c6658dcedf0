"""Whether a run or an export is complete, by records, listings and the ends of files; no shard is read."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, NoReturn

from engine.data.reading.source import reading_rows
from engine.data.run.commits import list_commits
from engine.data.run.curated import remake_command
from engine.data.run.file_names import MANIFEST, METADATA, REPORT, SUCCESS, TWINS_TABLE, WIDS_INDEX
from engine.data.run.foreign_files import list_names
from engine.data.run.manifest_reading import manifest_error
from engine.data.run.presence import loss_lines, lost_files, torn_files
from engine.data.run.quarantine import quarantined_shards
from engine.data.run.shards import SHARDS
from engine.data.run.stored_plan import stored_plan
from engine.data.stores.base import Store
from engine.errors import CorruptShardError, OutputError
from engine.job.plan import Plan
from engine.methods.strict_json import parse_json

_PARQUET_END = b"PAR1"
_TRAIN_FILE = re.compile(r"train-\d{5,}-of-(\d{5,15})\.parquet")


def check_run(store: Store) -> Plan:
    """Refuse a run that is not complete, or of which files are lost.

    Raises:
        OutputError: work is left, with the command that does it.
        CorruptShardError: files are missing or not whole.
    """
    _, plan = stored_plan(store)
    remake, quarantined = remake_command(plan), quarantined_shards(store)
    num_committed = len(list_commits(store))
    if not store.exists(SUCCESS) or num_committed < plan.num_shards:
        aside = f"; `riskforge retry {store.uri}` retries the {len(quarantined)} in quarantine" if quarantined else ""
        raise OutputError(
            f"RUN: {store.uri} is not complete: {num_committed} of {plan.num_shards} shards are committed, and"
            f" {SUCCESS if not store.exists(SUCCESS) else 'more'} is missing; {remake} continues it{aside}"
        )
    if torn := set(torn_files(store, plan)) - {REPORT}:
        what = "names another plan" if torn == {SUCCESS} else "missing or not whole"
        _damaged(store, f"{list_names(sorted(torn))} {what}; {remake} writes the files again")
    if store.exists(TWINS_TABLE) and store.tail(TWINS_TABLE, 4) != _PARQUET_END:
        _damaged(store, f"{TWINS_TABLE} is not whole; `riskforge evaluate` writes it again, or remove it")
    if lost := lost_files(store):
        first, *lines = loss_lines(store.uri, lost, remake)
        raise CorruptShardError("\n".join([f"RUN: {store.uri} is damaged: {first}", *lines]))
    return plan


def _damaged(store: Store, what: str) -> NoReturn:
    raise CorruptShardError(f"RUN: {store.uri} is damaged: {what}")


def check_data_set(store: Store, manifest: Mapping[str, Any], sizes: Mapping[str, int]) -> None:
    """Refuse an export, or a copy of a run without the engine's own files, that is not whole.

    Args:
        sizes: bytes of its files by name.

    Raises:
        CorruptShardError: files are missing, or not those that its documents list.
    """
    digest = str(manifest.get("digest") or manifest.get("plan_digest"))
    if SUCCESS not in sizes or store.read(SUCCESS).decode(errors="replace").strip() != digest:
        _damaged(store, f"{SUCCESS} is not there, or of other content than {MANIFEST}; make the data set again")
    lost = [name for name, size in _listed_tars(store).items() if sizes.get(name) != size]
    lost += _lost_parquet(sizes) + _lost_images(store, sizes)
    lost += [name for name in sizes if name.endswith(".parquet") and store.tail(name, 4) != _PARQUET_END]
    num_tars = sum(name.startswith(f"{SHARDS}/") and name.endswith(".tar") for name in sizes)
    if not lost and _has_tars(manifest) and num_tars < _num_shards(store, manifest):
        lost = [f"{_num_shards(store, manifest) - num_tars} tars"]
    if lost:
        _damaged(store, f"{list_names(sorted(set(lost)))} missing or not whole; restore it, or make the data set again")


def _has_tars(manifest: Mapping[str, Any]) -> bool:
    return manifest.get("format", "webdataset") == "webdataset"


def _num_shards(store: Store, manifest: Mapping[str, Any]) -> int:
    try:
        return int(manifest["counts"]["shards"]["committed"])
    except (KeyError, TypeError, ValueError) as error:
        raise manifest_error(store, f"counts: {error}") from error


def _listed_tars(store: Store) -> dict[str, int]:
    """Bytes of the tars that the index beside them lists, by name; it lists those with images."""
    if not store.exists(WIDS_INDEX):
        return {}
    try:
        entries = parse_json(store.read(WIDS_INDEX))["shardlist"]
        return {f"{SHARDS}/{entry['url']}": int(entry["filesize"]) for entry in entries}
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptShardError(
            f"{store.address(WIDS_INDEX)}: cannot be read as an index ({error}); make the data set again"
        ) from None


def _lost_parquet(sizes: Mapping[str, int]) -> list[str]:
    """How many files of an export to parquet are missing, by the total in their names."""
    totals = Counter(match[1] for name in sizes if (match := _TRAIN_FILE.fullmatch(name)))
    return [f"{int(total) - count} of train-*-of-{total}" for total, count in totals.items() if count != int(total)]


def _lost_images(store: Store, sizes: Mapping[str, int]) -> list[str]:
    """Images of an export by class that are missing, by its rows."""
    return [name for name in image_names(store) if not sizes.get(name)] if METADATA in sizes else []


def image_names(store: Store) -> list[str]:
    """Images of an export to a folder by class, as its rows list them; none of other data sets."""
    import pyarrow.parquet as pq

    if store.is_folder(METADATA):
        return []
    path = store.fetch(METADATA)
    with reading_rows(store.address(METADATA)):
        if "file_name" not in pq.read_schema(path).names:
            return []
        names: list[str] = pq.read_table(path, columns=["file_name"])["file_name"].to_pylist()
        return names

"""Reading a manifest, and the kind of folder that it describes: a run, a rescoring or an export."""

from __future__ import annotations

from typing import Any

from engine.data.run.file_names import EXPORT_KIND, MANIFEST, RESCORED_FROM
from engine.data.stores.base import Store
from engine.errors import MAX_REASON_CHARS, CorruptShardError, OutputError
from engine.methods.strict_json import parse_json


def read_manifest(store: Store) -> dict[str, Any]:
    """The manifest of a run, a rescoring or an export.

    Raises:
        OutputError: there is no manifest.
        CorruptShardError: it is no JSON object.
    """
    if not store.exists(MANIFEST):
        raise OutputError(f"output {store.uri}: has no {MANIFEST}; finish the run first (`riskforge run`)")
    try:
        manifest = parse_json(store.read(MANIFEST))
        if not isinstance(manifest, dict):
            raise ValueError("it is not a JSON object")
    except ValueError as error:
        raise manifest_error(store, error) from error
    return manifest


def manifest_error(store: Store, reason: object) -> CorruptShardError:
    """The error to raise where a manifest cannot be read, or lacks a required key."""
    return CorruptShardError(
        f"{store.address(MANIFEST)}: cannot be read as a manifest ({str(reason)[:MAX_REASON_CHARS]}); restore the file,"
        " or remove _SUCCESS, and the run's command writes it again"
    )


def check_is_run(store: Store, *, scores: bool = False) -> None:
    """Refuse a folder whose manifest is not that of a run.

    Args:
        scores: whether a rescoring is accepted, too.

    Raises:
        OutputError: it is a merged or exported data set, or has the scores that `rescore` made.
    """
    try:
        manifest = read_manifest(store) if store.exists(MANIFEST) else {}
    except CorruptShardError:
        return
    if manifest.get("kind") == EXPORT_KIND:
        raise OutputError(
            f"{store.uri}: is a merged or exported data set, not a run; give the folder of a run here"
            " (`riskforge inspect`, `merge` and `export` take such a data set)"
        )
    if RESCORED_FROM in manifest and not scores:
        raise OutputError(
            f"{store.uri}: has the scores that `riskforge rescore` made, and no images; give the folder of the run"
            " itself here (`riskforge inspect`, `compare` and `report` take such scores)"
        )

"""Shards that are left out of a run after repeated failures."""

from __future__ import annotations

from pathlib import Path

from engine.data.stores.base import Store

QUARANTINE = "_state/quarantine"


def quarantined_shards(store: Store) -> list[int]:
    """Numbers of the shards that are left out, in order."""
    stems = (Path(name).stem for name in store.list(QUARANTINE) if name.endswith(".json"))
    return sorted(int(stem) for stem in stems if stem.isdigit())

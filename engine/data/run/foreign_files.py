"""Which files of an output a run has written, and which are foreign."""

from __future__ import annotations

import re
from pathlib import Path

from engine.data.review.answers import REVIEW
from engine.data.run.companions import COMPANIONS
from engine.data.run.file_names import CURATION, CURATION_FILES, METADATA, PLANS, RESCORED, RESCORING, RUN_FILES
from engine.data.run.shards import SHARDS
from engine.data.stores.base import STATE, Store
from engine.errors import OutputError

MAX_SHOWN = 8


def check_unused(store: Store) -> None:
    """Refuse a folder without a run that holds other files.

    Raises:
        OutputError: it does, with some of them.
    """
    if store.list(PLANS):
        return
    foreign = [name for name in store.list() if name != STATE]
    if foreign:
        raise OutputError(
            f"output {store.uri}: holds files that are not of a run ({list_names(foreign)}); choose another --output"
        )


def sort_files(store: Store, job_name: str) -> tuple[list[str], list[str]]:
    """The files outside `_state` that a run of this name writes, and all others but the answers of people."""
    stem = rf"{re.escape(job_name)}-\d{{6,}}"
    shard = re.compile(rf"{SHARDS}/{stem}\.(tar|parquet)|({'|'.join(COMPANIONS)})/{stem}\.tar")
    parts = re.compile(rf"{METADATA}/part-\d{{6}}\.parquet")
    own: list[str] = []
    foreign: list[str] = []
    for name in store.list():
        if name == SHARDS or (name in COMPANIONS and store.is_folder(name)):
            for inner in store.list(name):
                is_own = shard.fullmatch(inner) or inner in RUN_FILES
                (own if is_own else foreign).append(inner)
        elif name == METADATA and store.is_folder(name):
            strangers = [inner for inner in store.list(METADATA) if not parts.fullmatch(inner)]
            foreign += strangers
            own += [] if strangers else [name]
        elif name == RESCORED and store.is_folder(name):
            # Scores of removed images are useless.
            strangers = [inner for inner in store.list(RESCORED) if not store.exists(f"{inner}/{RESCORING}")]
            foreign += strangers
            own += [] if strangers else [name]
        elif name == CURATION and store.is_folder(name):
            strangers = [inner for inner in store.list(CURATION) if inner not in CURATION_FILES]
            foreign += strangers
            own += [] if strangers else [name]
        elif name not in (STATE, REVIEW):
            (own if name in RUN_FILES else foreign).append(name)
    return own, foreign


def list_names(names: list[str]) -> str:
    """Some of the names, with control characters escaped."""
    shown = ", ".join(repr(Path(name).as_posix()) for name in names[:MAX_SHOWN])
    return f"{shown} and {len(names) - MAX_SHOWN} more" if len(names) > MAX_SHOWN else shown

"""Whether the files of a run are still there, by listings, sizes and ends of files; `verify` reads every byte."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from engine.data.run.curated import REMAKE_RUN, find_curation, is_curated
from engine.data.run.file_names import (
    CARD,
    CURATION,
    CURATION_DOCUMENT,
    MANIFEST,
    METADATA,
    REPORT,
    SUCCESS,
    SURPLUS_LIST,
    SURPLUS_LIST_SINCE,
    TIMM_INFO,
    WIDS_INDEX,
)
from engine.data.run.manifest_reading import read_manifest
from engine.data.run.recorded_files import recorded_files
from engine.data.run.shards import SHARDS
from engine.data.stores.base import Store
from engine.data.stores.file_errors import is_no_file
from engine.errors import CorruptShardError, OutputError, RiskforgeError
from engine.job.plan import Plan

# The ends of the closing files of a run, without white space.
_ENDS = {CARD: b"", REPORT: b"</html>", WIDS_INDEX: b"]}", TIMM_INFO: b"}"}
_PARQUET_END = b"PAR1"
_TAIL_BYTES = 64
MAX_LISTED = 8


def lost_files(store: Store) -> list[str]:
    """Files of committed shards that are gone or of another size, a line each, with their shard.

    One listing of each folder of shards, and the records; no shard is opened.
    """
    recorded = list(recorded_files(store))
    # After the records: files are published before their record.
    folders = {SHARDS, *(one[1].partition("/")[0] for one in recorded if not isinstance(one, CorruptShardError))}
    sizes = {name: size for folder in folders for name, size in store.sizes(folder).items()}
    lost: list[str] = []
    for recorded_file in recorded:
        if isinstance(recorded_file, CorruptShardError):
            lost.append(str(recorded_file))
            continue
        number, name, num_bytes = recorded_file
        if (size := sizes.get(name)) is None:
            lost.append(f"{name}: is missing, but shard {number} is committed")
        elif size != num_bytes:
            lost.append(f"{name}: has {size} bytes, but {num_bytes} were committed as shard {number}")
    return lost


def check_committed(store: Store, remake: str = REMAKE_RUN) -> None:
    """Refuse to continue where files of committed shards are lost: only the user can know whether they are elsewhere.

    Args:
        remake: the command that makes them again (`curated.remake_command`).

    Raises:
        CorruptShardError: with the files and the remedy.

    Side effects: removes `_SUCCESS` then.
    """
    lost = lost_files(store)
    if not lost:
        return
    store.remove(SUCCESS)
    first, *lines = loss_lines(store.uri, lost, remake)
    raise CorruptShardError("\n".join([f"output {store.uri}: {first}", *lines]))


def loss_lines(uri: str, lost: Sequence[str], remake: str = REMAKE_RUN) -> list[str]:
    """Lost files as lines of a message, with the remedy."""
    return [
        f"of the files of committed shards {len(lost)} {'is' if len(lost) == 1 else 'are'} not there as committed:",
        *(f"  {line}" for line in lost[:MAX_LISTED]),
        *([f"  and {len(lost) - MAX_LISTED} more"] if len(lost) > MAX_LISTED else []),
        f"put them back; or let `riskforge repair {uri}` take these shards out, and {remake} makes them again",
    ]


def is_closed(store: Store, plan: Plan) -> bool:
    """Whether the closing files of a run are there, each with its end."""
    return not any(torn_files(store, plan))


def torn_files(store: Store, plan: Plan) -> Iterator[str]:
    """Names of the closing files of a run that are missing, or incomplete by their ends."""
    # The marker counts by its content: an empty one is void.
    checks = {SUCCESS: lambda: store.read(SUCCESS).decode(errors="replace").strip() == plan.digest}
    checks |= {name: partial(_ends_with, store, name, end) for name, end in _ENDS.items()}
    checks |= {
        MANIFEST: lambda: store.exists(MANIFEST) and bool(read_manifest(store)),
        METADATA: partial(_has_ends, store),
    }
    # Runs of earlier versions were closed without a list of surplus; in most it is empty.
    if plan.schema_version >= SURPLUS_LIST_SINCE:
        checks[SURPLUS_LIST] = lambda: store.tail(SURPLUS_LIST, 1) in (b"", b"\n")
    if is_curated(plan):
        checks |= {CURATION_DOCUMENT: partial(_is_described, store)}
    for name, is_whole in checks.items():
        try:
            if is_whole():
                continue
        except RiskforgeError as error:
            if not _is_absence(error):
                raise
        yield name


def _is_described(store: Store) -> bool:
    """Whether what was selected is described, and the files that the description names are there."""
    curation = find_curation(store)
    return curation is not None and set(store.list(CURATION)) >= {f"{CURATION}/{name}" for name in curation.files}


def _has_ends(store: Store) -> bool:
    parts = store.list(METADATA) if store.is_folder(METADATA) else [METADATA]
    return bool(parts) and all(_ends_with(store, name, _PARQUET_END) for name in parts)


def _ends_with(store: Store, name: str, end: bytes) -> bool:
    tail = store.tail(name, _TAIL_BYTES).strip()
    return bool(tail) and tail.endswith(end)


def _is_absence(error: RiskforgeError) -> bool:
    """Whether a file is missing or malformed; anything else is a fault of the store."""
    if isinstance(error, CorruptShardError):
        return True
    kinds = (FileNotFoundError, IsADirectoryError, NotADirectoryError)
    return isinstance(error, OutputError) and (isinstance(error.__cause__, kinds) or is_no_file(error))

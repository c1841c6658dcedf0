"""Keys of the samples of a folder of shards that are beyond their quota, as readers of its tars need them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from engine.data.images.decode import brief
from engine.models.untrusted_files import UnsuitableFileError, check_regular, read_whole

# The folder of a run's tars; the rows of all samples next to it; and in it the keys of samples beyond their quota.
SHARDS, ROWS, SURPLUS = "shards", "metadata.parquet", "surplus.txt"
MAX_SURPLUS_BYTES = 2**30


def surplus_keys(folder: Path) -> frozenset[str]:
    """Keys of the samples in a folder of shards that are beyond the quota of their request.

    Runs that were closed before schema version 3 have no list, and a column in their rows.

    Raises:
        UnsuitableFileError: list or rows cannot be read.
    """
    try:
        return frozenset(read_whole(folder / SURPLUS, MAX_SURPLUS_BYTES).decode("utf-8", "replace").split())
    except FileNotFoundError:
        rows = folder.resolve().parent / ROWS
    except OSError as error:
        raise UnsuitableFileError(f"its {SURPLUS}: {brief(error)}") from None
    if not rows.exists() or folder.resolve().name != SHARDS:
        return frozenset()
    try:
        return frozenset(_surplus_rows(rows))
    except (OSError, ValueError) as error:
        raise UnsuitableFileError(f"its {ROWS}: {brief(error)}") from None


def _surplus_rows(rows: Path) -> Iterator[str]:
    from engine.data.run.surplus import has_surplus, surplus_lines

    for path in rows.iterdir() if rows.is_dir() else [rows]:
        check_regular(path)
    if has_surplus(rows):
        yield from (line.decode().strip() for line in surplus_lines(rows))

"""The images of samples that a comparison names, from the run that stores them, wherever that is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from engine.data.reading.source import RunSource, open_source, reading_rows
from engine.errors import RiskforgeError, first_line
from engine.report.stored_images import StoredImages, find_images

# Single precision of a stored score.
_TOLERANCE = 1e-6


@dataclass(frozen=True, slots=True)
class NightImages:
    """Images of one night.

    Attributes:
        problem: why there are none; empty where the run could be read.
    """

    files: Mapping[str, bytes]
    problem: str = ""

    def of(self, key: str) -> bytes:
        """The image file of a sample; empty where none is stored, or it cannot be read any more."""
        try:
            return self.files.get(key, b"")
        except (RiskforgeError, OSError):
            return b""


def find_night_images(address: str, risks: Mapping[str, float], *, is_baseline: bool) -> NightImages:
    """The images of samples of a run, or of the run that a rescoring took its images from.

    Args:
        risks: of the samples by key. Another sample of that key, in a folder that was written again, is left out.
        is_baseline: whether the address is what a baseline notes of its run, which need not be there any more.
    """
    try:
        return NightImages(_find(address, risks))
    except RiskforgeError as error:
        reason = first_line(error)
    if is_baseline:
        return NightImages({}, f"a baseline holds no images, and its run is not at {address} any more")
    return NightImages({}, f"its images cannot be read ({reason})")


def _find(address: str, risks: Mapping[str, float]) -> StoredImages:
    source = open_source(address)
    known = _risks(source, risks)
    same = [key for key, risk in known.items() if math.isclose(risk, risks[key], rel_tol=_TOLERANCE)]
    origin = open_source(source.stores[-1].uri) if source.is_rescored else source
    return find_images(origin.store, origin.name, {row: key for key, row in _rows(origin, same).items()})


def _risks(source: RunSource, wanted: Mapping[str, float]) -> dict[str, float]:
    """The risk of samples by key, as the run has it now."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    keys, found = pa.array(list(wanted), pa.string()), dict[str, float]()
    for file in source.rows:
        with reading_rows(str(file)):
            table = pq.read_table(file.fetch(keep=True), columns=["key", "risk"], partitioning=None)
            table = table.filter(pc.is_in(table["key"].cast(pa.string()), value_set=keys))
        found |= dict(zip(table["key"].to_pylist(), table["risk"].to_pylist(), strict=True))
    return found


def _rows(source: RunSource, keys: list[str]) -> dict[str, int]:
    """The row numbers of samples by key, over all files of rows in their order."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    places, first = dict[str, int](), 0
    for file in source.rows:
        with reading_rows(str(file)):
            column = pq.read_table(file.fetch(keep=True), columns=["key"], partitioning=None)["key"].cast(pa.string())
        found = pc.index_in(pa.array(keys, pa.string()), value_set=column.combine_chunks()).to_pylist()
        places |= {key: first + place for key, place in zip(keys, found, strict=True) if place is not None}
        first += len(column)
    return places

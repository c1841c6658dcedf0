"""Rows of a batch in slices, where all of them at once are too many for a GPU's memory or for its kernels' indices."""

from __future__ import annotations

import itertools


def even_slices(num_rows: int, most: int | None) -> list[slice]:
    """The fewest slices of at most `most` rows, as equal as possible, the larger ones first; None: all rows in one."""
    count = 1 if most is None else -(-num_rows // most)
    size, larger = divmod(num_rows, count)
    starts = [place * size + min(place, larger) for place in range(count + 1)]
    return [slice(start, end) for start, end in itertools.pairwise(starts)]

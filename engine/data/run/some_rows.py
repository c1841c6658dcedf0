"""Some of the rows of a large run, chosen by their seeds: evenly, and samples of the same noise together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa


def shares_of(per_request: Mapping[str, int], max_rows: int) -> dict[str, float]:
    """The share of the rows of each request that is to be read: all of few, and of many about equally many of each.

    Args:
        per_request: rows of each request.
        max_rows: of all requests.
    """
    if sum(per_request.values()) <= max_rows:
        return dict.fromkeys(per_request, 1.0)
    most = max(max_rows // len(per_request), 1)
    return {name: min(1.0, most / max(count, 1)) for name, count in per_request.items()}


def chosen_rows(table: pa.Table, shares: Mapping[str, float]) -> np.ndarray:
    """Numbers of the chosen rows of a table; what a smaller share chooses, a larger one chooses too.

    Args:
        table: has the columns `request` and `seed`.
        shares: of requests; those that are not named are read whole.
    """
    import numpy as np

    if all(share == 1.0 for share in shares.values()):
        return np.arange(table.num_rows)
    requests = table["request"].combine_chunks().dictionary_encode()
    by_code = np.array([shares.get(name, 1.0) for name in requests.dictionary.to_pylist()])
    return np.flatnonzero(_uniform(table["seed"].to_numpy()) < by_code[requests.indices.to_numpy()])


def _uniform(seeds: np.ndarray) -> np.ndarray:
    """A number in [0, 1) for each seed, by the finaliser of SplitMix64."""
    import numpy as np

    bits = seeds.astype(np.uint64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        bits = (bits ^ (bits >> np.uint64(shift))) * np.uint64(factor)
    numbers: np.ndarray = (bits >> np.uint64(11)) / 2.0**53
    return numbers

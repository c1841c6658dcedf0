"""Some rows of a large run: the same noise in both runs, about equally many of each request, and all of few."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from engine.data.run.some_rows import chosen_rows, shares_of


def test_few_rows_are_all_read_and_small_requests_whole() -> None:
    assert shares_of({"a": 60, "b": 40}, 100) == {"a": 1.0, "b": 1.0}
    shares = shares_of({"a": 10_000, "b": 40}, 100)
    assert shares == {"a": 50 / 10_000, "b": 1.0}


def test_rows_are_chosen_by_seed_evenly_and_a_larger_share_has_those_of_a_smaller_one() -> None:
    """Whatever the order of the rows: pairs of two runs, and of two requests with one noise, stay together."""
    seeds = np.random.default_rng(0).permutation(40_000)
    table = pa.table({"request": ["a"] * 20_000 + ["b"] * 20_000, "seed": seeds})
    few, more = (set(seeds[chosen_rows(table, {"a": share, "b": share})].tolist()) for share in (0.1, 0.3))
    assert few < more and abs(len(few) / 4_000 - 1) < 0.1 and abs(len(more) / 12_000 - 1) < 0.05
    of_b = chosen_rows(table, {"a": 0.0, "b": 1.0})
    assert of_b.tolist() == list(range(20_000, 40_000))

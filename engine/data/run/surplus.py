"""Accepted samples beyond the quota of their request, which counts samples of a class in the order of indices.

They are known when a run is closed. `metadata.parquet` then has a column `surplus`, and their keys are listed
next to the tars, for readers of tars alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.data.run.counts import class_code
from engine.data.run.summary import read_tables
from engine.job.plan import Plan

if TYPE_CHECKING:
    import pyarrow as pa

# Columns that `mark` reads.
MARKED = ("request", "key", "accepted")


def quotas_of(plan: Plan) -> dict[str, int]:
    """By request, how many accepted samples of a class count; requests without a quota are not in it."""
    return {request.spec.name: request.spec.num_wanted for request in plan.requests if request.spec.has_quota}


class Surplus:
    """Marks accepted samples beyond their quota, which counts samples of a class in the order of their indices.

    Args:
        quotas: by request, how many accepted samples of a class count.
    """

    def __init__(self, quotas: Mapping[str, int]) -> None:
        self._quotas = quotas
        self._accepted: Counter[tuple[str, str]] = Counter()

    def mark(self, table: pa.Table) -> list[bool]:
        """A flag for each row of the next shard; shards of a class come in the order of its indices.

        Args:
            table: has the columns `MARKED`.
        """
        names = table["request"].unique().to_pylist()
        if not self._quotas.keys() & set(names):
            return [False] * table.num_rows
        return [self._is_beyond(row) for row in table.select(MARKED).to_pylist()]

    def is_within(self, request: str, accepted_per_class: Mapping[str, int]) -> bool:
        """Whether no sample of the next shard is beyond its quota. Such a shard counts as marked, others are to be.

        Args:
            accepted_per_class: accepted samples of the shard by class code.
        """
        quota = self._quotas.get(request)
        if quota is None:
            return True
        counts = {(request, code): count for code, count in accepted_per_class.items()}
        if any(self._accepted[place] + count > quota for place, count in counts.items()):
            return False
        self._accepted.update(counts)
        return True

    def _is_beyond(self, row: dict[str, Any]) -> bool:
        quota = self._quotas.get(row["request"])
        if quota is None or not row["accepted"]:
            return False
        place = (row["request"], class_code(row["key"]))
        self._accepted[place] += 1
        return self._accepted[place] > quota


def has_surplus(metadata: Path) -> bool:
    """Whether the rows of a folder of shards have the column `surplus`.

    Args:
        metadata: a parquet file, or a folder of them.
    """
    import pyarrow.dataset

    return "surplus" in pyarrow.dataset.dataset(metadata, format="parquet", partitioning=None).schema.names


def surplus_lines(metadata: Path) -> Iterator[bytes]:
    """The lines of the list of keys beyond their quota, in the order of the rows.

    Args:
        metadata: a parquet file, or a folder of them, with the column `surplus`.
    """
    import pyarrow.compute as pc

    for table in read_tables(metadata, ["key", "surplus"]):
        yield from (f"{key}\n".encode() for key in table.filter(pc.field("surplus"))["key"].to_pylist())

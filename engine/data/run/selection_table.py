"""`selection.parquet` of a curated run: its candidates, their groups and rewards, and which were selected."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine.data.run.file_names import SELECTION
from engine.data.run.shards import is_key
from engine.data.stores.base import Store
from engine.data.stores.file_errors import is_no_file
from engine.errors import MAX_REASON_CHARS, CorruptShardError, OutputError

if TYPE_CHECKING:
    import pyarrow as pa

# In place of the number of a group.
LEFT_OVER = -1
# A million candidates have about 60 MB.
MAX_SELECTION_BYTES = 2**32


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """What was drawn from candidates in the order of their run, a column each, [N].

    Attributes:
        groups: number of the group, or `LEFT_OVER`.
        rewards: before the scale.
        probabilities: of being selected within the group; 0 where there is none.
    """

    keys: tuple[str, ...]
    groups: tuple[int, ...]
    rewards: tuple[float, ...]
    probabilities: tuple[float, ...]
    selected: tuple[bool, ...]

    @property
    def num_groups(self) -> int:
        """Groups, and so selected samples."""
        return sum(self.selected)

    @property
    def num_left_over(self) -> int:
        """Candidates that fill no group."""
        return self.groups.count(LEFT_OVER)

    @property
    def selected_keys(self) -> frozenset[str]:
        """Keys of the selected samples."""
        return frozenset(key for key, is_selected in zip(self.keys, self.selected, strict=True) if is_selected)


def _schema() -> pa.Schema:
    import pyarrow as pa

    kinds = {
        "key": pa.string(),
        "group": pa.int64(),
        "reward": pa.float64(),
        "probability": pa.float64(),
        "selected": pa.bool_(),
    }
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in kinds.items()])


def selection_bytes(selection: Selection) -> bytes:
    """The file `selection.parquet`: a row for each candidate, in the order of the run."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = (selection.keys, selection.groups, selection.rewards, selection.probabilities, selection.selected)
    schema = _schema()
    arrays = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_arrays(arrays, schema=schema), buffer, compression="zstd")
    return buffer.getvalue()


def parse_selection(data: bytes) -> Selection:
    """A selection from its file, which anybody may have written.

    Raises:
        ValueError: it is not what `selection_bytes` writes.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(io.BytesIO(data), partitioning=None)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"it is not a parquet file: {error}") from None
    if not table.schema.equals(_schema()):
        raise ValueError("its columns are others")
    if any(column.null_count for column in table.columns):
        raise ValueError("a column lacks values")
    keys, groups, rewards, probabilities, selected = (tuple(column.to_pylist()) for column in table.columns)
    if len(set(keys)) != len(keys) or not all(map(is_key, keys)):
        raise ValueError("a key is there twice, or is not that of a sample")
    if not all(map(math.isfinite, (*rewards, *probabilities))):
        raise ValueError("a reward or a probability is not finite")
    drawn = sorted(group for group, is_selected in zip(groups, selected, strict=True) if is_selected)
    if drawn != sorted({group for group in groups if group != LEFT_OVER}):
        raise ValueError("a group has not exactly one selected sample")
    return Selection(keys=keys, groups=groups, rewards=rewards, probabilities=probabilities, selected=selected)


def read_selection(store: Store) -> Selection | None:
    """What was drawn for a curated run; None where it is not stored.

    Raises:
        CorruptShardError: the file is damaged.
    """
    remedy = "remove it, and `riskforge curate` with the same options writes it again"
    try:
        return parse_selection(store.read(SELECTION, MAX_SELECTION_BYTES))
    except OutputError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return None
        if not is_no_file(error):
            raise
        reason = str(error)
    except ValueError as error:
        reason = str(error)
    raise CorruptShardError(
        f"{store.address(SELECTION)}: is not the selection of a curated run ({reason[:MAX_REASON_CHARS]}); {remedy}"
    )

"""The outcome of a scored sample: does a classifier predict a class that was asked for?

Asked for is the conditioned class; for a joint prompt any class of its subset, none of which would be wrong. Errors of
the target, agreement of the oracle and valid failures are counted by this everywhere: in tables, filters and studies.
The column `is_error` records of a joint sample only that another class than the closest one was predicted. `ASKED` and
`ERRS`, which the functions need, are those of `engine.job.columns`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from engine.data.run.counts import JOINT_KEY, is_joint
from engine.job.columns import MIN_ORACLE_P_LABEL, MIN_P_VALID, NO_CLASS, UNKNOWN
from engine.job.records import REAL, STATUS_FAILED

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from pyarrow.compute import Expression


def asked_classes(record: Mapping[str, Any]) -> tuple[int, ...]:
    """The classes that a scored sample was conditioned on."""
    return tuple(record["kldb_classes"]) if is_joint(record["key"]) else (record["class_index"],)


def target_errs(record: Mapping[str, Any]) -> bool:
    """Whether the target predicts a class that was not asked for; the record is scored and has `ASKED` and `ERRS`."""
    if is_joint(record["key"]):
        return record["predicted_class"] not in record["kldb_classes"]
    return bool(record["is_error"])


def predicts_asked(table: pa.Table, predictions: np.ndarray) -> np.ndarray:
    """For each row whether a prediction is a class that was asked for, [N] booleans.

    Args:
        table: has the columns `ASKED`.
        predictions: class indices [N].
    """
    import numpy as np
    import pyarrow.compute as pc

    parents = pc.list_parent_indices(table["kldb_classes"]).to_numpy()
    members = pc.list_flatten(table["kldb_classes"]).to_numpy()
    in_subset = np.zeros(table.num_rows, dtype=bool)
    in_subset[parents[predictions[parents] == members]] = True
    return np.where(joint_rows(table), in_subset, predictions == table["class_index"].to_numpy())


def joint_rows(table: pa.Table) -> np.ndarray:
    """For each row whether it is of a joint prompt, [N] booleans."""
    import numpy as np
    import pyarrow.compute as pc

    return np.asarray(pc.match_substring_regex(table["key"], JOINT_KEY).to_numpy(), dtype=bool)


def errors(table: pa.Table) -> np.ndarray:
    """For each row whether the target predicts a class that was not asked for, [N] booleans.

    Args:
        table: has the columns `ASKED` and `ERRS`.
    """
    import numpy as np

    outside = ~predicts_asked(table, table["predicted_class"].to_numpy())
    return np.where(joint_rows(table), outside, table["is_error"].to_numpy())


def oracle_agreement(table: pa.Table) -> np.ndarray:
    """1.0 where the oracle predicts a class that was asked for, 0.0 where not, -1.0 without an oracle, [N]."""
    import numpy as np

    oracle = table["oracle_class"].to_numpy()
    return np.where(oracle == NO_CLASS, -1.0, predicts_asked(table, oracle))


def label_validity(table: pa.Table) -> np.ndarray:
    """1.0 where the label is valid by the name `label_is_valid`, 0.0 where not, -1.0 where that is unknown, [N].

    Unknown are rows of schema versions before 5, and those without an oracle that guided nothing.
    """
    import numpy as np

    names = ("p_valid", "oracle_p_label_min")
    if not set(names) <= set(table.column_names):
        return np.full(table.num_rows, -1.0)
    estimate, least = (np.nan_to_num(table[name].to_numpy(), nan=UNKNOWN) for name in names)
    is_valid = np.where(estimate == UNKNOWN, least >= MIN_ORACLE_P_LABEL, estimate >= MIN_P_VALID)
    return np.where((estimate == UNKNOWN) & (least == UNKNOWN), -1.0, is_valid)


def label_is_valid_expression() -> Expression:
    """The same as an Arrow expression, false where it is unknown."""
    import pyarrow.compute as pc

    estimate, least = pc.field("p_valid"), pc.field("oracle_p_label_min")
    return (estimate >= MIN_P_VALID) | ((estimate == UNKNOWN) & (least >= MIN_ORACLE_P_LABEL))


def scored_rows(table: pa.Table) -> np.ndarray:
    """For each row whether models scored it, [N] booleans; see `engine.job.records.is_scored`."""
    import numpy as np
    import pyarrow.compute as pc

    there = table.column_names
    by_method = pc.not_equal(table["method"], REAL) if "method" in there else pc.is_valid(table["status"])
    known = pc.coalesce(table["scored"], by_method) if "scored" in there else by_method
    return np.asarray(pc.and_(pc.not_equal(table["status"], STATUS_FAILED), known).to_numpy(), dtype=bool)


def is_scored_expression(columns: list[str]) -> Expression:
    """The same as an Arrow expression over rows with these columns."""
    import pyarrow.compute as pc

    by_method = pc.field("method") != REAL if "method" in columns else pc.scalar(True)
    known = pc.coalesce(pc.field("scored"), by_method) if "scored" in columns else by_method
    return (pc.field("status") != STATUS_FAILED) & known


def predicts_asked_expression(column: str, max_subset: int) -> Expression:
    """`predicts_asked` as an Arrow expression over the rows of a file.

    Args:
        column: of the predictions.
        max_subset: largest number of classes of a joint prompt. Arrow has no test for an element of a list, so the
            places of the subset are compared one by one.
    """
    import pyarrow.compute as pc

    prediction = pc.field(column)
    joint = pc.match_substring_regex(pc.field("key"), JOINT_KEY)
    is_asked = ~joint & (prediction == pc.field("class_index"))
    for place in range(max_subset):
        here = pc.coalesce(element(pc.field("kldb_classes"), place) == prediction, pc.scalar(False))
        is_asked = is_asked | (joint & here)
    return is_asked


def target_errs_expression(max_subset: int) -> Expression:
    """`errors` as an Arrow expression; `max_subset` as for `predicts_asked_expression`."""
    import pyarrow.compute as pc

    joint = pc.match_substring_regex(pc.field("key"), JOINT_KEY)
    outside = ~predicts_asked_expression("predicted_class", max_subset)
    return (joint & outside) | (~joint & pc.field("is_error"))


def element(column: Expression, place: int) -> Expression:
    """An element of a list column; unknown where the list is shorter."""
    import pyarrow.compute as pc

    return pc.list_element(pc.list_slice(column, place, place + 1, return_fixed_size_list=True), 0)

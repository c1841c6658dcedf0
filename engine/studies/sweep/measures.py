"""What is measured of a cell: shares and medians over its samples, from the run's rows and from stored images scored.

Asked for is the conditioned class, of a joint prompt any class of its subset (`engine.data.run.outcomes`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from engine.data.run.counts import is_joint
from engine.data.run.outcomes import asked_classes, target_errs
from engine.job.columns import GUIDES, NO_CLASS
from engine.job.records import STATUS_FAILED

COLUMNS = [
    "key", "status", "seed", "class_index", "kldb_classes", "is_error", "predicted_class", "oracle_class", "risk",
    "conformity", "kldb", "entropy", "accepted", "transfer", "judge",
]  # fmt: skip
Values = NDArray[np.float64]
Kind = Literal["share", "median", "images"]
# Of a transfer classifier.
_OTHER = "it guided nothing"


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """A column of the table.

    Attributes:
        name: in files.
        kind: a share of the samples, a median over them, or one figure of the images as a set.
        better: 1 where more is better, -1 where less is, 0 where that depends.
    """

    name: str
    title: str
    kind: Kind
    unit: str = ""
    digits: int = 2
    better: int = 0
    note: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class CellSamples:
    """The scored samples of a cell, n of them.

    Attributes:
        keys, seeds: of the samples, in order.
        classes: the class of each; of a joint prompt the one with the highest conformity, [n].
        values: by the name of a measure, [n]; shares as 0.0 and 1.0.
        num_failed: attempts without scores.
    """

    keys: tuple[str, ...]
    seeds: tuple[int, ...]
    classes: NDArray[np.int64]
    values: dict[str, Values]
    num_failed: int

    def __len__(self) -> int:
        return len(self.keys)


def measures_of(
    is_joint: bool, *, transfer: Sequence[str], has_oracle: bool, has_judge: bool, has_rule: bool
) -> list[Measure]:
    """The measures that cells may have, in the order of the table.

    Args:
        is_joint: whether their prompts name several classes.
        transfer: names of the classifiers that guided nothing.
        has_rule: whether a rule of acceptance applies.
    """
    oracle = [
        Measure(
            name="oracle_agrees",
            title="oracle agrees",
            kind="share",
            better=1,
            note="it predicts a class that was asked for",
        )
    ] * has_oracle
    accepted = [Measure(name="accepted", title="accepted", kind="share", better=1, note="by the job's rule")] * has_rule
    judge = [Measure(name="judge_conformity", title="conformity under the judge", kind="median", better=1)] * has_judge
    conformity = [Measure(name="conformity", title="conformity", kind="median", better=1), *judge]
    own = _of_subsets(transfer) if is_joint else _of_classes(transfer, has_oracle)
    return [*own, *oracle, *conformity, *accepted]


def _of_classes(transfer: Sequence[str], has_oracle: bool) -> list[Measure]:
    valid = "the target errs and the oracle agrees"
    return [
        Measure(name="target_errs", title="target errs", kind="share", better=1),
        *[Measure(name="valid_failures", title="valid failures", kind="share", better=1, note=valid)] * has_oracle,
        Measure(name="risk", title="risk", kind="median", unit="nats", better=1),
        *(
            Measure(name=f"transfer_errs{suffix}", title=f"{name} errs", kind="share", note=_OTHER)
            for suffix, name in _numbered(transfer)
        ),
    ]


def _of_subsets(transfer: Sequence[str]) -> list[Measure]:
    """KLDB of all classifiers first, then the others."""
    models = [("{}", "the target", ""), *((f"transfer_{{}}{end}", name, _OTHER) for end, name in _numbered(transfer))]
    kinds = [
        Measure(name="kldb", title="KLDB", kind="median", unit="nats", digits=3, better=-1),
        Measure(name="entropy", title="entropy", kind="median", unit="nats", better=1),
        Measure(name="top_in_subset", title="top |C| in C", kind="share", better=1),
    ]
    return [
        replace(kind, name=pattern.format(kind.name), title=f"{kind.title} on {name}", note=note)
        for kind in kinds
        for pattern, name, note in models
    ]


def _numbered(names: Sequence[str]) -> list[tuple[str, str]]:
    """What the names of columns end in, and the classifiers' names without `zoo:`."""
    return [("" if number == 0 else f"_{number + 1}", name.removeprefix("zoo:")) for number, name in enumerate(names)]


IMAGE_MEASURES = (
    Measure(name="kid", title="KID x 1,000", kind="images", digits=0, better=-1, note="to real images of the classes"),
    Measure(name="precision", title="precision", kind="images", better=1, note="samples among the real images"),
    Measure(name="recall", title="recall", kind="images", better=1, note="real images among the samples"),
    Measure(name="coverage", title="coverage", kind="images", better=1, note="real images with a sample nearby"),
    Measure(
        name="spread", title="spread", kind="images", digits=3, better=1, note="1 less the mean cosine of two samples"
    ),
)


def read_cell(rows: Iterable[Mapping[str, Any]], scores: Mapping[str, Any]) -> CellSamples:
    """The scored samples of a cell.

    Args:
        rows: every attempt, with `COLUMNS`.
        scores: of the stored images, as `engine.studies.sweep.scores` keeps them; empty values where there are none.
    """
    every = list(rows)
    scored = [row for row in every if row["status"] != STATUS_FAILED]
    values = {name: np.array(column, np.float64) for name, column in _columns(scored).items()}
    if scored and is_joint(scored[0]["key"]):
        place = {key: number for number, key in enumerate(scores["keys"])}
        order = [place.get(row["key"], -1) for row in scored]
        for name, column in scores["values"].items():
            values[name] = np.append(np.array(column, np.float64), np.nan)[order]
    return CellSamples(
        keys=tuple(row["key"] for row in scored),
        seeds=tuple(row["seed"] for row in scored),
        classes=np.array([row["class_index"] for row in scored], np.int64),
        values=values,
        num_failed=len(every) - len(scored),
    )


def _columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """What the run's own rows tell, by measure."""
    if not rows:
        return {}
    joint = is_joint(rows[0]["key"])
    names = ("kldb", "entropy", "conformity") if joint else ("risk", "conformity")
    columns = {name: [row[name] for row in rows] for name in names}
    columns["accepted"] = [row["accepted"] for row in rows]
    if all(row["judge"] for row in rows):
        columns["judge_conformity"] = [row["judge"][0]["conformity"] for row in rows]
    if any(row["oracle_class"] != NO_CLASS for row in rows):
        columns["oracle_agrees"] = [row["oracle_class"] in asked_classes(row) for row in rows]
    return columns if joint else columns | _error_columns(rows, columns.get("oracle_agrees"))


def _error_columns(rows: Sequence[Mapping[str, Any]], agrees: Sequence[float] | None) -> dict[str, list[float]]:
    """Errors of the target and of classifiers that guided nothing, of samples of single classes."""
    errs: list[float] = [target_errs(row) for row in rows]
    columns = {"target_errs": errs}
    if agrees is not None:
        columns["valid_failures"] = [bool(one and other) for one, other in zip(errs, agrees, strict=True)]
    entries = [[one for one in row["transfer"] if not one["model"].endswith(GUIDES)] for row in rows]
    for number in range(min(map(len, entries))):
        name = "transfer_errs" if number == 0 else f"transfer_errs_{number + 1}"
        columns[name] = [
            own[number]["predicted_class"] not in asked_classes(row) for own, row in zip(entries, rows, strict=True)
        ]
    return columns

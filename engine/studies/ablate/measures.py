"""What the samples of an arm show, and how it differs from another arm: samples of equal noise are pairs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from engine.data.run.manifest import screening_by_request
from engine.job.columns import GUIDES, NO_CLASS, UNKNOWN
from engine.job.records import STATUS_FAILED
from engine.methods.intervals import Estimate, wilson_interval
from engine.studies.compare.significance import Difference, Flags, Values, holm, median_difference, share_difference
from engine.studies.samples import StudiedRun, read_attempts

# A bootstrap needs two of them.
MIN_PAIRS = 2
_COLUMNS = [
    "seed", "status", "class_index", "is_error", "risk", "conformity", "oracle_class", "transfer", "twin_psnr_db",
]  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Samples:
    """The scored samples of an arm, [N] each.

    Attributes:
        seeds: of the noise, by which samples of two arms are pairs.
        errs: whether the target errs.
        valid: whether it errs while the oracle predicts the class; None without an oracle that guided nothing.
        risk: in nats.
        conformity: a cosine.
        transfer: whether each classifier that guided nothing errs, by name.
        psnr: to the unguided twin, in dB; None without.
        draws: embeddings drawn for a sample, on average; None where none is drawn.
        screened: share of the samples whose embedding passed; None without screening.
    """

    seeds: np.ndarray
    errs: Flags
    valid: Flags | None
    risk: Values
    conformity: Values
    transfer: Mapping[str, Flags]
    psnr: Values | None
    draws: float | None = None
    screened: float | None = None

    def __len__(self) -> int:
        return len(self.seeds)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """What arms are compared by.

    Attributes:
        name: in files.
        title: on pages.
        values: of the samples; None where it is not known. Booleans are compared by their shares, others by medians.
    """

    name: str
    title: str
    values: Callable[[Samples], Flags | Values | None]


VALID = Measure(name="valid", title="valid failures", values=lambda samples: samples.valid)
ERRORS = Measure(name="errors", title="target errs", values=lambda samples: samples.errs)
RISK = Measure(name="risk", title="risk", values=lambda samples: samples.risk)
CONFORMITY = Measure(name="conformity", title="conformity", values=lambda samples: samples.conformity)
TRANSFER = Measure(
    name="transfer", title="transfer errs", values=lambda samples: next(iter(samples.transfer.values()), None)
)
PSNR = Measure(name="psnr", title="PSNR to twin", values=lambda samples: samples.psnr)
MEASURES = (VALID, ERRORS, TRANSFER, RISK, CONFORMITY, PSNR)


def read_samples_of(run: StudiedRun, request: str, *, is_drawn: bool) -> Samples:
    """The scored samples of a request.

    Args:
        is_drawn: whether its embeddings are drawn from class statistics.
    """
    rows = [row for row in read_attempts(run, [request], _COLUMNS) if row["status"] != STATUS_FAILED]
    labels = np.array([row["class_index"] for row in rows], dtype=int)
    errs = np.array([row["is_error"] for row in rows], dtype=bool)
    oracle = np.array([row["oracle_class"] for row in rows], dtype=int)
    psnr = np.array([row["twin_psnr_db"] for row in rows], dtype=float)
    tallies = screening_by_request(run.commits, run.job).get(request, [])
    number, draws, passed = (sum(row[key] for row in tallies) for key in ("samples", "draws", "screened"))
    return Samples(
        seeds=np.array([row["seed"] for row in rows], dtype=np.int64),
        errs=errs,
        valid=None if (oracle == NO_CLASS).any() else errs & (oracle == labels),
        risk=np.array([row["risk"] for row in rows], dtype=float),
        conformity=np.array([row["conformity"] for row in rows], dtype=float),
        transfer=_transfer(rows, labels),
        psnr=None if not len(rows) or (psnr == UNKNOWN).any() else psnr,
        draws=draws / number if number else 1.0 if is_drawn else None,
        screened=passed / number if number else None,
    )


def _transfer(rows: Sequence[Mapping[str, object]], labels: np.ndarray) -> dict[str, Flags]:
    """Whether each classifier that guided nothing errs, by name."""
    errs: dict[str, list[bool]] = {}
    for row, label in zip(rows, labels, strict=True):
        for entry in row["transfer"]:  # type: ignore[attr-defined]
            if not entry["model"].endswith(GUIDES):
                errs.setdefault(entry["model"], []).append(entry["predicted_class"] != label)
    return {model: np.array(flags, dtype=bool) for model, flags in errs.items()}


def share(flags: Flags | None) -> Estimate | None:
    """The share of True with Wilson's interval; None where it is not known."""
    return None if flags is None or not len(flags) else wilson_interval(int(flags.sum()), len(flags))


def differences(whole: Samples, other: Samples) -> dict[str, Difference]:
    """How an arm differs from another, by measure, over the noises that both have; without those that are not known."""
    _, first, second = np.intersect1d(whole.seeds, other.seeds, return_indices=True)
    if len(first) < MIN_PAIRS:
        return {}
    found = {}
    for measure in MEASURES:
        old, new = measure.values(whole), measure.values(other)
        if old is None or new is None:
            continue
        compare = share_difference if old.dtype == bool else median_difference
        found[measure.name] = compare(old[first], new[second], is_paired=True)  # type: ignore[arg-type]
    return found


def adjusted(rows: Mapping[str, Mapping[str, Difference]]) -> dict[str, dict[str, float]]:
    """P values of some arms by measure, adjusted by Holm over the arms.

    Args:
        rows: of each arm the differences by measure.

    Returns:
        Of each arm the p values by measure.
    """
    by_arm: dict[str, dict[str, float]] = {arm: {} for arm in rows}
    for measure in MEASURES:
        arms = [arm for arm, found in rows.items() if measure.name in found]
        p_values = holm([rows[arm][measure.name].p_value for arm in arms])
        for arm, p_value in zip(arms, p_values, strict=True):
            by_arm[arm][measure.name] = p_value
    return by_arm

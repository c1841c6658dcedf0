"""What `riskforge status` says of the samples of a finished run: errors by request, and the pinned baseline."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from engine.data.run.comparison import Comparison, read_pinned
from engine.data.run.manifest_reading import read_manifest
from engine.data.stores.base import Store
from engine.errors import CorruptShardError, OutputError
from engine.report.text import many
from engine.terminal import printable

_RATES = {
    "num_errors": "error_rate",
    "num_valid_failures": "valid_failure_rate",
    "num_strict_failures": "strict_failure_rate",
}
_MAX_CROSSED = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOutcome:
    """What the models said of the scored samples of a request.

    Attributes:
        num_errors: the target predicts a class that was not asked for.
        num_valid_failures: and the oracle one that was; None without an oracle.
        num_strict_failures: and the label is valid by the name `label_is_valid`; None where that is unknown.
    """

    num_scored: int
    num_errors: int
    num_valid_failures: int | None = None
    num_strict_failures: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PinnedOutcome:
    """How a run differs from its pinned baseline, as of the last comparison.

    Attributes:
        baseline: its file.
        night: of the baseline.
        num_new_failures, num_mended: samples that fail now alone, or failed before alone.
        crossed: limits that were crossed, in words.
        problem: why the comparison cannot be read; empty otherwise.
    """

    baseline: str = ""
    night: str = ""
    num_new_failures: int = 0
    num_mended: int = 0
    crossed: tuple[str, ...] = ()
    problem: str = ""


def read_outcomes(store: Store) -> dict[str, RequestOutcome]:
    """The outcome of each request by its name, from the manifest; empty where it has none that can be read."""
    # Whatever is wrong with it, the run's command writes it again.
    with contextlib.suppress(CorruptShardError, OutputError, KeyError, TypeError, ValueError, AttributeError):
        counts: dict[str, Counter[str]] = {}
        for group in read_manifest(store)["summary"]:
            counts.setdefault(str(group["request"]), Counter()).update(_counts(group))
        return {name: RequestOutcome(**{"num_errors": 0} | own) for name, own in counts.items() if own["num_scored"]}
    return {}


def _counts(group: Mapping[str, Any]) -> dict[str, int]:
    """The counts of a group of the manifest: its rates are over all scored samples."""
    num_scored = int(group["ok"]) + int(group["rejected"])
    counts = {name: round(float(group[rate]) * num_scored) for name, rate in _RATES.items() if rate in group}
    return {"num_scored": num_scored} | counts


def read_pinned_outcome(store: Store) -> PinnedOutcome | None:
    """How a run differs from its pinned baseline; None where it was never compared with one."""
    try:
        comparison = read_pinned(store)
    except CorruptShardError as error:
        return PinnedOutcome(problem=str(error))
    return None if comparison is None else _pinned(comparison)


def _pinned(comparison: Comparison) -> PinnedOutcome:
    return PinnedOutcome(
        baseline=comparison.baseline,
        night=comparison.old.night,
        num_new_failures=comparison.num_new_failures,
        num_mended=comparison.num_mended,
        crossed=comparison.crossed,
    )


def outcome_text(outcome: RequestOutcome) -> str:
    """A line about a request."""
    share = f"{outcome.num_errors / outcome.num_scored:.1%}"
    text = f"target errs on {outcome.num_errors} of {outcome.num_scored} ({share})"
    if outcome.num_valid_failures is not None:
        text += f", {many(outcome.num_valid_failures, 'valid failure')}"
    if outcome.num_strict_failures is not None:
        text += f" ({outcome.num_strict_failures} strictly)"
    return text


def pinned_lines(pinned: PinnedOutcome) -> Iterator[str]:
    """Lines about the comparison with the baseline."""
    if pinned.problem:
        yield f"baseline: {printable(pinned.problem)}"
        return
    limits = f"{many(len(pinned.crossed), 'limit')} crossed" if pinned.crossed else "no limit crossed"
    yield printable(
        f"against the baseline {pinned.baseline} ({pinned.night}):"
        f" {many(pinned.num_new_failures, 'new failure')},"
        f" {pinned.num_mended} fixed, {limits}"
    )
    yield from (f"  {printable(line)}" for line in pinned.crossed[:_MAX_CROSSED])
    if len(pinned.crossed) > _MAX_CROSSED:
        yield f"  and {len(pinned.crossed) - _MAX_CROSSED} more"

"""The summary of a run: its exit code and the closing report for the user."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from engine.data.run.commits import CommitSummary
from engine.data.run.file_names import MANIFEST, METADATA, REPORT
from engine.data.run.finalise import FinishedRun
from engine.data.run.manifest import quota_rows
from engine.data.run.manifest_reading import read_manifest
from engine.data.run.quarantine import quarantined_shards
from engine.data.run.run_warnings import run_warnings
from engine.data.stores.base import Store
from engine.driver.run_loop import RunLoopResult
from engine.errors import EXIT_DRAINED, EXIT_INCOMPLETE, EXIT_OK, RiskforgeError
from engine.job.class_names import planned_names
from engine.job.plan import Plan
from engine.job.quotas import replay
from engine.job.spec import JobSpec

if TYPE_CHECKING:
    from engine.data.run.summary import GroupSummary


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary:
    """The result of a run.

    Attributes:
        report: address of the report; empty if there is nothing to report on.
        groups: medians by request and context.
        remarks: results of screening and of risk targets, in words, a line for each request.
        quarantined: numbers of the shards in quarantine.
        num_samples: attempts in the committed shards.
        num_failed: attempts without an image.
        failure: the most frequent error message of failed samples.
        was_complete: whether there was nothing to do.
        drained: why the run stopped with shards left to do: the name of a signal, or `deadline`; empty otherwise.
        short: unfilled quotas, in words, a line for each class.
        quotas: of each request with quotas how many accepted samples count of those wanted, in words.
        warnings: requests without a sample that is what was asked for (`engine.data.run.run_warnings`).
        sampling_share: share of the workers' time spent sampling and scoring; None if nothing was made.
    """

    exit_code: int
    uri: str
    report: str
    num_shards: int
    num_committed: int
    num_samples: int
    num_failed: int
    seconds: float
    failure: str = ""
    groups: list[GroupSummary] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    quarantined: tuple[int, ...] = ()
    was_complete: bool = False
    drained: str = ""
    short: tuple[str, ...] = ()
    quotas: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    sampling_share: float | None = None


def summarise(
    store: Store,
    job: JobSpec,
    committed: dict[int, CommitSummary],
    result: RunLoopResult,
    *,
    seconds: float,
    finished: FinishedRun | None = None,
    was_complete: bool = False,
) -> RunSummary:
    """The summary of a run.

    Args:
        seconds: duration of this session.
        finished: what was written at its end; None if nothing was.
    """
    plan = result.plan
    short = () if result.drained else tuple(shortfalls(plan, committed, job.output.samples_per_shard))
    num_failed = sum(commit.counts.failed for commit in committed.values())
    is_complete = len(committed) == plan.num_shards and not short and not _is_short(plan, committed)
    return RunSummary(
        exit_code=EXIT_DRAINED if result.drained else EXIT_OK if is_complete else EXIT_INCOMPLETE,
        uri=store.uri,
        report=store.address(REPORT) if store.exists(REPORT) else "",
        num_shards=plan.num_shards,
        num_committed=len(committed),
        num_samples=sum(commit.counts.attempted for commit in committed.values()),
        num_failed=num_failed,
        failure=_top_failure(store) if num_failed else "",
        seconds=seconds,
        groups=finished.groups if finished else [],
        remarks=_remarks(finished.manifest) if finished else [],
        quarantined=tuple(number for number in quarantined_shards(store) if number not in committed),
        was_complete=was_complete,
        drained=result.drained,
        short=short,
        quotas=tuple(_quotas(plan, committed, job.output.samples_per_shard)),
        warnings=() if result.drained else tuple(_warnings(store, plan, finished)),
        sampling_share=result.sampling_share,
    )


def shortfalls(plan: Plan, committed: dict[int, CommitSummary], samples_per_shard: int) -> Iterator[str]:
    """The unfilled quotas, in words."""
    counts, names = {number: commit.counts for number, commit in committed.items()}, planned_names(plan)
    for quota in replay(plan, counts, (), samples_per_shard).standings():
        if quota.missing:
            request = plan.requests[quota.request]
            name = " and ".join(names[index] for index in request.cells[quota.cell].classes)
            yield (
                f"{request.spec.name}, {name}: {quota.accepted} of {quota.wanted} accepted in {quota.attempted}"
                " attempts"
            )


def _quotas(plan: Plan, committed: dict[int, CommitSummary], samples_per_shard: int) -> Iterator[str]:
    """How far quotas are, a line for each request."""
    counts = {number: commit.counts for number, commit in committed.items()}
    rows = quota_rows(plan, replay(plan, counts, (), samples_per_shard))
    for request, classes in rows.items():
        wanted, missing, surplus, attempted = (
            sum(row[name] for row in classes) for name in ("wanted", "missing", "surplus", "attempted")
        )
        beyond = f", and {surplus} beyond the quotas" if surplus else ""
        yield f"{request}: {wanted - missing} of {wanted} wanted accepted{beyond}, in {attempted} attempts"


def _warnings(store: Store, plan: Plan, finished: FinishedRun | None) -> list[str]:
    """What the run warns of, also one that was finished before: by its counts, as earlier versions wrote none."""
    manifest: dict[str, Any] = {}
    if finished:
        manifest = finished.manifest
    elif store.exists(MANIFEST):
        with contextlib.suppress(RiskforgeError):
            manifest = read_manifest(store)
    try:
        return run_warnings(manifest.get("counts", {}), planned_names(plan))
    except (AttributeError, KeyError, TypeError):
        return []


def _is_short(plan: Plan, committed: dict[int, CommitSummary]) -> bool:
    """Whether a request without quotas has fewer samples than planned; failed samples count as missing."""
    samples: Counter[int] = Counter()
    for number, commit in committed.items():
        samples[plan.shard(number).request] += commit.counts.ok + commit.counts.rejected
    return any(samples[request.number] < request.total for request in plan.requests if not request.spec.has_quota)


def _top_failure(store: Store) -> str:
    """The most frequent error message of failed samples."""
    if not store.exists(METADATA):
        return ""
    from engine.report.data import failures, open_metadata

    messages = failures(open_metadata(store.fetch(METADATA)))
    return messages[0][0] if messages else ""


def _remarks(manifest: dict[str, Any]) -> list[str]:
    """Results of screening and risk targets, a line for each request."""
    lines = []
    for name, classes in manifest["counts"]["screening"].items():
        lines.append(_screening_remark(name, classes))
    for name, dial in manifest["dials"].items():
        near = f"{dial['share_within_tolerance']:.0%} within {dial['tolerance']:g}"
        lines.append(
            f"{name}: median risk {dial['risk_median']:.2f} for a risk target of {dial['target_risk']:g}; {near}, half"
            f" within {dial['distance_median']:.2f}"
        )
    return lines


def _screening_remark(name: str, classes: list[dict[str, Any]]) -> str:
    screened, samples, draws = (sum(row[key] for row in classes) for key in ("screened", "samples", "draws"))
    rates = [row["acceptance_rate"] for row in classes]
    return (
        f"{name}: {screened} of {samples} samples screened in {draws} draws; acceptance rate by class {min(rates):.1%}"
        f" to {max(rates):.1%}"
    )

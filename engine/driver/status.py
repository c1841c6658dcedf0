"""Status of a run, from its output alone: any machine that can read the folder can show it."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from dataclasses import asdict, dataclass, replace
from typing import Any

from engine.data.run.commits import list_commits
from engine.data.run.counts import ShardCounts
from engine.data.run.curated import KEY, Curation, find_curation, is_curated, remake_command
from engine.data.run.curation_text import curation_facts
from engine.data.run.file_names import MANIFEST, SUCCESS
from engine.data.run.manifest import quota_rows
from engine.data.run.manifest_reading import read_manifest
from engine.data.run.notices import MAX_DISTINCT, known_notices, one_line
from engine.data.run.presence import is_closed, loss_lines, lost_files
from engine.data.run.quarantine import quarantined_shards
from engine.data.run.stored_plan import stored_plan
from engine.data.stores.base import Store
from engine.data.stores.journal import NOTICE, read_events
from engine.data.stores.lease import is_alive, read_holder
from engine.driver.progress import duration
from engine.driver.run_outcome import (
    PinnedOutcome,
    RequestOutcome,
    outcome_text,
    pinned_lines,
    read_outcomes,
    read_pinned_outcome,
)
from engine.driver.worker_status import read_workers, worker_lines
from engine.errors import CorruptShardError, OutputError
from engine.job.plan import Plan
from engine.job.quotas import replay
from engine.report.text import many
from engine.terminal import printable

# The rate is measured over this many of the latest commits.
MAX_COMMITS = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestStatus:
    """Status of a request.

    Attributes:
        wanted, missing: accepted samples; None if it has no quotas.
        outcome: what the models said of its samples; None until the run is complete.
    """

    name: str
    planned: int
    attempted: int
    accepted: int
    failed: int
    wanted: int | None
    missing: int | None
    outcome: RequestOutcome | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """Status of a run.

    Attributes:
        state: `complete`, `running`, `stopped`, or `damaged` if files of committed shards are lost.
        lost: these files, a line each; not checked while a driver is running.
        is_torn: whether a file over all shards of a finished run is missing or torn; it then counts as stopped.
        driver: the running driver, or the last one; empty if there never was one.
        samples_per_second: rate of the latest commits; None if no driver is running.
        eta_seconds: remaining time for the planned shards; None if the rate is unknown.
        last_event: the latest line of the journal; empty if there is none.
        notices: what the hardware made workers do otherwise than the job says, as far as the manifest has it, and then
            since the last start.
        curation: how a curated run was selected, as far as that is known; None of any other run.
        remake: the command that makes what is missing, for messages.
        pinned: the comparison with the pinned baseline; None where there is none.
        workers: what workers do, and how fast (`engine.driver.worker_status`); None where no driver is running, or
            has not written it yet.
    """

    uri: str
    name: str
    state: str
    driver: str
    num_shards: int
    num_committed: int
    quarantined: tuple[int, ...]
    lost: tuple[str, ...]
    is_torn: bool
    requests: tuple[RequestStatus, ...]
    samples_per_second: float | None
    eta_seconds: float | None
    last_event: dict[str, Any]
    notices: tuple[str, ...]
    curation: Curation | None
    remake: str
    pinned: PinnedOutcome | None = None
    workers: dict[str, Any] | None = None


def read_status(store: Store) -> Status:
    """Status of a run.

    Raises:
        OutputError: there is no run.
        CorruptShardError: its records contradict each other.
    """
    job, plan = stored_plan(store)
    counts = {number: commit.counts for number, commit in list_commits(store).items()}
    holder = read_holder(store)
    is_running = holder is not None and is_alive(holder)
    lost = () if is_running else tuple(lost_files(store))
    is_marked = store.exists(SUCCESS)
    is_torn = is_marked and not is_closed(store, plan)
    events = list(read_events(store))
    rate = _rate(events) if is_running else None
    planned = sum(extent.stop - extent.start for extent in plan.extents)
    left = planned - sum(shard.attempted for shard in counts.values())
    state = _state(is_damaged=bool(lost), is_complete=is_marked and not is_torn, is_running=is_running)
    requests = _request_statuses(plan, counts, job.output.samples_per_shard)
    if state == "complete":
        outcomes = read_outcomes(store)
        requests = tuple(replace(request, outcome=outcomes.get(request.name)) for request in requests)
    return Status(
        uri=store.uri,
        name=job.name,
        state=state,
        driver=str(holder) if holder else "",
        num_shards=plan.num_shards,
        num_committed=len(counts),
        quarantined=tuple(number for number in quarantined_shards(store) if number not in counts),
        lost=lost,
        is_torn=is_torn,
        requests=requests,
        samples_per_second=rate,
        eta_seconds=left / rate if rate else None,
        last_event=events[-1] if events else {},
        notices=_notices(store, events),
        curation=_curation(store) if is_curated(plan) else None,
        remake=remake_command(plan),
        pinned=read_pinned_outcome(store),
        workers=read_workers(store, holder.token) if holder and is_running else None,
    )


def _curation(store: Store) -> Curation | None:
    """How a run was curated; None where it has just begun, or where `verify` reports damage."""
    with contextlib.suppress(CorruptShardError):
        return find_curation(store)
    return None


def _request_statuses(plan: Plan, counts: dict[int, ShardCounts], samples_per_shard: int) -> tuple[RequestStatus, ...]:
    quotas = quota_rows(plan, replay(plan, counts, (), samples_per_shard))
    sums: dict[int, Counter[str]] = {request.number: Counter() for request in plan.requests}
    for extent in plan.extents:
        sums[extent.request]["planned"] += extent.stop - extent.start
    for number, shard in counts.items():
        fields = {"attempted": shard.attempted, "accepted": shard.accepted, "failed": shard.failed}
        sums[plan.shard(number).request].update(fields)
    return tuple(
        _request_status(request.spec.name, sums[request.number], quotas.get(request.spec.name))
        for request in plan.requests
    )


def _notices(store: Store, events: list[dict[str, Any]]) -> tuple[str, ...]:
    """The notices of the manifest, if there is one that can be read, and of the journal."""
    manifest: dict[str, Any] = {}
    # Whatever is wrong with it, the run's command writes it again.
    with contextlib.suppress(CorruptShardError, OutputError):
        manifest = read_manifest(store) if store.exists(MANIFEST) else {}
    texts = [row["text"] for row in known_notices(manifest)]
    texts += [one_line(str(event.get("text"))) for event in events if event.get("event") == NOTICE]
    return tuple(dict.fromkeys(texts))[:MAX_DISTINCT]


def _state(*, is_damaged: bool, is_complete: bool, is_running: bool) -> str:
    states = {"damaged": is_damaged, "complete": is_complete, "running": is_running, "stopped": True}
    return next(name for name, is_so in states.items() if is_so)


def _request_status(name: str, counts: Counter[str], quotas: list[dict[str, Any]] | None) -> RequestStatus:
    return RequestStatus(
        name=name,
        planned=counts["planned"],
        attempted=counts["attempted"],
        accepted=counts["accepted"],
        failed=counts["failed"],
        wanted=sum(row["wanted"] for row in quotas) if quotas else None,
        missing=sum(row["missing"] for row in quotas) if quotas else None,
    )


def _rate(events: list[dict[str, Any]]) -> float | None:
    """Samples per second over the latest commits."""
    commits = [event for event in events if event.get("event") == "committed"][-MAX_COMMITS:]
    if len(commits) < 2:
        return None
    seconds = time.time() - commits[0]["time"]
    return sum(commit["samples"] for commit in commits[1:]) / seconds if seconds > 0 else None


def status_fields(status: Status) -> dict[str, Any]:
    """A status as plain data; only that of a curated run has its curation."""
    fields = asdict(status)
    for name in ("curation", "remake"):
        del fields[name]
    return fields | ({KEY: status.curation.to_document()} if status.curation else {})


def status_lines(status: Status) -> list[str]:
    """A status as lines of text."""
    rate, eta = status.samples_per_second, status.eta_seconds
    lines = [f"{status.uri}: {status.state}, {status.num_committed} of {status.num_shards} shards"]
    if status.state == "running":
        lines.append(f"driver: {status.driver}")
    elif status.driver and status.state == "stopped":
        lines.append(f"last driver: {status.driver}; {status.remake} continues")
    if status.workers:
        lines += worker_lines(status.workers)
    elif rate:
        lines.append(
            f"{rate:.2g} samples/s" + (f", {duration(eta)} left for the planned shards" if eta is not None else "")
        )
    for request in status.requests:
        lines.append(_request_line(request, is_complete=status.state == "complete"))
        lines += [f"  {outcome_text(request.outcome)}"] if request.outcome else []
    lines += pinned_lines(status.pinned) if status.pinned else []
    if status.curation:
        lines += [f"{name.lower()}: {printable(text)}" for name, text in curation_facts(status.curation)]
    lines += [f"notice: {text}" for text in status.notices]
    if status.is_torn:
        lines.append(f"a file over all shards is missing or torn; {status.remake} writes it again")
    if status.lost:
        lines += loss_lines(status.uri, status.lost, status.remake)
    if status.quarantined:
        lines.append(f"{len(status.quarantined)} shards in quarantine; `riskforge retry` gives them a fresh start")
    return lines


def _request_line(request: RequestStatus, *, is_complete: bool) -> str:
    if is_complete:
        return _finished_line(request)
    text = f"{request.name}: {request.attempted} of {request.planned} samples, {request.accepted} accepted"
    text += f", {request.failed} failed" if request.failed else ""
    return text + (f", {request.missing} of {request.wanted} still missing" if request.missing else "")


def _finished_line(request: RequestStatus) -> str:
    """What was made of what was wanted; of a quota no more than that counts."""
    if request.wanted is None or request.missing is None:
        text = f"{request.name}: {request.accepted} of {request.planned} accepted"
    else:
        counted = request.wanted - request.missing
        text = f"{request.name}: {counted} of {request.wanted} wanted, {request.accepted} accepted of"
        text += f" {many(request.attempted, 'attempt')}"
    return text + (f", {request.failed} failed" if request.failed else "")

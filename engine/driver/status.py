"""How far a run is, from its output alone: any machine that sees the folder can tell."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from engine.data.run.commits import list_commits
from engine.data.run.file_names import SUCCESS
from engine.data.run.manifest import quota_rows
from engine.data.run.presence import is_closed, loss_lines, lost_files
from engine.data.run.quarantine import quarantined_shards
from engine.data.run.stored_plan import stored_plan
from engine.data.stores.base import Store
from engine.data.stores.journal import read_events
from engine.data.stores.lease import is_alive, read_holder
from engine.driver.progress import duration
from engine.job.quotas import replay

# The rate is that of the latest commits.
MAX_COMMITS = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestStatus:
    """How far a request is; `wanted` and what is accepted of it where it has quotas."""

    name: str
    planned: int
    attempted: int
    accepted: int
    failed: int
    wanted: int | None
    missing: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """How far a run is.

    Attributes:
        state: `complete`, `running`, `stopped`, or `damaged` where files of committed shards are lost.
        lost: these files, a line each; not looked for while a driver is at work.
        is_torn: whether a file over all shards of a finished run is missing or torn; it then counts as stopped.
        driver: who is at work, or was last; empty where nobody has begun.
        samples_per_second: of the latest commits, None where nobody is at work.
        eta_seconds: for the shards that are planned, None where the rate is not known.
        last_event: the latest line of the journal, empty where there is none.
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


def read_status(store: Store) -> Status:
    """How far a run is.

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
    left = planned - sum(one.attempted for one in counts.values())
    quotas = quota_rows(plan, replay(plan, counts, (), job.output.samples_per_shard))
    by_request: dict[int, Counter[str]] = {request.number: Counter() for request in plan.requests}
    for extent in plan.extents:
        by_request[extent.request]["planned"] += extent.stop - extent.start
    for number, one in counts.items():
        about = {"attempted": one.attempted, "accepted": one.accepted, "failed": one.failed}
        by_request[plan.shard(number).request].update(about)
    return Status(
        uri=store.uri,
        name=job.name,
        state=_state(is_damaged=bool(lost), is_complete=is_marked and not is_torn, is_running=is_running),
        driver=str(holder) if holder else "",
        num_shards=plan.num_shards,
        num_committed=len(counts),
        quarantined=tuple(number for number in quarantined_shards(store) if number not in counts),
        lost=lost,
        is_torn=is_torn,
        requests=tuple(
            _request_status(request.spec.name, by_request[request.number], quotas.get(request.spec.name))
            for request in plan.requests
        ),
        samples_per_second=rate,
        eta_seconds=left / rate if rate else None,
        last_event=events[-1] if events else {},
    )


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
        wanted=sum(one["wanted"] for one in quotas) if quotas else None,
        missing=sum(one["missing"] for one in quotas) if quotas else None,
    )


def _rate(events: list[dict[str, Any]]) -> float | None:
    """Samples a second over the latest commits."""
    commits = [one for one in events if one.get("event") == "committed"][-MAX_COMMITS:]
    if len(commits) < 2:
        return None
    seconds = time.time() - commits[0]["time"]
    return sum(one["samples"] for one in commits[1:]) / seconds if seconds > 0 else None


def status_fields(status: Status) -> dict[str, Any]:
    """A status as plain data."""
    return asdict(status)


def status_lines(status: Status) -> list[str]:
    """A status for people."""
    rate, eta = status.samples_per_second, status.eta_seconds
    lines = [f"{status.uri}: {status.state}, {status.num_committed} of {status.num_shards} shards"]
    if status.state == "running":
        lines.append(f"driver: {status.driver}")
    elif status.driver and status.state == "stopped":
        lines.append(f"last driver: {status.driver}; `riskforge run` with the same job continues")
    if rate:
        lines.append(
            f"{rate:.2g} samples a second" + (f", {duration(eta)} to go as planned" if eta is not None else "")
        )
    for one in status.requests:
        text = f"{one.name}: {one.attempted} of {one.planned} samples, {one.accepted} accepted"
        text += f", {one.failed} failed" if one.failed else ""
        lines.append(text + (f", {one.missing} of {one.wanted} still missing" if one.missing else ""))
    if status.is_torn:
        lines.append("a file over all shards is missing or torn; `riskforge run` with the same job writes it again")
    if status.lost:
        lines += loss_lines(status.uri, status.lost)
    if status.quarantined:
        lines.append(f"{len(status.quarantined)} shards in quarantine; `riskforge retry` gives them a fresh start")
    return lines

"""The workers of a run in `riskforge status`: from the file that its driver replaces every few seconds."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from engine.data.stores.base import Store
from engine.data.stores.lease import MAX_MOMENT
from engine.driver.monitor import MAX_MACHINES, MAX_NAME_CHARS, MAX_ROWS, VERSION, WORKERS
from engine.driver.progress import duration
from engine.driver.workers import FAULT_KINDS, MAX_FAULTS, STATES
from engine.errors import MAX_REASON_CHARS, OutputError
from engine.methods.strict_json import parse_json
from engine.report.text import many
from engine.terminal import ELLIPSIS, printable

MAX_FILE_BYTES = 200_000
# So many workers are shown one by one; of more only the slowest.
MAX_SHOWN = 16
NUM_SLOWEST = 10
MAX_SHOWN_MACHINES = 12
MAX_SHOWN_FAULTS = 3
MACHINE_CHARS = 18
LINE_CHARS = 100
_MAX_NUMBER = 2**53


def read_workers(store: Store, driver: str) -> dict[str, Any] | None:
    """What workers do, as their driver wrote it last; every value is of its type and within bounds.

    Args:
        driver: token of the driver that is at work; what another one has left is ignored.

    Returns:
        None where there is nothing that can be read: an old run, one that has just begun, or a damaged file, which the
        driver replaces soon.
    """
    try:
        document = parse_json(store.read(WORKERS, MAX_FILE_BYTES))
    except (OutputError, ValueError):
        return None
    # Its shape is not known: whatever is missing or of another type, the file says nothing then.
    with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError):
        if document["version"] == VERSION and document["driver"] == driver:
            return _checked(document)
    return None


def _checked(document: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "updated": _moment(document["time"]),
        "num_workers": _count(document["num_workers"]),
        "states": _counts(document["states"], STATES),
        "machines": [_machine(entry) for entry in document["machines"][:MAX_MACHINES]],
        "workers": [_worker(entry) for entry in document["workers"][:MAX_ROWS]],
        "faults": [_fault(entry) for entry in document["faults"][-MAX_FAULTS:]],
        "num_faults": _counts(document["num_faults"], FAULT_KINDS),
        "rates": {name: _optional(_number, document["rates"][name]) for name in _RATES},
        "remaining_seconds": _optional(_number, document["remaining_seconds"]),
        "sampling_share": _optional(_number, document["sampling_share"]),
        "shards": _counts(document["shards"], ("committed", "in_flight", "waiting", "quarantined")),
        "missing": _count(document["missing"]),
    }


_RATES = ("samples_per_second", "mean_samples_per_second", "accepted_per_second")


def _machine(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "machine": _text(entry["machine"], MAX_NAME_CHARS),
        "num_workers": _count(entry["num_workers"]),
        "states": _counts(entry["states"], STATES),
        "num_samples": _count(entry["num_samples"]),
        "num_shards": _count(entry["num_shards"]),
    }


def _worker(entry: Mapping[str, Any]) -> dict[str, Any]:
    counts = ("worker", "num_done", "num_samples", "batch_size", "gpu_memory_peak_bytes", "gpu_memory_total_bytes")
    if entry["state"] not in STATES:
        raise ValueError("no such state")
    return {name: _count(entry[name]) for name in counts} | {
        "machine": _text(entry["machine"], MAX_NAME_CHARS),
        "state": entry["state"],
        "since": _moment(entry["since"]),
        "shard": _optional(_count, entry["shard"]),
        "batch_seconds": _number(entry["batch_seconds"]),
    }


def _fault(entry: Mapping[str, Any]) -> dict[str, Any]:
    if entry["kind"] not in FAULT_KINDS:
        raise ValueError("no such kind")
    return {
        "worker": _count(entry["worker"]),
        "machine": _text(entry["machine"], MAX_NAME_CHARS),
        "kind": entry["kind"],
        "time": _moment(entry["time"]),
        "shard": _optional(_count, entry["shard"]),
        "message": _text(entry["message"], MAX_REASON_CHARS),
        "log": _text(entry["log"], MAX_NAME_CHARS),
    }


def _optional(check: Callable[[Any], Any], value: Any) -> Any:
    return None if value is None else check(value)


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _MAX_NUMBER:
        raise ValueError("no count")
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= _MAX_NUMBER:
        raise ValueError("no number")
    return float(value)


def _moment(value: Any) -> float:
    if _number(value) > MAX_MOMENT:
        raise ValueError("no moment")
    return float(value)


def _text(value: Any, max_chars: int) -> str:
    if not isinstance(value, str):
        raise ValueError("no text")
    return value[:max_chars]


def _counts(value: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, int]:
    return {name: _count(value[name]) for name in names if name in value}


# Text -----------------------------------------------------------------------------------------------------------------


def worker_lines(workers: Mapping[str, Any]) -> Iterator[str]:
    """Lines about workers, at most 100 columns wide: each of a few; of many, counts by machine and the slowest."""
    yield _rates_line(workers)
    yield _shortened(_states_line(workers), LINE_CHARS)
    age = time.time() - workers["updated"]
    rows = workers["workers"]
    if workers["num_workers"] > MAX_SHOWN:
        yield from _machine_lines(workers["machines"])
        rows = sorted(rows, key=_sample_seconds, reverse=True)[:NUM_SLOWEST]
        yield f"the slowest {len(rows)} of {workers['num_workers']} workers, by the time a sample takes:"
    if rows:
        yield from _table(rows, workers["updated"])
    yield from _fault_lines(workers)
    if age > 120:
        yield f"the driver wrote this {duration(age)} ago"


def _rates_line(workers: Mapping[str, Any]) -> str:
    rates = workers["rates"]
    now, mean, accepted = (rates[name] for name in _RATES)
    parts = [] if now is None else [f"{_figure(now)} samples/s now"]
    parts += [] if mean is None else [f"{_figure(mean)} on average"]
    parts += [] if accepted is None else [f"{_figure(accepted)} accepted/s"]
    left = workers["remaining_seconds"]
    parts += [] if left is None else [f"{duration(left)} left for the planned shards"]
    return _shortened(", ".join(parts) or "no rate yet", LINE_CHARS)


def _states_line(workers: Mapping[str, Any]) -> str:
    text = many(workers["num_workers"], "worker") + _in_words(workers["states"])
    shards = workers["shards"]
    text += f"; shards: {shards.get('in_flight', 0)} in flight, {shards.get('waiting', 0)} waiting"
    if workers["missing"]:
        text += f"; {workers['missing']} accepted samples missing"
    return text


def _in_words(states: Mapping[str, int]) -> str:
    texts = [f"{number} {state}" for state, number in states.items() if number]
    return f": {', '.join(texts)}" if texts else ""


def _machine_lines(machines: list[dict[str, Any]]) -> Iterator[str]:
    largest = sorted(machines, key=lambda entry: -entry["num_workers"])[:MAX_SHOWN_MACHINES]
    for entry in largest:
        name = _shortened(entry["machine"] or "no machine yet", MACHINE_CHARS)
        text = f"  {name:<{MACHINE_CHARS}} {many(entry['num_workers'], 'worker')}{_in_words(entry['states'])}"
        yield _shortened(f"{text}; {many(entry['num_samples'], 'sample')}", LINE_CHARS)
    if len(machines) > len(largest):
        rest = sum(entry["num_workers"] for entry in machines) - sum(entry["num_workers"] for entry in largest)
        yield f"  and {len(machines) - len(largest)} more machines with {many(rest, 'worker')}"


_HEADINGS = ("worker", "machine", "state", "for", "shard", "done", "samples", "batch", "s/batch", "GPU GB")


def _table(rows: list[dict[str, Any]], now: float) -> Iterator[str]:
    """Rows as aligned text; the columns of machine and state are words."""
    cells = [_HEADINGS, *(_cells(row, now) for row in rows)]
    if not any(row[-1] for row in cells[1:]):
        cells = [row[:-1] for row in cells]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        texts = [
            f"{text:<{width}}" if place in (1, 2) else f"{text:>{width}}"
            for place, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield _shortened(("  " + "  ".join(texts)).rstrip(), LINE_CHARS)


def _cells(row: Mapping[str, Any], now: float) -> tuple[str, ...]:
    total = row["gpu_memory_total_bytes"]
    return (
        str(row["worker"]),
        _shortened(row["machine"], MACHINE_CHARS),
        row["state"],
        duration(max(0.0, now - row["since"])),
        "" if row["shard"] is None else str(row["shard"]),
        str(row["num_done"]),
        str(row["num_samples"]),
        str(row["batch_size"] or ""),
        _figure(row["batch_seconds"]) if row["batch_seconds"] else "",
        f"{row['gpu_memory_peak_bytes'] / 1e9:.1f}/{total / 1e9:.1f}" if total else "",
    )


def _figure(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _sample_seconds(row: Mapping[str, Any]) -> float:
    return row["batch_seconds"] / row["batch_size"] if row["batch_size"] else 0.0


def _fault_lines(workers: Mapping[str, Any]) -> Iterator[str]:
    counts = {kind.replace("_", " "): number for kind, number in workers["num_faults"].items() if number}
    if counts:
        total = sum(counts.values())
        yield f"{many(total, 'worker')} replaced{_in_words(counts)}; the latest:"
    for fault in workers["faults"][-MAX_SHOWN_FAULTS:]:
        where = f" on {_shortened(fault['machine'], MACHINE_CHARS)}" if fault["machine"] else ""
        when = time.strftime("%H:%M:%S", time.localtime(fault["time"]))
        yield _shortened(f"  {when} worker {fault['worker']}{where}: {fault['message']}", LINE_CHARS)
        if fault["log"]:
            yield _shortened(f"    {fault['log']}", LINE_CHARS)


def _shortened(text: str, max_chars: int) -> str:
    safe = printable(text)
    return safe if len(safe) <= max_chars else safe[: max_chars - 1] + ELLIPSIS

"""What runs of 10^4 to 10^9 images cost: measured on synthetic runs, and written as a page.

    python tools/scale_study.py measure runs/quickstart /tmp/scale --rows 1e5 1e6 1e7
    python tools/scale_study.py page --into docs/scale.md

`measure` makes runs of these sizes (`tools/synthetic_run.py`), runs each command in a process of its own and notes its
peak of resident memory and its CPU seconds in `tools/scale_study.json`; `page` writes tables from that record.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.data.run.commit_packs import MAX_LOOSE, PACKS, packs_to_merge
from engine.data.run.commits import list_commits
from engine.data.run.recorded_files import recorded_files
from engine.data.stores.opening import open_store

RECORD = Path(__file__).with_suffix(".json")
MARKS = ("<!-- scale:begin -->", "<!-- scale:end -->")
SIZES = (10**4, 10**6, 10**8, 10**9)
SAMPLES_PER_SHARD = 256
NUM_RECORDS = 10**6
# Requests of a shard that is created and closed (docs/operations.md, counted by tests/test_object_store_runs.py); the
# record is packed by the driver from memory.
PUTS_PER_SHARD, GETS_PER_SHARD = 3, 2
PRICES = {"put_per_1000": 0.005, "get_per_1000": 0.0004, "gb_month": 0.023}
PRICE_SOURCE = (
    "S3 Standard, us-east-1: $0.005 for 1,000 PUT or LIST, $0.0004 for 1,000 GET, DELETE free, $0.023 a GB and month"
    " for the first 50 TB (as third parties quote aws.amazon.com/s3/pricing, not read there; yours may differ)"
)


def measured(command: Sequence[str], **environment: str) -> dict[str, float]:
    """Peak of resident memory in MB and CPU seconds of a command, which has to succeed."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ | environment)
    _, status, usage = os.wait4(process.pid, 0)
    if code := os.waitstatus_to_exitcode(status):
        raise SystemExit(f"{' '.join(command)}: exit code {code}")
    return {"peak_mb": round(usage.ru_maxrss / 1024), "cpu_s": round(usage.ru_utime + usage.ru_stime, 1)}


def measure(template: Path, work: Path, sizes: Sequence[int], commands: Sequence[str], *, keep: bool) -> None:
    """Measure commands on runs of some sizes, and note each result as soon as it is there."""
    work.mkdir(parents=True, exist_ok=True)
    for size in sizes:
        runs = [work / f"rows-{size:.0e}-{seed}" for seed in range(1 + ("compare" in commands))]
        for seed, run in enumerate(runs):
            if not (run / "_SUCCESS").exists():
                shutil.rmtree(run, ignore_errors=True)
                make = [sys.executable, str(Path(__file__).with_name("synthetic_run.py")), str(template), str(run)]
                subprocess.run([*make, "--rows", str(size), "--seed", str(seed)], check=True)
        for name in commands:
            note("commands", name, f"{size:.0e}", measured(_command(name, runs)))
        if not keep:
            for run in runs:
                shutil.rmtree(run)


def _command(name: str, runs: Sequence[Path]) -> list[str]:
    if name == "close":
        return [sys.executable, __file__, "close", str(runs[0])]
    arguments = {"compare": ["compare", *map(str, runs)]}.get(name, [name, str(runs[0])])
    return [str(Path(sys.executable).with_name("riskforge")), *arguments]


def measure_records(template: Path, work: Path) -> None:
    """Measure what resuming reads of a million commit records, and the bytes of a packed one."""
    from synthetic_run import open_run, write_packs

    run = work / "records"
    if not run.exists():
        job, plan, store = open_run(template, run, 2 * NUM_RECORDS, 2)
        write_packs(store, job, plan)
    packs = list((run / PACKS).iterdir())
    store = open_store(str(run))
    count = len(list_commits(store))
    note("records", "packed", "bytes", {"value": sum(pack.stat().st_size for pack in packs) / count})
    note("records", "resume", str(count), measured([sys.executable, __file__, "resume", str(run)]))


def measure_plan(job: Path) -> None:
    """Measure planning 10^9 samples of a job."""
    command = [str(Path(sys.executable).with_name("riskforge")), "plan", str(job)]
    # The quickstart's requests have one, one, and ten classes with two contexts.
    for count in (1, 10**9 // 22):
        sets = [part for number in range(3) for part in ("--set", f"requests.{number}.count={count}")]
        note("plan", "plan", f"{22 * count:.0e}", measured([*command, *sets]))


def resume(run: Path) -> None:
    """What a driver reads of the records before it starts workers, without the listing of the shards' files."""
    store = open_store(str(run))
    print(len(list_commits(store)), sum(1 for _ in recorded_files(store)))


def close(run: Path) -> None:
    """Summary, manifest and list of surplus at the end of a run."""
    from synthetic_run import close as close_run

    from engine.data.run.manifest_reading import read_manifest
    from engine.data.run.metadata_table import write_surplus

    store = open_store(str(run))
    write_surplus(store)
    close_run(store, read_manifest(store))


def note(part: str, name: str, size: str, result: dict[str, float]) -> None:
    """Add a result to the record, with its date."""
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    entry = result | {"date": time.strftime("%Y-%m-%d")}
    record.setdefault(part, {}).setdefault(name, {})[size] = entry
    record["machine"] = f"{platform.machine()}, {os.cpu_count()} CPU cores, Python {platform.python_version()}"
    RECORD.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
    print(part, name, size, entry, flush=True)


# The page ------------------------------------------------------------------------------------------------------------


def page(record: dict[str, Any], *, image_bytes: Sequence[float], cpu_seconds: float, gpu_price: float) -> str:
    """The tables of the page."""
    parts = [_measured_table(record), _cost_table(record, image_bytes), _hours_table(cpu_seconds, gpu_price)]
    return "\n\n".join(parts)


def _measured_table(record: dict[str, Any]) -> str:
    commands = record.get("commands", {})
    sizes = sorted({size for results in commands.values() for size in results}, key=float)
    lines = [
        "| command | " + " | ".join(f"{_power(float(size))} attempts" for size in sizes) + " |",
        "|---|" + "---|" * len(sizes),
    ]
    names = {
        "close": "summary, manifest and list of surplus at the end of a run",
        "status": "`status`, each turn of `--watch`",
    }
    for name, results in commands.items():
        cells = [_figure(results[size]) if size in results else "not measured" for size in sizes]
        lines.append(f"| {names.get(name, f'`{name}`')} | {' | '.join(cells)} |")
    dates = sorted({entry["date"] for results in commands.values() for entry in results.values()})
    return "\n".join(
        [
            *lines,
            "",
            f"Peak of resident memory and CPU seconds of the whole process, `python tools/scale_study.py measure`,"
            f" {' and '.join(dates)}, {record['machine']}, shared with other work.",
            "",
            *_record_lines(record.get("records", {})),
            *_plan_lines(record.get("plan", {}).get("plan", {})),
        ]
    )


def _record_lines(records: dict[str, Any]) -> list[str]:
    packed = f"- A packed commit record has {records['packed']['bytes']['value']:.0f} bytes."
    return [packed] + [
        f"- Reading {int(count):,} packed commit records, as resuming and `status` do: {_figure(entry)}."
        for count, entry in records.get("resume", {}).items()
    ]


def _plan_lines(plan: dict[str, Any]) -> list[str]:
    return [
        f"- `plan` of {float(size):,.0f} samples: {_figure(plan[size])}; a plan has ranges, not samples."
        for size in sorted(plan, key=float)
    ]


def _figure(entry: dict[str, Any]) -> str:
    return f"{entry['peak_mb']:,.0f} MB, {entry['cpu_s']:,.0f} s"


def _power(value: float) -> str:
    exponent = len(str(int(value))) - 1
    return f"10^{exponent}"


def _cost_table(record: dict[str, Any], image_bytes: Sequence[float]) -> str:
    record_bytes = record["records"]["packed"]["bytes"]["value"]
    headings = ["", *(f"{_power(size)} images" for size in SIZES)]
    shards = [-(-size // SAMPLES_PER_SHARD) for size in SIZES]
    rows: list[list[str]] = [
        ["shards of 256", *(f"{count:,}" for count in shards)],
        ["requests that write (3 a shard)", *(f"{PUTS_PER_SHARD * count:,}" for count in shards)],
        ["requests that read (2 a shard)", *(f"{GETS_PER_SHARD * count:,}" for count in shards)],
        ["dollars for requests", *(f"${_dollars(count):,.2f}" for count in shards)],
        ["packs and loose records, at most", *(_objects(count, record_bytes) for count in shards)],
    ]
    for size in image_bytes:
        dollars = [f"${count * size / 1e9 * PRICES['gb_month']:,.2f}" for count in SIZES]
        rows.append([f"storage a month, {size / 1000:,.0f} kB an image", *dollars])
    table = [f"| {' | '.join(headings)} |", "|---|" + "---|" * len(SIZES)]
    table += [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([*table, "", f"Prices: {PRICE_SOURCE}."])


def _dollars(num_shards: int) -> float:
    writes, reads = num_shards * PUTS_PER_SHARD / 1000, num_shards * GETS_PER_SHARD / 1000
    return writes * PRICES["put_per_1000"] + reads * PRICES["get_per_1000"]


def _objects(num_shards: int, record_bytes: float) -> str:
    """Objects that are listed for the records of a run: packs as the driver merges them, and loose ones."""
    packs: dict[str, int] = {}
    most = 0
    for number in range(num_shards // MAX_LOOSE):
        packs[f"{number:09d}"] = int(MAX_LOOSE * record_bytes)
        while names := packs_to_merge(packs):
            packs[f"{number:09d}m"] = sum(packs.pop(name) for name in names)
        most = max(most, len(packs))
    return f"{most:,} and {min(num_shards, MAX_LOOSE):,}"


def _hours_table(cpu_seconds: float, gpu_price: float) -> str:
    lines = [
        "| | " + " | ".join(f"{_power(size)} images" for size in SIZES) + " |",
        "|---|" + "---|" * len(SIZES),
        f"| digits, {cpu_seconds:g} CPU seconds an image: core-hours | "
        + " | ".join(f"{size * cpu_seconds / 3600:,.0f}" for size in SIZES) + " |",
        "| a GPU at 1 image/s (put in the measured rate): GPU-hours | "
        + " | ".join(f"{size / 3600:,.0f}" for size in SIZES) + " |",
        f"| the same at ${gpu_price:g} an hour | "
        + " | ".join(f"${size / 3600 * gpu_price:,.0f}" for size in SIZES) + " |",
    ]  # fmt: skip
    return "\n".join(lines)


def write_page(path: Path, text: str) -> None:
    """Put the tables between the marks of the page."""
    old = path.read_text(encoding="utf-8")
    head, _, rest = old.partition(MARKS[0])
    _, _, tail = rest.partition(MARKS[1])
    path.write_text(f"{head}{MARKS[0]}\n\n{text}\n\n{MARKS[1]}{tail}", encoding="utf-8")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    action = actions.add_parser("measure")
    action.add_argument("template", type=Path, help="a finished quickstart")
    action.add_argument("work", type=Path)
    action.add_argument("--rows", type=float, nargs="*", default=[1e5, 1e6, 1e7])
    action.add_argument("--commands", nargs="*", default=["status", "close", "report", "compare"])
    action.add_argument("--keep", action="store_true")
    for name in ("records", "plan", "resume", "close"):
        action = actions.add_parser(name)
        action.add_argument("run", type=Path)
        if name == "records":
            action.add_argument("work", type=Path)
    action = actions.add_parser("page")
    action.add_argument("--into", type=Path, default=Path("docs/scale.md"))
    action.add_argument("--image-bytes", type=float, nargs="*", default=[7_000, 450_000])
    action.add_argument("--cpu-seconds", type=float, default=0.31, help="of an image, from `plan --calibrate`")
    action.add_argument("--gpu-price", type=float, default=2.5)
    options = parser.parse_args()
    if options.action == "measure":
        sizes = [int(rows) for rows in options.rows]
        measure(options.template, options.work, sizes, options.commands, keep=options.keep)
    elif options.action == "page":
        text = page(
            json.loads(RECORD.read_text()),
            image_bytes=options.image_bytes, cpu_seconds=options.cpu_seconds, gpu_price=options.gpu_price,
        )  # fmt: skip
        write_page(options.into, text)
    elif options.action == "records":
        measure_records(options.run, options.work)
    else:
        {"plan": measure_plan, "resume": resume, "close": close}[options.action](options.run)


if __name__ == "__main__":
    main()

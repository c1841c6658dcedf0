"""How much of their time workers work: `python -m tools.overhead FOLDER --workers 16`.

Workers that sleep two seconds for each of 300 shards run on a Ray of their own. What is asleep is time well spent; the
rest, from the first worker that is ready to the last commit, is scheduling, transport, staging and committing, and
waiting: for the others to start, as many processes do on few cores, and for the last shard.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

from engine.driver.executors.ray import RayExecutor
from engine.driver.progress import PlainDisplay
from engine.driver.run import run_job
from tests.sleepy import SAMPLES_PER_SHARD, Faults, make_job, make_sleepy

NUM_CLASSES = 10


def main(arguments: list[str]) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--shards", type=int, default=300)
    parser.add_argument("--seconds", type=float, default=2.0, help="sleep of a shard")
    options = parser.parse_args(arguments)
    run_job(
        make_job(options.folder, options.shards * SAMPLES_PER_SHARD // NUM_CLASSES),
        executor=RayExecutor(address=None, num_workers=options.workers, device="cpu"),
        resume="never",
        confirmed=False,
        display=PlainDisplay(sys.stderr),
        make_worker=partial(make_sleepy, faults=Faults(seconds=options.seconds / SAMPLES_PER_SHARD)),
    )
    lines = (options.folder / "_state/events/000000.jsonl").read_text(encoding="utf-8").splitlines()
    events: list[dict[str, Any]] = [json.loads(line) for line in lines]
    ready = {one["worker"]: one["time"] for one in events if one["event"] == "ready"}
    last = max(one["time"] for one in events if one["event"] == "committed")
    slept, span = options.shards * options.seconds, last - min(ready.values())
    of_all, of_own = slept / (options.workers * span), slept / sum(last - began for began in ready.values())
    what = f"{options.workers} workers, {options.shards} shards of {options.seconds:g} s"
    print(f"{what}: {of_all:.1%} asleep in {span:.1f} s, {of_own:.1%} of the time since each was ready")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""`compile: on` with `batch_size: auto`: how often the UNet is compiled, for which shapes, and whether it falls back.

The engine runs in this process, with its local executor, so that torch's own counters can be read afterwards. Two
requests share the pipeline, and shards are no multiple of any batch size.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from bench.sizes import random_setting

from engine import cli
from gpu_steps.common import Figures, exit_code, parser, summary_of, write_job
from gpu_steps.sharing import auto_job

# A model has one size of batches, and two shapes: a plain step is one call of the UNet with both halves of
# classifier-free guidance; where the conditional half is differentiated, the other half is a call of its own.
MOST_PROGRAMS = 2
SHARDS = {"sd1": 100, "tiny": 7}


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    options = parser(__doc__)
    options.add_argument("--backend", help="of torch.compile, where no compiler is installed: `aot_eager`")
    given = options.parse_args(arguments)
    if given.backend:
        torch.compile = partial(torch.compile, backend=given.backend)
    figures, folder = Figures(given.output), given.output.parent / "runs" / "compile"
    setting = random_setting(given.size, given.models, given.device)
    failures = list[str]()
    for compiling in ("off", "on"):
        output = folder / compiling
        runtime = {"device": given.device, "workers": 1, "compile": compiling}
        job = auto_job(setting, output, SHARDS[given.size], runtime)
        started = time.monotonic()
        code = run_here("run", str(write_job(folder, job)), "--executor", "local", "--resume", "overwrite", "--yes")
        figures.note(f"compile {compiling}", {"exit_code": code, "seconds": round(time.monotonic() - started, 1)})
        if code:
            failures.append(f"with compile: {compiling} the run did not end well")
        else:
            figures.note(f"summary with compile {compiling}", summary_of(output))
    compiled = compilations()
    figures.note("compilations", compiled)
    figures.note("counters", {name: dict(found) for name, found in torch._dynamo.utils.counters.items()})
    return exit_code(failures or faults(compiled))


def faults(compiled: Sequence[dict[str, Any]]) -> list[str]:
    """What is wrong about the compilations of a run of one pipeline."""
    found = [f"a compilation failed: {one['failed_because']}" for one in compiled if one["failed_because"]]
    found += ["nothing was compiled"] * (not compiled)
    again = [str(one["again_because"]) for one in compiled if one["again_because"]]
    return found + [f"{len(compiled)} compilations: {'; '.join(again)}"] * (len(compiled) > MOST_PROGRAMS)


def run_here(*arguments: str) -> int:
    """The engine's command in this process; returns its exit code."""
    before, sys.argv = sys.argv, ["riskforge", *arguments]
    try:
        cli.main()
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        sys.argv = before
    return 0


def compilations() -> list[dict[str, Any]]:
    """Every compilation of this process: seconds, and why it was needed again or failed."""
    return [
        {
            "what": one.co_name,
            "seconds": one.entire_frame_compile_time_s,
            "again_because": one.recompile_reason,
            "failed_because": one.fail_reason,
        }
        for one in torch._dynamo.utils.get_compilation_metrics()
    ]


if __name__ == "__main__":
    sys.exit(main())

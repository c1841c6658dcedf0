"""A run of the digits zoo through Ray, every kind of guidance in it, and `verify --deep` of it.

Deep verification scores stored images again, on a CPU: that it finds nothing says that a sound run is called sound, and
that scores of a GPU can be compared with those of a CPU.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu_steps.common import Figures, exit_code, parser, riskforge, summary_of, write_job

PARTS = {"diffusion": "stable-diffusion", "clip": "clip", "target": "classifier", "oracle": "oracle"}
COUNTS = {"sd1": 48, "tiny": 4}
# Samples of a shard.
SHARDS = {"sd1": 24, "tiny": 4}
# On a CPU a batch costs the same however few samples it has.
BATCHES = {"sd1": "auto", "tiny": 4}
STEPS = {"sd1": 20, "tiny": 6}


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    options = parser(__doc__)
    options.add_argument("--executor", choices=("ray", "local"), default="ray")
    given = options.parse_args(arguments)
    figures, folder = Figures(given.output), given.output.parent / "runs" / "digits"
    shutil.rmtree(folder, ignore_errors=True)
    path = write_job(folder, digits_job(folder / "out", given.device, given.size))
    ran = riskforge("run", path, "--executor", given.executor)
    figures.note("run", ran)
    if ran["exit_code"]:
        return exit_code(["the run did not end well"])
    summary = summary_of(folder / "out")
    figures.note("summary", summary)
    failures = [f"samples of a status other than ok: {summary['statuses']}"] * (set(summary["statuses"]) != {"ok"})
    verified = riskforge("verify", folder / "out", "--deep")
    figures.note("verified", verified)
    failures += ["verify --deep calls the run damaged"] * bool(verified["exit_code"])
    return exit_code(failures)


def digits_job(output: Path, device: str, size: str) -> dict[str, Any]:
    """Prompt alone, boundary guidance by both presets and of the conditional half, risk with a conformity floor."""
    count, between = COUNTS[size], {"boundary": ["three", "eight"], "seed_group": "between"}
    detached = {"guidance": {"boundary": {"preset": "adversarial"}}}
    through = {"guidance": {"boundary": {"gradient": "unet"}}}
    floor = {"guidance": {"risky": {"conformity_floor": 0.2}}}
    return {
        "name": "gpu-run",
        "models": {
            **{role: f"zoo:digits/{part}" for role, part in PARTS.items()},
            "transfer": ["zoo:digits/classifier-b"],
        },
        "requests": [
            {"name": "plain", "method": "prompt", "count": count, **between},
            {"name": "between", "method": "boundary", "count": count, **between, **detached},
            {"name": "perceptible", "method": "boundary", "count": count, **between},
            {"name": "through", "method": "boundary", "count": count, **between, **through},
            {"name": "risky", "method": "risky", "classes": ["three", "one"], "count": count // 2, **floor},
        ],
        "sampling": {"scheduler": "lms", "num_inference_steps": STEPS[size], "guidance_scale": 3.0},
        "output": {"uri": str(output), "samples_per_shard": SHARDS[size]},
        "runtime": {"device": device, "workers": 1, "batch_size": BATCHES[size]},
    }


if __name__ == "__main__":
    sys.exit(main())
